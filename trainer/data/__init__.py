"""From the rows of a cache to batches: select.py, then stream.py, then pack.py."""
