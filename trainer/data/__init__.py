"""From the rows of a cache to batches."""
