"""Runs a plan on torch.distributed. Knows nothing of Lightning, of configs, or of any model."""
