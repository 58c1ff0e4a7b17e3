r"""Text from samples, models and files, made safe to show.

A terminal obeys control characters: an escape sequence sets its title, clears its screen or colours what follows, and a
bidirectional override shows text in another order. Whatever `kd` shows to people goes through ``printable``, and its JSON
through ``json_text``; CSV into a file or a pipe is not changed.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0, DEL and C1; direction marks and overrides; line separators; half surrogates, which cannot be written to a terminal.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with escapes such as ``\x1b`` for every character that a terminal obeys, except those in ``keep``."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return _NAMED.get(character) or (f"\\x{ord(character):02x}" if ord(character) < 256 else _escape(character))

    return _UNSAFE.sub(escaped, text)


def json_text(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Return a value as JSON. Characters that a terminal obeys become JSON escapes, which do not change the value."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNSAFE.sub(lambda match: match[0] if match[0] == "\n" else _escape(match[0]), text)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
