"""Turns chat messages as tables hold them into chat messages as templates take them.

Roles get their usual names, parts of text are joined, nulls that Arrow puts into structs are left out, and JSON that a
table keeps as text is parsed. Invariant: nothing that a message says is dropped. Tool calls, their ids and reasoning
stay, and what cannot be carried over is refused, with an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

#: Other names of the roles, as ShareGPT and Gemma write them.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

#: The keys in which an assistant's message may hold its reasoning. Templates read the first.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def read(value: Any) -> list[Message]:
    """Return the messages of a row. ValueError names the message that cannot be used, and what is wrong with it."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise ValueError("no prompt (column 'messages' is not a list of {role, content})")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the functions of a row's ``tools`` column; none if it is null or empty."""
    value = parsed(value)
    if value is None or value == []:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) and tool_name(tool) for tool in value):
        raise ValueError("column 'tools' is not a list of functions with names")
    return tuple(value)


def tool_name(tool: dict[str, Any]) -> str | None:
    """Return the name of a function or of a call of it, in OpenAI's form or without the outer ``function``."""
    inner = tool.get("function")
    name = (inner if isinstance(inner, dict) else tool).get("name")
    return name if isinstance(name, str) and name else None


def split_answer(messages: Sequence[Message]) -> tuple[list[Message], Message | None]:
    """Return the prompt's messages, and the last turn if it is the assistant's. ValueError if the rest is empty."""
    if messages[-1]["role"] != "assistant":
        return list(messages), None
    if len(messages) == 1:
        raise ValueError("no prompt (column 'messages' holds only an assistant turn)")
    return list(messages[:-1]), messages[-1]


def parsed(value: Any) -> Any:
    """Return JSON that is kept as text (a string, or a list of strings) as its value; anything else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return [parsed(item) for item in value]
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without null fields, at every depth: Arrow gives every struct the fields of the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError("no prompt (column 'messages' is not a list of {role, content})")
    role = ROLES.get(message["role"].lower(), message["role"].lower())
    if role not in KNOWN_ROLES:
        expected = ", ".join((*KNOWN_ROLES, *ROLES))
        raise ValueError(f"message {number} has the role {message['role']!r}; expected one of {expected}")
    kept = {key: value for key, value in message.items() if value is not None}
    kept["role"] = role
    reasoning = next((kept.pop(key) for key in REASONING_KEYS if kept.get(key)), None)
    for key in REASONING_KEYS:
        kept.pop(key, None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise ValueError(f"message {number}: its reasoning is {type(reasoning).__name__}, expected text")
        kept[REASONING_KEYS[0]] = reasoning
    if "tool_calls" in kept:
        kept["tool_calls"] = _calls(kept["tool_calls"], number)
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    kept["content"] = _text(kept.get("content"), number)
    return kept


def _text(content: Any, number: int) -> str:
    """Return a message's text, with its parts joined. No content is the empty text, which every template can print."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"message {number}: its content is {type(content).__name__}, expected text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {number} has a part that is no text ({kind})")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are objects, as transformers' templates expect them."""
    calls = parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) and tool_name(call) for call in calls):
        raise ValueError(f"message {number}: its tool_calls are not a list of calls with names")
    parsed_calls = []
    for call in calls:
        inner = call.get("function")
        if isinstance(inner, dict):
            call = call | {"function": inner | {"arguments": parsed(inner.get("arguments") or {})}}
        else:
            call = call | {"arguments": parsed(call.get("arguments") or {})}
        parsed_calls.append(call)
    return parsed_calls
