"""Rows -> whole shards, atomically. Invariant: a file under a final name is complete, checksummed and never changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache.candidates import Candidates
from kdcache.cache.format import SCHEMA, parquet_options, round_half, round_logprobs
from kdcache.errors import KDError
from kdcache.storage import Location, atomic, seal

#: Rows a row group: what a trainer holds in memory at a time.
ROW_GROUP_ROWS = 128


@dataclass(frozen=True)
class Row:
    """One sample, ready to be written. ``fields`` holds the columns that are not per-token arrays."""

    fields: dict[str, Any]
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]  # T of them
    token_logprobs: np.ndarray  # [T] float32
    token_ranks: np.ndarray  # [T] int32
    entropies: np.ndarray  # [T] float32
    candidates: Candidates


def _list_array(counts: Sequence[int] | np.ndarray, values: pa.Array) -> pa.ListArray:
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise KDError("a shard would hold more than 2^31 candidates; use a smaller --rows-per-shard")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _concatenate(arrays: Sequence[Any], dtype: type) -> pa.Array:
    return pa.array(np.concatenate([np.asarray(a, dtype=dtype) for a in arrays]))


def rows_to_table(rows: Sequence[Row], precision: str) -> pa.Table:
    """The Arrow table of one row group's rows, rounded as ``precision`` says."""
    exact = precision == "f32"
    half = (lambda v: v.astype(np.float32)) if exact else round_half
    lengths = [len(r.completion_ids) for r in rows]
    columns: dict[str, pa.Array] = {}
    for name in SCHEMA.names:
        kind = SCHEMA.field(name).type
        if not pa.types.is_list(kind):
            columns[name] = pa.array([r.fields.get(name) for r in rows], type=kind)
    columns["prompt_tokens"] = pa.array([len(r.prompt_ids) for r in rows], type=pa.int32())
    columns["completion_tokens"] = pa.array(lengths, type=pa.int32())
    columns["completion_mask"] = pa.array([r.fields.get("completion_mask") for r in rows], type=pa.list_(pa.bool_()))
    columns["prompt_ids"] = _list_array(
        [len(r.prompt_ids) for r in rows], _concatenate([r.prompt_ids for r in rows], np.int32)
    )
    for name in ("completion_ids", "token_ranks"):
        columns[name] = _list_array(lengths, _concatenate([getattr(r, name) for r in rows], np.int32))
    for name in ("token_logprobs", "entropies"):
        values = _concatenate([half(getattr(r, name)) for r in rows], np.float32)
        columns[name] = _list_array(lengths, values)
    columns["tail_logprobs"] = _list_array(lengths, _concatenate([half(r.candidates.tails) for r in rows], np.float32))
    counts = np.concatenate([r.candidates.counts for r in rows])
    logprobs = np.concatenate([r.candidates.logprobs for r in rows])
    ids = _concatenate([r.candidates.ids for r in rows], np.int32)
    values = pa.array(logprobs.astype(np.float32) if exact else round_logprobs(logprobs))
    columns["candidate_ids"] = _list_array(lengths, _list_array(counts, ids))
    columns["candidate_logprobs"] = _list_array(lengths, _list_array(counts, values))
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def write_shard(path: Location, rows: Sequence[Row], precision: str, metadata: dict[str, Any]) -> bool:
    """Write one shard whole: beside its name, fsync, link into place, fsync the folder; or as one upload.

    A shard whose rows were all rejected has no row group at all (an empty one breaks ``load_dataset``). The shard says its own
    name in ``metadata``, so that one that stands under another's is noticed.
    Returns False when another writer's shard of the same slice got there first; that one stands.
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
    """Write a Parquet file that carries its own seal, and sync it."""
    with open(path, "w+b") as sink:
        with pq.ParquetWriter(sink, schema, **options) as writer:
            for table in tables:
                writer.write_table(table)
        seal.seal(sink)
        sink.flush()
        os.fsync(sink.fileno())


def write_table(path: Location, table: pa.Table) -> None:
    """Write a small Parquet file (vocab, rewards) atomically, with its seal."""
    with atomic.replacing(path) as temporary:
        _write_sealed(temporary, table.schema, [table], {"compression": "zstd", "write_page_checksum": True})
