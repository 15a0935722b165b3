"""From samples to batches: collation, workers, agreement between ranks, and loaders that resume exactly."""
