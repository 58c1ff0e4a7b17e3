r"""Make text from samples, models and files safe to show on a terminal.

A terminal obeys control characters: an escape sequence sets its title, clears its screen or colours text, and a
bidirectional override shows text in another order. All text that `kd` shows to people goes through ``printable``, and
its JSON through ``json_text``; CSV that goes into a file or a pipe is not changed.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0, DEL and C1; marks and overrides of direction; line separators; lone surrogates, which cannot be encoded.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with escapes (``\x1b``) for characters that a terminal obeys, except those in ``keep``."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return _NAMED.get(character) or (f"\\x{ord(character):02x}" if ord(character) < 256 else _escape(character))

    return _UNSAFE.sub(escaped, text)


def json_text(value: Any, indent: int | None = None, default: Any = None) -> str:
    """Return a value as JSON that escapes only what a terminal obeys, and no other Unicode. The value is unchanged."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNSAFE.sub(lambda match: match[0] if match[0] == "\n" else _escape(match[0]), text)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
