"""Policies: how the work of encoders and generators is placed around a backbone, and the tools for it."""
