"""Plans as data: what every rank of a pipeline does, in which order, and how long that takes.

Pure Python. Knows pipeline schedules, costs and dependencies; knows nothing of tensors, processes or Lightning.
"""
