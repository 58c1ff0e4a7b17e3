"""A cache -> rows and arrays. Refuses what does not match; every read verifies page checksums. No torch.

Rounding moves a position's total by up to 1.4%: this module, and nothing else, scales each position's candidates so
that they sum to 1 - exp(tail). Then a KL is 0 at a perfect student, and q - p is its gradient.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import manifest, storage
from kdcache.errors import KDError
from kdcache.storage import Location

TENSOR_COLUMNS = (
    *("sample_id", "prompt_ids", "completion_ids", "completion_mask"),
    *("candidate_ids", "candidate_logprobs", "tail_logprobs"),
)


@dataclass(frozen=True)
class Sample:
    """One sample's arrays: P prompt tokens, T completion tokens, N candidates in all."""

    sample_id: str
    prompt_ids: np.ndarray  # [P] int32
    completion_ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool
    counts: np.ndarray  # [T] int32: candidates of each position
    candidate_ids: np.ndarray  # [N] int32
    candidate_logprobs: np.ndarray  # [N] float32; each position sums to 1 - exp(tail)
    tail_logprobs: np.ndarray  # [T] float32

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def first(self, length: int) -> Sample:
        """The sample with the first ``length`` tokens of its completion."""
        if length >= len(self.completion_ids):
            return self
        candidates = int(self.counts[:length].sum())
        return replace(
            self,
            completion_ids=self.completion_ids[:length],
            supervised=self.supervised[:length],
            counts=self.counts[:length],
            candidate_ids=self.candidate_ids[:candidates],
            candidate_logprobs=self.candidate_logprobs[:candidates],
            tail_logprobs=self.tail_logprobs[:length],
        )


class Cache:
    """An opened cache: its plan, and access to row groups. Open files are kept few, memory holds what is asked for."""

    def __init__(self, path: Location | str):
        self.path = storage.location(path)
        self.plan = manifest.read_plan(self.path)
        storage.linked_files(self.path)
        self.fingerprint: str = self.plan["fingerprint"]
        self._files = storage.files(self.path / "data")
        missing = [s["name"] for s in self.plan["shards"] if s["name"].removeprefix("data/") not in self._files]
        if missing:
            raise KDError(
                f"{self.path} is not complete: {len(missing)} of {len(self.plan['shards'])} shards are missing (the first is "
                f"{missing[0]}); run the same kd cache-teacher command again to fill them"
            )

    def row_groups(self, file: str) -> list[int]:
        """Rows of each row group of a shard."""
        with self._open(file) as shard:
            return [shard.metadata.row_group(g).num_rows for g in range(shard.metadata.num_row_groups)]

    def read(self, file: str, row_group: int, rows: Sequence[int]) -> list[Sample]:
        """The samples at ``rows`` of a row group, in that order."""
        return _samples(self.table(file, row_group, TENSOR_COLUMNS), rows)

    def table(self, file: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """``columns`` of a row group as they are stored; a column that the shard lacks is left out."""
        try:
            with self._open(file, row_group) as shard:
                return shard.read_row_group(row_group, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise KDError(f"{self.path / 'data' / file} is damaged ({error}); {manifest.WAY_OUT}", 3) from None

    def prefetch(self, file: str, row_group: int) -> None:
        """Begin to fetch, of a remote cache, what will be read soon."""
        storage.prefetch(self._files[file], row_group)

    def expect(self, file: str, row_group: int) -> None:
        """Wait for another process of this machine to fetch it."""
        storage.expect(self._files[file], row_group)

    def _open(self, file: str, row_group: int | None = None) -> pq.ParquetFile:
        path = self._files.get(file, self.path / "data" / file)
        shard = storage.parquet(path, row_group)
        found = json.loads((shard.schema_arrow.metadata or {}).get(b"kdcache", b"{}")).get("fingerprint")
        if found != self.fingerprint:
            shard.close()
            raise KDError(f"{path} belongs to another cache (fingerprint {found}, expected {self.fingerprint})", 3)
        return shard


def _values(array: Any, dtype: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(dtype, copy=False)


def _samples(table: pa.Table, rows: Sequence[int]) -> list[Sample]:
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    columns = {n: c.chunk(0) if isinstance(c, pa.ChunkedArray) else c for n, c in columns.items()}

    def ragged(name: str, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        column = columns[name]
        return column.offsets.to_numpy(), _values(column.values, dtype)

    prompt_offsets, prompt_ids = ragged("prompt_ids", np.int32)
    offsets, completion_ids = ragged("completion_ids", np.int32)
    _, tails = ragged("tail_logprobs", np.float32)
    inner = columns["candidate_ids"].values
    candidate_offsets = inner.offsets.to_numpy()
    candidate_ids = _values(inner.values, np.int32)
    logprobs = _values(columns["candidate_logprobs"].values.values, np.float32)
    counts = np.diff(candidate_offsets).astype(np.int32, copy=False)
    logprobs = normalise(logprobs, counts, tails)
    sample_ids, masks = columns["sample_id"].to_pylist(), columns["completion_mask"]
    all_supervised = np.ones(len(completion_ids), bool)

    found = []
    for row in rows:
        first, last = offsets[row], offsets[row + 1]
        low, high = candidate_offsets[first], candidate_offsets[last]
        mask = masks[row].as_py() if masks.null_count < len(masks) else None
        found.append(
            Sample(
                sample_id=sample_ids[row],
                prompt_ids=prompt_ids[prompt_offsets[row] : prompt_offsets[row + 1]],
                completion_ids=completion_ids[first:last],
                supervised=all_supervised[first:last] if mask is None else np.array(mask, bool),
                counts=counts[first:last],
                candidate_ids=candidate_ids[low:high],
                candidate_logprobs=logprobs[low:high],
                tail_logprobs=tails[first:last],
            )
        )
    return found


def normalise(logprobs: np.ndarray, counts: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Flat candidates [N] of T positions, shifted so that each position sums to 1 - exp(tail), in float32."""
    if not len(logprobs):
        return logprobs
    starts = np.cumsum(counts) - counts
    nonempty = counts > 0
    found = np.exp(logprobs)
    totals = np.add.reduceat(found, starts[nonempty])
    with np.errstate(divide="ignore"):
        shift = np.log1p(-np.exp(tails[nonempty])) - np.log(totals)
    return np.add(logprobs, np.repeat(shift, counts[nonempty]), out=found)  # the buffer of the exponentials again


def entropy_unstored(sample: Sample, captured: Sequence[float] | np.ndarray) -> np.ndarray:
    """By supervised position: the entropy captured, less that of the candidates stored; nats.

    A threshold cache keeps an unlikely token seldom, and then with probability TAU: right for the cross-entropy between teacher
    and student, and too little entropy of the teacher's own. Its KL would be too high by this, for every student alike.
    """
    position = np.repeat(np.arange(len(sample.counts)), sample.counts)
    p = np.exp(sample.candidate_logprobs.astype(np.float64))
    tail = np.exp(sample.tail_logprobs.astype(np.float64))
    tails = np.where(tail > 0, -tail * np.log(np.maximum(tail, 1e-30)), 0.0)
    stored = np.bincount(position, -p * sample.candidate_logprobs, minlength=len(sample.counts)) + tails
    return (np.array(captured, dtype=np.float64) - stored)[sample.supervised]
