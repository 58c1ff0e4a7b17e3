"""The arrays of one sample, unpacked from a row group. Pure numpy.

Invariant: at every position the candidates' probabilities sum to 1 - exp(tail). Rounding moves a position's total by up
to 1.4%, and this module, nothing else, scales it back. Then a KL is 0 at a perfect student, and q - p is its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache.candidates import Candidates
from kdcache.cache.format import MAX_LOGPROB

#: The columns that every ``Sample`` is made of.
TENSOR_COLUMNS = (
    *("sample_id", "prompt_ids", "completion_ids", "completion_mask"),
    *("candidate_ids", "candidate_logprobs", "tail_logprobs"),
)

#: The columns of one value per completion token that a ``Sample`` holds only on request.
TOKEN_COLUMNS = ("token_logprobs", "token_ranks", "entropies")


def _no_values() -> np.ndarray:
    return np.zeros(0, np.float32)


@dataclass(frozen=True)
class Sample:
    """One sample's arrays: P prompt tokens and T completion tokens."""

    sample_id: str
    prompt_ids: np.ndarray  # [P] int32
    completion_ids: np.ndarray  # [T] int32
    supervised: np.ndarray  # [T] bool
    candidates: Candidates  # at T positions
    # TOKEN_COLUMNS, each empty unless it was requested:
    token_logprobs: np.ndarray = field(default_factory=_no_values)  # [T] float32, nats
    token_ranks: np.ndarray = field(default_factory=_no_values)  # [T] int32, 1 is best
    entropies: np.ndarray = field(default_factory=_no_values)  # [T] float32, nats, as captured

    @property
    def tokens(self) -> int:
        """The number of tokens in prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)

    def first(self, length: int) -> Sample:
        """Return the sample with the first ``length`` tokens of its completion."""
        if length >= len(self.completion_ids):
            return self
        per_token = ("completion_ids", "supervised", *TOKEN_COLUMNS)
        cut = {name: getattr(self, name)[:length] for name in per_token}
        return replace(self, candidates=self.candidates.first(length), **cut)


def unpack(table: pa.Table, rows: Sequence[int]) -> list[Sample]:
    """Return the samples at ``rows`` of a row group that holds TENSOR_COLUMNS, and TOKEN_COLUMNS on request.

    ValueError for lists of unequal length and for numbers that no teacher can have given, with sample and position.
    """
    # A row group is unpacked once: every list column becomes one flat array and the offsets of its rows, and a sample
    # is a slice of these. Candidates are lists of lists:
    #   prompt_offsets     row      -> prompt token
    #   offsets            row      -> completion token (position), for all columns of one value per position
    #   candidate_offsets  position -> candidate
    columns = {name: _one_chunk(table[name]) for name in table.column_names}
    prompt_offsets, prompt_ids = _ragged(columns["prompt_ids"], np.int32)
    offsets, completion_ids = _ragged(columns["completion_ids"], np.int32)
    tail_offsets, tails = _ragged(columns["tail_logprobs"], np.float32)
    candidate_offsets, candidate_ids = _ragged(columns["candidate_ids"].values, np.int32)
    logprob_offsets, logprobs = _ragged(columns["candidate_logprobs"].values, np.float32)
    position_offsets = [
        tail_offsets,
        *(columns[f"candidate_{name}"].offsets.to_numpy() for name in ("ids", "logprobs")),
    ]
    per_token: dict[str, np.ndarray] = {}
    for name in TOKEN_COLUMNS:
        if name in columns:
            token_offsets, per_token[name] = _ragged(columns[name], np.int32 if name == "token_ranks" else np.float32)
            position_offsets.append(token_offsets)
    equal = all(np.array_equal(offsets, others) for others in position_offsets)
    if not equal or not np.array_equal(candidate_offsets, logprob_offsets):
        raise ValueError("its lists are not equally long")
    if min(ids.min(initial=0) for ids in (prompt_ids, completion_ids, candidate_ids)) < 0:
        raise ValueError("it has token ids below 0")

    counts = np.diff(candidate_offsets).astype(np.int32, copy=False)
    sample_ids, masks = columns["sample_id"].to_pylist(), columns["completion_mask"]
    # Not ``tails > MAX_LOGPROB``: NaN must be refused too.
    _refuse(sample_ids, offsets, np.flatnonzero(~(tails <= MAX_LOGPROB)), "a tail that is no log-probability")
    logprobs = normalise(logprobs, counts, tails)
    if not np.isfinite(logprobs).all():
        positions = np.searchsorted(candidate_offsets, np.flatnonzero(~np.isfinite(logprobs)), side="right") - 1
        _refuse(sample_ids, offsets, positions, "a candidate whose log-probability is not finite")

    samples = []
    all_supervised = np.ones(len(completion_ids), bool)
    for row in rows:
        first, last = offsets[row], offsets[row + 1]
        low, high = candidate_offsets[first], candidate_offsets[last]
        mask = masks[row].as_py() if masks.null_count < len(masks) else None
        samples.append(
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
    return samples


def _one_chunk(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _ragged(lists: Any, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets [L+1] of an Arrow array of L lists, and all their values in one array."""
    values = lists.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return lists.offsets.to_numpy(), values


def _refuse(sample_ids: Sequence[str], offsets: np.ndarray, positions: np.ndarray, problem: str) -> None:
    """Raise ValueError for the first of ``positions``, which count over all samples; nothing if there is none."""
    if len(positions):
        row = int(np.searchsorted(offsets, positions[0], side="right")) - 1
        raise ValueError(f"sample {sample_ids[row]} has, at position {positions[0] - offsets[row]}, {problem}")


def normalise(logprobs: np.ndarray, counts: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Shift flat candidates [N] of T positions so that each position sums to 1 - exp(tail), in float32."""
    if not len(logprobs):
        return logprobs
    starts = np.cumsum(counts) - counts
    nonempty = counts > 0
    with np.errstate(over="ignore"):
        probabilities = np.exp(logprobs)
    totals = np.add.reduceat(probabilities, starts[nonempty])
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.log1p(-np.exp(tails[nonempty])) - np.log(totals)
        # The buffer of the probabilities is used again: a row group can hold millions of candidates.
        return np.add(logprobs, np.repeat(shift, counts[nonempty]), out=probabilities)


def entropy_unstored(sample: Sample) -> np.ndarray:
    """Return the captured entropy less that of the stored candidates, per supervised position of a sample; nats.

    A threshold cache keeps an unlikely token seldom, and then with probability TAU: right for the cross-entropy between
    teacher and student, but too little entropy of the teacher's own. The teacher's KL to any student would be too high
    by this much. The sample must hold its entropies.
    """
    candidates = sample.candidates
    position = np.repeat(np.arange(len(candidates)), candidates.counts)
    p = np.exp(candidates.logprobs.astype(np.float64))
    tail = np.exp(candidates.tails.astype(np.float64))
    tails = np.where(tail > 0, -tail * np.log(np.maximum(tail, 1e-30)), 0.0)
    stored = np.bincount(position, -p * candidates.logprobs, minlength=len(candidates)) + tails
    return (np.array(sample.entropies, dtype=np.float64) - stored)[sample.supervised]
