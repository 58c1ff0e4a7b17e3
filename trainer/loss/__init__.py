"""Losses on sparse teacher distributions."""
