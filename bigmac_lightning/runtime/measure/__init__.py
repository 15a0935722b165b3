"""Measurements while a plan runs: times of actions, and bytes of activations."""
