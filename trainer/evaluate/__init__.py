"""Measure what a student keeps of its teacher, and compare students."""
