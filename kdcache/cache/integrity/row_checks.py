"""The invariants of a row group's numbers, one function each. To add one, write it below and list it in ``CHECKS``.

A check takes a ``RowGroup`` and yields a sentence for each thing that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache import sparsify
from kdcache.cache.format import MAX_LOGPROB

#: How far candidates + tail may be from 1: what rounding does to a position's total (docs/format.md).
MASS_TOLERANCE = {"q8": 0.02, "f32": 1e-5}

TOKEN_LISTS = ("completion_ids", "token_logprobs", "token_ranks", "tail_logprobs", "entropies")
CANDIDATE_LISTS = ("candidate_ids", "candidate_logprobs")


@dataclass
class RowGroup:
    """One row group, its lists laid end to end: R rows, T completion positions and N candidates in all of them.

    ::

        row         0                   1
        position    0       1     2     3     4          a row has completion_tokens of them
        candidate   0 1 2   3 4   5 6   7 8   9 10 11    a position has ``counts`` of them
        starts      ^       ^     ^     ^     ^
    """

    table: pa.Table  # with the columns of the format
    split: str  # that its shard is named after
    vocab_size: int
    metadata: dict[str, Any]  # of its shard
    _flat: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def columns(self) -> dict[str, Any]:
        """The Arrow array of each column."""
        return {name: self.table[name].combine_chunks() for name in self.table.column_names}

    def flat(self, name: str) -> np.ndarray:
        """Return the values of a list column in one array: [T] of a list per row, [N] of a list per position."""
        if name not in self._flat:
            values = self.columns[name].flatten()
            if name in CANDIDATE_LISTS:
                values = values.flatten()
            self._flat[name] = values.to_numpy(zero_copy_only=False)
        return self._flat[name]

    @cached_property
    def counts(self) -> np.ndarray:
        """[T]: the number of candidates of each position."""
        return _lengths(self.columns["candidate_ids"].flatten())

    @cached_property
    def starts(self) -> np.ndarray:
        """[T]: the index of each position's first candidate."""
        return np.cumsum(self.counts) - self.counts


def _lengths(lists: Any) -> np.ndarray:
    """Return the length of each list of an Arrow array."""
    return np.diff(lists.offsets.to_numpy())


def row_problems(rows: RowGroup) -> Iterator[str]:
    """Yield what is wrong with a row group, in words; stop after a failed check that later ones rely on."""
    for check in CHECKS:
        failed = False
        for problem in check(rows):
            failed = True
            yield problem
        if failed and check in RELIED_UPON:
            return


# --- the checks -------------------------------------------------------------------------------------------------------


def every_row_is_in_the_split(rows: RowGroup) -> Iterator[str]:
    if any(split != rows.split for split in rows.columns["split"].to_pylist()):
        yield f"it has rows whose split is not {rows.split}"


def lists_are_as_long_as_their_row_says(rows: RowGroup) -> Iterator[str]:
    prompt_tokens, completion_tokens = (rows.columns[f"{name}_tokens"].to_numpy() for name in ("prompt", "completion"))
    lengths = {"prompt_ids": prompt_tokens} | dict.fromkeys((*TOKEN_LISTS, *CANDIDATE_LISTS), completion_tokens)
    for name, expected in lengths.items():
        column = rows.columns[name]
        if column.null_count or not np.array_equal(_lengths(column), expected):
            yield f"{name} is not as long as its row says"
            return


def candidates_have_ids_and_logprobs(rows: RowGroup) -> Iterator[str]:
    if not np.array_equal(rows.counts, _lengths(rows.columns["candidate_logprobs"].flatten())):
        yield "candidate_ids and candidate_logprobs are not equally long"


def ids_are_in_the_vocabulary(rows: RowGroup) -> Iterator[str]:
    for name in ("prompt_ids", "completion_ids", "candidate_ids"):
        outside = (rows.flat(name) < 0) | (rows.flat(name) >= rows.vocab_size)
        if outside.any():
            yield f"{name} has {outside.sum()} ids outside the vocabulary of {rows.vocab_size}"
            return


def no_position_is_empty(rows: RowGroup) -> Iterator[str]:
    if (rows.counts < 1).any():
        yield f"{(rows.counts < 1).sum()} positions without a candidate"


def values_are_finite(rows: RowGroup) -> Iterator[str]:
    for name in ("token_logprobs", "candidate_logprobs", "entropies"):
        if not np.isfinite(rows.flat(name)).all():
            yield f"{name} has values that are not finite"


def logprobs_are_not_above_zero(rows: RowGroup) -> Iterator[str]:
    for name in ("token_logprobs", "candidate_logprobs", "tail_logprobs"):
        if not (rows.flat(name) <= MAX_LOGPROB).all():  # in this form it finds NaN too
            yield f"{name} has values that are no log-probabilities"


def ranks_start_at_one(rows: RowGroup) -> Iterator[str]:
    if (rows.flat("token_ranks") < 1).any():
        yield "token_ranks has ranks below 1"


def entropies_are_not_negative(rows: RowGroup) -> Iterator[str]:
    if (rows.flat("entropies") < 0).any():
        yield "entropies has negative values"


def candidates_are_sorted_best_first(rows: RowGroup) -> Iterator[str]:
    logprobs = rows.flat("candidate_logprobs")
    is_first = np.zeros(len(logprobs), bool)  # of its position: it may be above the candidate before it
    is_first[rows.starts] = True
    rising = (np.diff(logprobs) > 0) & ~is_first[1:]
    if rising.any():
        yield f"{rising.sum()} candidates are not sorted, best first"


def no_candidate_stands_twice(rows: RowGroup) -> Iterator[str]:
    positions = np.repeat(np.arange(len(rows.counts)), rows.counts)
    keys = positions * rows.vocab_size + rows.flat("candidate_ids")  # one number per pair of position and token
    repeated = len(keys) - len(np.unique(keys))
    if repeated:
        yield f"{repeated} candidates are repeated at their position"


def candidates_and_tail_sum_to_one(rows: RowGroup) -> Iterator[str]:
    policy = sparsify.parse(rows.metadata["sparsify"])
    tolerance = MASS_TOLERANCE[rows.metadata["precision"]] + policy.mass_error
    masses = np.add.reduceat(np.exp(rows.flat("candidate_logprobs").astype(np.float64)), rows.starts)  # [T]
    wrong = np.abs(masses + np.exp(rows.flat("tail_logprobs").astype(np.float64)) - 1) > tolerance
    if wrong.any():
        yield f"{wrong.sum()} positions whose candidates and tail do not sum to 1 within {tolerance:g}"


Check = Callable[[RowGroup], Iterator[str]]

#: All checks, in this order.
CHECKS: tuple[Check, ...] = (
    every_row_is_in_the_split,
    lists_are_as_long_as_their_row_says,
    candidates_have_ids_and_logprobs,
    ids_are_in_the_vocabulary,
    no_position_is_empty,
    values_are_finite,
    logprobs_are_not_above_zero,
    ranks_start_at_one,
    entropies_are_not_negative,
    candidates_are_sorted_best_first,
    no_candidate_stands_twice,
    candidates_and_tail_sum_to_one,
)

#: Where one of these fails, those after it would look at the wrong numbers: they are skipped.
RELIED_UPON = (
    lists_are_as_long_as_their_row_says,
    candidates_have_ids_and_logprobs,
    ids_are_in_the_vocabulary,
    no_position_is_empty,
)
