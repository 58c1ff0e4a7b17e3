"""Reinforcement learning from a cache."""
