"""The cache: its format, and everything that writes, reads, checks and queries it."""
