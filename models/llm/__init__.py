"""Decoders of transformers, cut into stages: the probes that decide whether that is exact, and how a stage runs."""
