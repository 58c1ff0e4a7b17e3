"""Write rows as whole shards. Invariant: a file under a final name is complete, sealed, and never changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache.candidates import concatenate
from kdcache.cache.format import SCHEMA, CacheRow, parquet_options, round_half, round_logprobs
from kdcache.errors import KDError
from kdcache.storage import Location, atomic, seal

#: Rows per row group: what a trainer holds in memory at a time.
ROW_GROUP_ROWS = 128


def _list_array(counts: Sequence[int] | np.ndarray, values: pa.Array) -> pa.ListArray:
    """Cut flat values into lists of ``counts`` entries each."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise KDError("a shard would hold more than 2^31 candidates; use a smaller --rows-per-shard")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _joined(arrays: Sequence[Any], dtype: type) -> pa.ListArray:
    """Return one list per array, as a column."""
    return _list_array(
        [len(array) for array in arrays], pa.array(np.concatenate([np.asarray(a, dtype) for a in arrays]))
    )


def rows_to_table(rows: Sequence[CacheRow], precision: str) -> pa.Table:
    """Return the Arrow table of one row group, rounded to ``q8`` (codebook and half precision) or exact (``f32``)."""
    exact = precision == "f32"
    half = (lambda values: values.astype(np.float32)) if exact else round_half
    lengths = [row.completion_tokens for row in rows]
    candidates = concatenate([row.candidates for row in rows])
    logprobs = candidates.logprobs.astype(np.float32) if exact else round_logprobs(candidates.logprobs)

    def nested(values: np.ndarray, dtype: type) -> pa.ListArray:
        """[T, K] lists of the rows' candidates."""
        return _list_array(lengths, _list_array(candidates.counts, pa.array(values.astype(dtype))))

    columns: dict[str, pa.Array] = {
        "completion_mask": pa.array([row.completion_mask for row in rows], type=pa.list_(pa.bool_())),
        "prompt_ids": _joined([row.prompt_ids for row in rows], np.int32),
        "completion_ids": _joined([row.completion_ids for row in rows], np.int32),
        "token_ranks": _joined([row.token_ranks for row in rows], np.int32),
        "token_logprobs": _joined([half(row.token_logprobs) for row in rows], np.float32),
        "entropies": _joined([half(row.entropies) for row in rows], np.float32),
        "tail_logprobs": _list_array(lengths, pa.array(half(candidates.tails).astype(np.float32))),
        "candidate_ids": nested(candidates.ids, np.int32),
        "candidate_logprobs": nested(logprobs, np.float32),
    }
    for column in SCHEMA:
        if not pa.types.is_list(column.type):  # text and numbers: one value per row
            columns[column.name] = pa.array([getattr(row, column.name) for row in rows], type=column.type)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def write_shard(path: Location, rows: Sequence[CacheRow], precision: str, metadata: dict[str, Any]) -> bool:
    """Write one shard as a whole, and return whether it got its name.

    On a disk the file is written beside its final name, synced, and linked into place; in a store it is one upload.
    False means that another writer's shard already has the name: that one is kept and this one is discarded.
    A shard whose rows were all rejected has no row group, because an empty one breaks ``load_dataset``. The shard's own
    name is added to ``metadata``, so that a shard that was moved to another name is noticed.
    """
    metadata = metadata | {"name": f"data/{path.name}"}
    schema = SCHEMA.with_metadata({b"kdcache": json.dumps(metadata, ensure_ascii=False).encode()})
    tables = (
        rows_to_table(rows[start : start + ROW_GROUP_ROWS], precision) for start in range(0, len(rows), ROW_GROUP_ROWS)
    )
    with storage.staged(path) as temporary:
        _write_sealed(temporary, schema, tables, parquet_options(precision))
        return storage.create(temporary, path)


def _write_sealed(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], options: dict[str, Any]) -> None:
    """Write a Parquet file with its seal, and sync it to the disk."""
    with open(path, "w+b") as sink:
        with pq.ParquetWriter(sink, schema, **options) as writer:
            for table in tables:
                writer.write_table(table)
        seal.seal(sink)
        sink.flush()
        os.fsync(sink.fileno())


def write_table(path: Location, table: pa.Table) -> None:
    """Replace a small Parquet file (vocabulary or rewards) as a whole, with its seal."""
    with atomic.replacing(path) as temporary:
        _write_sealed(temporary, table.schema, [table], {"compression": "zstd", "write_page_checksum": True})
