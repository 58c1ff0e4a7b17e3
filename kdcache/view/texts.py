"""Texts and numbers as the page of `kd view` shows them: pure functions from bytes and arrays to plain JSON values."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def pieces(tokens: Sequence[bytes]) -> tuple[list[str], dict[int, str]]:
    """Return the text of each token, and by position the escaped bytes (``\\xF0``) of those that split a character.

    Tokens that form characters only together are one group: the first has the text of all, and the others have none.
    Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts, escaped = [""] * len(tokens), dict[int, str]()
    first = 0  # of the group
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        texts[first] += decoder.decode(token, final=last)
        if last or not decoder.getstate()[0]:  # no bytes of an unfinished character are left
            if i > first:
                escaped |= {n: escape(tokens[n]) for n in range(first, i + 1)}
            first = i + 1
    return texts, escaped


def escape(token: bytes) -> str:
    """Return the text of a token; if it is not UTF-8 by itself, with bytes like \\xE2\\x96, as in the view vocab."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02X}" for byte in token)


def common_frame(texts: Sequence[str]) -> tuple[str, str]:
    """Return the beginning and the end that all texts share, cut at a tag or a line; empty if they are equal."""
    if len(set(texts)) < 2:
        return "", ""
    before = _common_start(texts)
    before = before[: max(before.rfind("\n"), before.rfind(">")) + 1]
    after = _common_start([text[len(before) :][::-1] for text in texts])[::-1]
    starts = [at for at in (after.find("\n"), after.find("<")) if at >= 0]
    return before, after[min(starts) :] if starts else ""


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # no two texts differ earlier than the first and the last in sorted order
    return first[: next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))]


def split_frame(text: str | None, before: str, after: str) -> tuple[str, str, str]:
    """Split a prompt into the template before its content, the content, and the template after it."""
    text = text or ""
    before = before if text.startswith(before) else ""
    after = after if text[len(before) :].endswith(after) else ""
    return before, text[len(before) : len(text) - len(after)], after


def number(value: Any) -> float | None:
    """Return a number with five digits; None if it is not finite, because JSON cannot hold that."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def numbers(values: np.ndarray) -> list[float | None]:
    """Return ``number`` of each value."""
    return [number(value) for value in values.tolist()]
