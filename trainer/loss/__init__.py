"""Losses against the teacher distributions of a cache: divergences.py, then reference.py, then fused.py."""
