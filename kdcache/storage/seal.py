"""Proof, inside a file itself, that it is as it was written.

A JSON file has a field ``checksum``: the sha256 of the rest. A Parquet file has a *seal* between its pages and its
footer, where every reader skips it::

    pages | MAGIC, sha256 of all the rest (32 bytes) | footer | its length | PAR1

Parquet's own checksums leave out page headers and the footer, and DuckDB looks at none of them. Invariant: one flipped
bit anywhere in a sealed file is found by reading its bytes once, whatever it would have decoded to.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"kdcache sha256:\n"
SEAL_BYTES = len(MAGIC) + 32
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Digest:
    """What the bytes of a file say: their sha256, and whether the file's seal holds (None: it has none)."""

    sha256: str
    sealed: bool | None


# --- JSON -------------------------------------------------------------------------------------------------------------


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with its checksum, in the place of any that it had."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return rest | {"checksum": checksum(rest)}


def checksum(content: dict[str, Any]) -> str:
    """The sha256 of everything but the field ``checksum``, whatever the order of keys and the spaces between them."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- Parquet ----------------------------------------------------------------------------------------------------------


def seal(file: BinaryIO) -> None:
    """Put the seal into a whole Parquet file, which is open for reading and writing and has none."""
    pages_end = _footer_start(file)
    digest = _digest_until(file, pages_end)
    footer = file.read()
    digest.update(footer)
    file.seek(pages_end)
    file.write(MAGIC + digest.digest() + footer)


def digest(source: Path | io.BytesIO) -> Digest:
    """Read all bytes of a file once."""
    with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        whole = _digest_until(file, max(_footer_start(file) - SEAL_BYTES, 0))
        own = whole.copy()
        ending = file.read()
        whole.update(ending)
        if not ending.startswith(MAGIC):
            return Digest(whole.hexdigest(), None)
        own.update(ending[SEAL_BYTES:])
        return Digest(whole.hexdigest(), own.digest() == ending[len(MAGIC) : SEAL_BYTES])


def _footer_start(file: BinaryIO) -> int:
    """Where the footer begins, as the end of the file says; its last byte where that cannot be."""
    size = file.seek(0, io.SEEK_END)
    if size < 12:
        return size
    file.seek(size - 8)
    length = int.from_bytes(file.read(4), "little") + 8
    return size - length if length <= size else size


def _digest_until(file: BinaryIO, end: int) -> Any:
    """sha256 of the first ``end`` bytes; the file is then at ``end``."""
    found = hashlib.sha256()
    file.seek(0)
    while (left := end - file.tell()) > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        found.update(chunk)
    return found
