"""Steps on GPUs: `python -m benchmarks.gpu`."""
