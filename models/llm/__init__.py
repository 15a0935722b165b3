"""Decoders of transformers, cut into stages: what is looked at before, and what a stage does."""
