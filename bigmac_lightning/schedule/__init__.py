"""Plans as data: the actions of every rank of a pipeline, their order, and the time they take.

This package is pure Python: it imports neither torch nor Lightning, so that `bigmac plan` starts fast. The runtime
executes the plans that are made here.
"""
