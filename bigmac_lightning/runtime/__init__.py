"""Executes a plan with torch.distributed: programs, messages, gradients and measurements.

Models and batches come in through ``executor.Computation``.
"""
