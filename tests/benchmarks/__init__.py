"""Benchmarks run on tiny input, and the documents have what they have found."""
