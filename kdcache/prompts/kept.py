"""Checks that a chat template writes all of a conversation that matters: some templates leave parts out silently."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kdcache.prompts.messages import REASONING_KEYS, Message, tool_name
from kdcache.prompts.thoughts import THINK


def plain_text(messages: Sequence[Message]) -> str:
    """Return the contents alone, for a tokenizer without a chat template; ValueError if there is more to write."""
    for message in messages:
        for key in ("tool_calls", *REASONING_KEYS):
            if message.get(key):
                raise ValueError(f"{key} need a chat template that writes them, and the tokenizer has none")
    return "\n\n".join(str(m.get("content") or "") for m in messages)


def check_prompt(messages: Sequence[Message], tools: Sequence[dict[str, Any]], prompt: str) -> None:
    """Raise ValueError if a rendering lacks what a prompt must hold: instructions, questions, tools and calls of them.

    Earlier reasoning may be missing: templates drop it on purpose.
    """
    for number, message in enumerate(messages, 1):
        content = str(message.get("content") or "").strip()
        if message["role"] in ("system", "developer", "user") and not _is_within(content, prompt):
            raise ValueError(f"the chat template leaves out message {number} (role {message['role']})")
        if not all(_is_within(tool_name(call) or "", prompt) for call in message.get("tool_calls") or ()):
            raise ValueError(f"the chat template leaves out the tool calls of message {number}")
    if not all(_is_within(tool_name(tool) or "", prompt) for tool in tools):
        raise ValueError("the chat template leaves out the row's tools")


def has_answer(answer: Message, text: str) -> bool:
    """Return whether a rendering holds an answer's text (without thoughts in it), its tool calls and its reasoning."""
    content = str(answer.get("content") or "").rpartition("</think>")[2].strip()
    calls = [tool_name(call) or "" for call in answer.get("tool_calls") or ()]
    return all(_is_within(part, text) for part in (content, str(answer.get(REASONING_KEYS[0]) or "").strip(), *calls))


def _is_within(part: str, text: str) -> bool:
    """Return whether a template wrote ``part``, as it is or as JSON."""
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def answer_inside_thought(answer: Message) -> str | None:
    """Return reasoning and answer as they continue a ``<think>`` in the prompt; None if there is no reasoning."""
    content, reasoning = str(answer.get("content") or ""), answer.get(REASONING_KEYS[0])
    if reasoning:
        return f"{reasoning.strip()}\n</think>\n\n{content.lstrip()}"
    if content.lstrip().startswith(THINK):
        return content.lstrip().removeprefix(THINK).removeprefix("\n")
    return content if "</think>" in content else None
