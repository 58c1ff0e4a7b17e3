"""Prove, by what is inside a file, that it is unchanged since it was written.

A JSON file has a field ``checksum``: the sha256 of everything else in it. A Parquet file has a *seal* between its pages
and its footer, where every reader skips it::

    pages | MAGIC, sha256 of all the rest (32 bytes) | footer | its length | PAR1

Parquet's own checksums do not cover page headers and the footer, and DuckDB checks none of them. Invariant: reading the
bytes of a sealed file once finds one flipped bit anywhere in it, even if the file could still be decoded.
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
    """The sha256 of a file's bytes, and whether its seal holds; None stands for a file without a seal."""

    sha256: str
    sealed: bool | None


# --- JSON -------------------------------------------------------------------------------------------------------------


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return ``content`` with its checksum, which replaces an earlier one."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return rest | {"checksum": checksum(rest)}


def checksum(content: dict[str, Any]) -> str:
    """Return the sha256 of everything but the field ``checksum``, whatever the order of keys and the white space."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- Parquet ----------------------------------------------------------------------------------------------------------


def seal(file: BinaryIO) -> None:
    """Insert the seal into a complete Parquet file without one, which is open for reading and writing."""
    pages_end = _footer_start(file)
    digest = _digest_until(file, pages_end)
    footer = file.read()
    digest.update(footer)
    file.seek(pages_end)
    file.write(MAGIC + digest.digest() + footer)


def digest(source: Path | io.BytesIO) -> Digest:
    """Read all bytes of a file once, and return their digest."""
    with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        with_seal = _digest_until(file, max(_footer_start(file) - SEAL_BYTES, 0))
        without_seal = with_seal.copy()
        ending = file.read()
        with_seal.update(ending)
        if not ending.startswith(MAGIC):
            return Digest(with_seal.hexdigest(), None)
        without_seal.update(ending[SEAL_BYTES:])
        return Digest(with_seal.hexdigest(), without_seal.digest() == ending[len(MAGIC) : SEAL_BYTES])


def _footer_start(file: BinaryIO) -> int:
    """Return where the footer begins, by its length in the last 8 bytes; the file's end if that is impossible."""
    size = file.seek(0, io.SEEK_END)
    if size < 12:
        return size
    file.seek(size - 8)
    length = int.from_bytes(file.read(4), "little") + 8
    return size - length if length <= size else size


def _digest_until(file: BinaryIO, end: int) -> Any:
    """Return the sha256 object of the first ``end`` bytes, and leave the file positioned at ``end``."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while (left := end - file.tell()) > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
        sha256.update(chunk)
    return sha256
