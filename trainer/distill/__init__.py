"""Supervised training from a cache."""
