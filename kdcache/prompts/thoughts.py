"""Reasoning in an answer's text, between <think> and </think>."""

from __future__ import annotations

THINK = "<think>"


def opens_thought(prompt: str) -> bool:
    """Return whether a prompt leaves a thought open at its end, so that an answer begins inside it."""
    return prompt.rstrip().endswith(THINK)


def whole_turn(prompt: str, completion: str) -> str:
    """Return an assistant's turn as text: the completion, after the <think> that the prompt may have opened."""
    return f"{THINK}\n{completion}" if opens_thought(prompt) else completion
