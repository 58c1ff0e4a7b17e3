r"""Text that samples, models and files bring along, made safe to show.

A terminal obeys control characters: an escape sequence sets its title, clears its screen or colours what follows, and a
bidirectional override shows text in another order than it has. Whatever `kd` shows to people goes through
``printable``, and its JSON through ``json_text``; CSV into a file or a pipe stays exactly as it is.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0, DEL and C1; marks and overrides of direction; separators of lines; half surrogates, which no terminal can be sent.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str, keep: str = "") -> str:
    r"""The text with ``\x1b``, ``\u202e`` and the like in the place of what a terminal would obey, but for ``keep``."""

    def shown(found: re.Match[str]) -> str:
        character = found[0]
        if character in keep:
            return character
        return _NAMED.get(character) or (f"\\x{ord(character):02x}" if ord(character) < 256 else _escape(character))

    return _UNSAFE.sub(shown, text)


def json_text(value: Any, indent: int | None = None, default: Any = None) -> str:
    """A value as JSON: Unicode as it is, and what a terminal would obey in JSON's own escapes, which change no value."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=default)
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else _escape(found[0]), text)


def _escape(character: str) -> str:
    return f"\\u{ord(character):04x}"
