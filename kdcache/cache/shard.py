"""The one way to open a shard: with page checksums on, and with one sentence for whatever a damaged file raises.

    with shard.opened(cache / "data/train-00000.parquet") as file:
        tokens = file.read(["completion_tokens"])

Invariant: whatever reads a shard with pyarrow opens it here, so that no reader forgets the checksums. DuckDB reads
shards by itself and ignores checksums: there, ``integrity.readable_shards`` comes first.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.errors import KDError, first_line
from kdcache.storage import Location

WAY_OUT = "run: kd cache verify --repair on the cache, then the same kd cache-teacher command again"

#: What reading a damaged Parquet file may raise.
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError)


class DamagedShard(KDError):
    """A Parquet file cannot be read as it was written; ``problem`` says in words what is wrong (exit 3)."""

    def __init__(self, path: Location, problem: str, way_out: str = WAY_OUT):
        super().__init__(f"{path} is damaged ({problem}); {way_out}", 3)
        self.problem = problem


@dataclass(frozen=True)
class ShardFile:
    """An open shard, and the metadata that it carries (docs/format.md); a Parquet file of another kind carries none."""

    file: pq.ParquetFile
    metadata: dict[str, Any]

    @property
    def schema(self) -> pa.Schema:
        return self.file.schema_arrow

    @property
    def row_groups(self) -> list[int]:
        """The number of rows in each row group."""
        footer = self.file.metadata
        return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read some columns of all rows."""
        return self.file.read(columns=list(columns), use_threads=False)

    def read_row_group(self, number: int, columns: Sequence[str]) -> pa.Table:
        """Read some columns of one row group; a column that the shard lacks is left out."""
        return self.file.read_row_group(number, columns=list(columns), use_threads=False)


@contextlib.contextmanager
def reading(path: Location, way_out: str = WAY_OUT) -> Iterator[None]:
    """Raise ``DamagedShard`` for whatever reading ``path`` raises, unless it is a sentence for the user already."""
    try:
        yield
    except UNREADABLE as error:
        raise DamagedShard(path, first_line(error), way_out) from None


@contextlib.contextmanager
def opened(
    path: Location, row_group: int | None = None, source: Path | io.BytesIO | None = None
) -> Iterator[ShardFile]:
    """Open a shard; an error while it is open is raised as ``DamagedShard``.

    Of a remote shard only the footer and what is read are fetched, ``row_group`` in one request. ``source`` holds the
    bytes of ``path`` where the caller has them already.
    """
    with reading(path):
        file = (
            storage.parquet(path, row_group)
            if source is None
            else pq.ParquetFile(source, page_checksum_verification=True)
        )
        with file:
            yield ShardFile(file, _metadata(file))


def _metadata(file: pq.ParquetFile) -> dict[str, Any]:
    metadata = json.loads((file.schema_arrow.metadata or {}).get(b"kdcache", b"{}"))
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    return metadata


def misplaced(metadata: Mapping[str, Any], name: str, fingerprint: str) -> str | None:
    """Say why a shard does not belong under ``name`` in the cache with this ``fingerprint``; None if it does."""
    if metadata.get("fingerprint") != fingerprint:
        return f"belongs to another cache (fingerprint {metadata.get('fingerprint')}, expected {fingerprint})"
    if metadata.get("name", name) != name:  # early shards do not carry their name
        return f"is the shard {metadata['name']}, under another name"
    return None


def column_chunks(footer: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """Return what the footer of a shard says of each column in each row group."""
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            yield footer.row_group(group).column(column)
