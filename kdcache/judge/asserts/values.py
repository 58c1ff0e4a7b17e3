"""Plain values as text, and messages through a pipe: what the two processes of the assert judge exchange.

A message is its length in bytes, a line feed, and the text of one value in UTF-8::

    21\\nt3:s5:valueb1:xl0:           tuple of 3: "value", b"x" and an empty list
    ^^   ^ ^ ^        ^ ^ ^
    |    | | |        | | +-- list of 0 items
    |    | | |        | +---- bytes, 1 of them
    |    | | |        |
    |    | | +-- str of 5 characters
    |    | +-- of 3 items
    |    +-- tuple
    +-- bytes that follow the line feed

The letters: N None, T True, F False, i int (hexadecimal), f float, c complex (two floats), s str, b bytes, l list,
t tuple, d dict (keys and values in turn), S set, z frozenset; and r for an object that stays in its process (number, or
number and class), g for one of Python's builtins (name).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

MOST_BYTES = 16 << 20  # of a message

PLAIN_TYPES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
LETTERS: dict[type, str] = {list: "l", tuple: "t", dict: "d", set: "S", frozenset: "z"}


def encode(value: Any, refer: Callable[[Any], str]) -> str:
    """Return a plain value as text. Subclasses lose what they add; ``refer`` gives the text of any other object."""
    pieces: list[str] = []

    # Methods are called on the plain type and not on the value, whose class may be the answer's and override them.
    def put(item: Any) -> None:
        kind = type(item)
        if kind not in PLAIN_TYPES:
            kind = next((base for base in PLAIN_TYPES if base is not bool and issubclass(kind, base)), kind)
        if item is None:
            pieces.append("N")
        elif kind is bool:
            pieces.append("T" if item else "F")
        elif kind is int:
            pieces.append(f"i{int.__format__(item, 'x')}:")
        elif kind is float:
            pieces.append(f"f{float.__repr__(item)}:")
        elif kind is complex:
            pieces.append(f"c{float.__repr__(item.real)}:{float.__repr__(item.imag)}:")
        elif kind is str:
            pieces.append(f"s{str.__len__(item)}:{str.__str__(item)}")
        elif kind in (bytes, bytearray):
            pieces.append(f"b{kind.__len__(item)}:{kind.decode(item, 'latin-1')}")
        elif kind is dict:
            pieces.append(f"d{dict.__len__(item)}:")
            for pair in dict.items(item):
                put(pair[0])
                put(pair[1])
        elif kind in LETTERS:
            pieces.append(f"{LETTERS[kind]}{kind.__len__(item)}:")
            for element in kind.__iter__(item):
                put(element)
        else:
            pieces.append(refer(item))

    put(value)
    return "".join(pieces)


def decode(text: str, resolve: Callable[[str, str], Any]) -> Any:
    """Return the value of a text, of exactly the plain types; ``resolve`` gives the objects that r and g stand for.

    Any exception means that ``encode`` did not write the text.
    """
    position = 0

    def head() -> str:
        nonlocal position
        end = text.index(":", position)
        piece, position = text[position:end], end + 1
        return piece

    def take() -> Any:
        nonlocal position
        kind = text[position]
        position += 1
        if kind in "NTF":
            return {"N": None, "T": True, "F": False}[kind]
        if kind == "i":
            return int(head(), 16)
        if kind == "f":
            return float(head())
        if kind == "c":
            return complex(float(head()), float(head()))
        if kind in "rg":
            return resolve(kind, head())
        size = int(head())
        if kind in "sb":
            piece = text[position : position + size]
            if size < 0 or len(piece) != size:
                raise ValueError("cut off")
            position += size
            return piece if kind == "s" else piece.encode("latin-1")
        if kind == "d":
            return {take(): take() for _ in range(size)}
        container = {"l": list, "t": tuple, "S": set, "z": frozenset}[kind]
        return container([take() for _ in range(size)])

    return take()


def only_plain(kind: str, text: str) -> Any:
    """Raise ValueError: the ``resolve`` of a text in which nothing but plain values is expected."""
    raise ValueError(kind)


def send(descriptor: int, text: str) -> None:
    """Write one message to a pipe."""
    data = text.encode("utf-8", "surrogatepass")
    data = b"%d\n" % len(data) + data
    while data:
        data = data[os.write(descriptor, data[: 1 << 20]) :]


def receive(descriptor: int) -> str | None:
    """Read the next message from a pipe; None at its end. ValueError if it is no message, or too long."""
    header = b""
    while not header.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return None
        header += byte
        if len(header) > 20:
            raise ValueError("no message")
    size = int(header)
    if not 0 <= size <= MOST_BYTES:
        raise ValueError("too long")
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            return None
        data += chunk
    return data.decode("utf-8", "surrogatepass")
