"""A cache -> rows and arrays. Refuses what does not match, and numbers that cannot be; every read verifies page checksums. No torch.

A shard is opened once it is proved to be what was written (integrity.py); of a remote one, what is read is checked by
its pages and by the numbers themselves.

Rounding moves a position's total by up to 1.4%: this module, and nothing else, scales each position's candidates so
that they sum to 1 - exp(tail). Then a KL is 0 at a perfect student, and q - p is its gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import integrity, manifest, sparsify
from kdcache.cache.candidates import Candidates
from kdcache.cache.layout import split_of_shard
from kdcache.cache.sparsify import Policy
from kdcache.errors import KDError, first_line
from kdcache.storage import Location

TENSOR_COLUMNS = (
    *("sample_id", "prompt_ids", "completion_ids", "completion_mask"),
    *("candidate_ids", "candidate_logprobs", "tail_logprobs"),
)

#: What ``Cache.read`` brings besides, where it is asked for.
TOKEN_COLUMNS = ("token_logprobs", "token_ranks", "entropies")

#: Rounding may lift the logarithm of a mass of 1 a little.
MAX_LOGPROB = 1e-3


def _nothing() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class Sample:
    """One sample's arrays: P prompt tokens, T completion tokens, N candidates in all."""

    sample_id: str
    prompt_ids: np.ndarray  # [P] int32
    completion_ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool
    candidates: Candidates  # at T positions; the probabilities of each sum to 1 - exp(tail)
    # Empty unless the column was asked for:
    token_logprobs: np.ndarray = field(default_factory=_nothing)  # [T] float32, nats
    token_ranks: np.ndarray = field(default_factory=_nothing)  # [T] int32, 1 is best
    entropies: np.ndarray = field(default_factory=_nothing)  # [T] float32, nats, as captured

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def first(self, length: int) -> Sample:
        """Return the sample with the first ``length`` tokens of its completion."""
        if length >= len(self.completion_ids):
            return self
        per_token = ("completion_ids", "supervised", *TOKEN_COLUMNS)
        cut = {name: getattr(self, name)[:length] for name in per_token}
        return replace(self, candidates=self.candidates.first(length), **cut)


class Cache:
    """An opened cache: its plan, and access to row groups. Open files are kept few, memory holds what is asked for."""

    def __init__(self, path: Location | str):
        self.path = storage.location(path)
        self.plan = manifest.read_plan(self.path)
        storage.linked_files(self.path)
        self.fingerprint: str = self.plan["fingerprint"]
        fields = self.plan["fields"]
        self.policy: Policy = sparsify.parse(fields["sparsify"], fields["capture_k"])
        self._files = storage.files(self.path / "data")
        self._proved: set[str] = set()  # splits
        self._row_groups: dict[str, list[int]] = {}
        missing = [s["name"] for s in self.plan["shards"] if s["name"].removeprefix("data/") not in self._files]
        if missing:
            raise KDError(
                f"{self.path} is not complete: {len(missing)} of {len(self.plan['shards'])} shards are missing (the first is "
                f"{missing[0]}); run the same kd cache-teacher command again to fill them"
            )

    def row_groups(self, file: str) -> list[int]:
        """Rows of each row group of a shard."""
        if file not in self._row_groups:
            with self._open(file) as shard:
                self._row_groups[file] = _row_groups(shard)
        return self._row_groups[file]

    def lengths(self, split: str) -> tuple[list[str], np.ndarray]:
        """The samples of a split, in file order, without SQL.

        Returns the files that hold some, and an int64 table [n, 4]: index of the file, row in it, prompt tokens,
        completion tokens.
        """
        self._prove(split)
        names = sorted(s["name"].removeprefix("data/") for s in self.plan["shards"])
        with ThreadPoolExecutor(8) as pool:
            parts = list(
                pool.map(partial(self._lengths, split=split), [n for n in names if split_of_shard(n) == split])
            )
        parts = [(name, part) for name, part in parts if len(part)]
        columns = [
            np.column_stack([np.full(len(part), number), np.arange(len(part)), part])
            for number, (_, part) in enumerate(parts)
        ]
        return [name for name, _ in parts], np.concatenate(columns) if columns else np.zeros((0, 4), np.int64)

    def _lengths(self, file: str, split: str) -> tuple[str, np.ndarray]:
        """int64 [n, 2]: prompt and completion tokens of each row of a shard."""
        with self._reading(file), self._open(file) as shard:
            self._row_groups[file] = _row_groups(shard)
            if not shard.num_row_groups:
                return file, np.zeros((0, 2), np.int64)
            table = shard.read(columns=["split", "prompt_tokens", "completion_tokens"], use_threads=False)
            if table["split"].unique().to_pylist() != [split]:
                raise ValueError(f"it has rows whose split is not {split}")
            lengths = [table[name].to_numpy() for name in ("prompt_tokens", "completion_tokens")]
            return file, np.column_stack(lengths).astype(np.int64, copy=False)

    def read(self, file: str, row_group: int, rows: Sequence[int], columns: Sequence[str] = ()) -> list[Sample]:
        """Return the samples at ``rows`` of a row group, in that order; ``columns`` are of TOKEN_COLUMNS."""
        table = self.table(file, row_group, (*TENSOR_COLUMNS, *columns))
        with self._reading(file):
            return _samples(table, rows)

    def table(self, file: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """``columns`` of a row group as they are stored; a column that the shard lacks is left out."""
        with self._reading(file), self._open(file, row_group) as shard:
            return shard.read_row_group(row_group, columns=list(columns), use_threads=False)

    def vocabulary(self, column: str) -> pa.ChunkedArray:
        """One column of vocab.parquet: a value for each token id."""
        integrity.check_table(self.path, integrity.VOCAB_FILE)
        path = self.path / integrity.VOCAB_FILE
        try:
            return pq.read_table(storage.opened(path), columns=[column], page_checksum_verification=True)[column]
        except integrity.UNREADABLE as error:
            raise KDError(f"{path} is damaged ({first_line(error)}); {manifest.WAY_OUT}", 3) from None

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        """Whatever reading a shard may raise is a sentence."""
        try:
            yield
        except KDError:
            raise
        except integrity.UNREADABLE as error:
            path = self.path / "data" / file
            raise KDError(f"{path} is damaged ({first_line(error)}); {manifest.WAY_OUT}", 3) from None

    def prefetch(self, file: str, row_group: int) -> None:
        """Begin to fetch, of a remote cache, what will be read soon."""
        storage.prefetch(self._files[file], row_group)

    def wait(self, file: str, row_group: int) -> None:
        """Wait for another process of this machine to fetch it."""
        storage.wait(self._files[file], row_group)

    def _prove(self, split: str) -> None:
        """Once: the shards of a split are what was written."""
        if split not in self._proved:
            integrity.readable_shards(self.path, split)
            self._proved.add(split)

    def _open(self, file: str, row_group: int | None = None) -> pq.ParquetFile:
        self._prove(split_of_shard(file))
        with self._reading(file):
            path = self._files.get(file, self.path / "data" / file)
            shard = storage.parquet(path, row_group)
            metadata = integrity.shard_metadata(shard)
            if metadata.get("fingerprint") != self.fingerprint:
                shard.close()
                found = metadata.get("fingerprint")
                raise KDError(f"{path} belongs to another cache (fingerprint {found}, expected {self.fingerprint})", 3)
            return shard


def _row_groups(shard: pq.ParquetFile) -> list[int]:
    return [shard.metadata.row_group(g).num_rows for g in range(shard.metadata.num_row_groups)]


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
    tail_offsets, tails = ragged("tail_logprobs", np.float32)
    inner, inner_logprobs = columns["candidate_ids"].values, columns["candidate_logprobs"].values
    candidate_offsets = inner.offsets.to_numpy()
    candidate_ids = _values(inner.values, np.int32)
    logprobs = _values(inner_logprobs.values, np.float32)
    sample_ids, masks = columns["sample_id"].to_pylist(), columns["completion_mask"]
    lists = [
        tail_offsets,
        columns["candidate_ids"].offsets.to_numpy(),
        columns["candidate_logprobs"].offsets.to_numpy(),
    ]
    per_token: dict[str, np.ndarray] = {}
    for name in TOKEN_COLUMNS:
        if name in columns:
            token_offsets, per_token[name] = ragged(name, np.int32 if name == "token_ranks" else np.float32)
            lists.append(token_offsets)
    if not all(np.array_equal(offsets, other) for other in lists) or not np.array_equal(
        candidate_offsets, inner_logprobs.offsets.to_numpy()
    ):
        raise ValueError("its lists are not equally long")
    if min(ids.min(initial=0) for ids in (prompt_ids, completion_ids, candidate_ids)) < 0:
        raise ValueError("it has token ids below 0")
    counts = np.diff(candidate_offsets).astype(np.int32, copy=False)
    _refuse(sample_ids, offsets, np.flatnonzero(~(tails <= MAX_LOGPROB)), "a tail that is no log-probability")
    logprobs = normalise(logprobs, counts, tails)
    if not np.isfinite(logprobs).all():
        positions = np.searchsorted(candidate_offsets, np.flatnonzero(~np.isfinite(logprobs)), side="right") - 1
        _refuse(sample_ids, offsets, positions, "a candidate whose log-probability is not finite")
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
                candidates=Candidates(
                    candidate_ids[low:high], logprobs[low:high], counts[first:last], tails[first:last]
                ),
                **{name: values[first:last] for name, values in per_token.items()},
            )
        )
    return found


def _refuse(sample_ids: Sequence[str], offsets: np.ndarray, positions: np.ndarray, what: str) -> None:
    """ValueError for the first of ``positions``, which count over all samples."""
    if len(positions):
        row = int(np.searchsorted(offsets, positions[0], side="right")) - 1
        raise ValueError(f"sample {sample_ids[row]} has, at position {positions[0] - offsets[row]}, {what}")


def normalise(logprobs: np.ndarray, counts: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Flat candidates [N] of T positions, shifted so that each position sums to 1 - exp(tail), in float32."""
    if not len(logprobs):
        return logprobs
    starts = np.cumsum(counts) - counts
    nonempty = counts > 0
    with np.errstate(over="ignore"):
        found = np.exp(logprobs)
    totals = np.add.reduceat(found, starts[nonempty])
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log1p(-np.exp(tails[nonempty])) - np.log(totals)
        return np.add(logprobs, np.repeat(shift, counts[nonempty]), out=found)  # the buffer of the exponentials again


def entropy_unstored(sample: Sample) -> np.ndarray:
    """By supervised position of a sample with entropies: the entropy captured, less that of the candidates stored; nats.

    A threshold cache keeps an unlikely token seldom, and then with probability TAU: right for the cross-entropy between teacher
    and student, and too little entropy of the teacher's own. Its KL would be too high by this, whoever the student is.
    """
    candidates = sample.candidates
    position = np.repeat(np.arange(len(candidates)), candidates.counts)
    p = np.exp(candidates.logprobs.astype(np.float64))
    tail = np.exp(candidates.tails.astype(np.float64))
    tails = np.where(tail > 0, -tail * np.log(np.maximum(tail, 1e-30)), 0.0)
    stored = np.bincount(position, -p * candidates.logprobs, minlength=len(candidates)) + tails
    return (np.array(sample.entropies, dtype=np.float64) - stored)[sample.supervised]
