"""Batches: collation, workers, ranks that agree, and loaders that go on where they stood."""
