"""The samples of one or more caches to train or evaluate on, selected by split, SQL condition and length.

Only lengths are read here. The arrays of a sample are read when a batch needs them (``Selection.load``).

Shapes: S selected samples, n samples of one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdcache.cache import query
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError, UsageError
from kdcache.models import identity
from kdcache.storage import Location


class RowGroupKey(NamedTuple):
    """Where a row group is: the smallest piece of a shard that is fetched and decoded."""

    cache: int  # index into Selection.caches
    file: str
    number: int  # in the file


@dataclass(frozen=True)
class Selection:
    """Where the selected samples are, and how long they are. Samples of one row group are neighbours."""

    caches: tuple[Cache, ...]
    row_groups: tuple[RowGroupKey, ...]
    row_group: np.ndarray  # [S] index into row_groups
    row: np.ndarray  # [S] in the row group
    tokens: np.ndarray  # [S] prompt + completion
    completion_tokens: np.ndarray  # [S]
    too_long: int  # how many samples were longer than max_length, and therefore dropped or cut

    def __len__(self) -> int:
        return len(self.row_group)

    @property
    def remote(self) -> bool:
        """Whether row groups of any cache come over a network."""
        return any(not isinstance(cache.path, Path) for cache in self.caches)

    def prefetch(self, row_groups: np.ndarray) -> None:
        """Begin to fetch row groups that will be needed soon; ``row_groups`` are indices into self.row_groups."""
        for index in row_groups.tolist():
            cache, file, number = self.row_groups[index]
            self.caches[cache].prefetch(file, number)

    def wait(self, row_groups: np.ndarray) -> None:
        """Wait until other ranks of this node have fetched row groups. One that never arrives is fetched by ``load``."""
        for index in row_groups.tolist():
            cache, file, number = self.row_groups[index]
            self.caches[cache].wait(file, number)

    def load(self, indices: np.ndarray, columns: Sequence[str] = ()) -> list[Sample]:
        """Return samples by index, in that order, with ``columns`` of TOKEN_COLUMNS. Each row group is read once."""
        samples: dict[int, Sample] = {}
        for row_group in np.unique(self.row_group[indices]):
            members = indices[self.row_group[indices] == row_group]
            cache, file, number = self.row_groups[row_group]
            for index, sample in zip(
                members.tolist(), self.caches[cache].read(file, number, self.row[members], columns)
            ):
                samples[index] = sample.first(int(self.completion_tokens[index]))
        return [samples[index] for index in indices.tolist()]


def select(
    caches: Sequence[Cache], split: str, where: str | None = None, max_length: int | None = None, cut: bool = False
) -> Selection:
    """Select the samples of a split.

    Args:
        caches: all samples of the first cache come before those of the second.
        split: train, validation or test.
        where: an SQL condition on a sample's columns.
        max_length: in tokens, prompt and completion together. Longer samples are dropped.
        cut: cut the completions of longer samples to ``max_length`` instead, and drop only those whose prompt alone
            is that long.
    """
    row_groups: list[RowGroupKey] = []
    columns: list[np.ndarray] = []  # [n, 4] each: index into row_groups, row in it, tokens, completion tokens
    too_long = 0
    for number, cache in enumerate(caches):
        # table [n, 4] int64: index into files, row in the file, prompt tokens, completion tokens; sorted by file and
        # row. Without a condition no SQL is needed to read these columns.
        files, table = query.select_samples(cache.path, where, split) if where else cache.lengths(split)
        if max_length is not None:
            too_long += int((table[:, 2] + table[:, 3] > max_length).sum())
            table = _shorten(table, max_length, cut)
        ends = np.searchsorted(table[:, 0], np.arange(len(files) + 1))
        for file, first, last in zip(files, ends, ends[1:]):
            _, row, prompt, completion = table[first:last].T
            starts = np.concatenate(
                [[0], np.cumsum(cache.row_groups(file))]
            )  # first row of each row group, and the end
            group = np.searchsorted(starts, row, side="right") - 1
            columns.append(
                np.column_stack([len(row_groups) + group, row - starts[group], prompt + completion, completion])
            )
            row_groups.extend(RowGroupKey(number, file, group) for group in range(len(starts) - 1))
    merged = np.concatenate(columns) if columns else np.zeros((0, 4))
    row_group, row, tokens, completion_tokens = merged.astype(np.int32).T.copy()
    return Selection(tuple(caches), tuple(row_groups), row_group, row, tokens, completion_tokens, too_long)


def _shorten(table: np.ndarray, max_length: int, cut: bool) -> np.ndarray:
    """Drop the samples of ``table`` [n, 4] that are longer than ``max_length``, or cut their completions."""
    if not cut:
        return table[table[:, 2] + table[:, 3] <= max_length]
    completion = np.minimum(table[:, 3], max_length - table[:, 2])
    return np.column_stack([table[:, :3], completion])[completion > 0]


def open_caches(paths: Sequence[Location]) -> list[Cache]:
    """Open the caches to train on together.

    Raises:
        UsageError: one cache is named twice.
        KDError: the caches have different tokenizers.
    """
    caches = [Cache(path) for path in paths]
    for number, cache in enumerate(caches):
        same = next((other for other in caches[:number] if other.fingerprint == cache.fingerprint), None)
        if same is not None:
            raise UsageError(
                f"--from-cache {cache.path} is the same cache as {same.path}: its samples would count twice"
            )
        tokenizer, first = cache.plan["tokenizer"], caches[0].plan["tokenizer"]
        if any(tokenizer.get(name) != first.get(name) for name in identity.SAME_IDS):
            raise KDError(f"{cache.path} and {caches[0].path} were made with different tokenizers and cannot be mixed")
    return caches
