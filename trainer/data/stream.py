"""Shards -> packed batches, in one deterministic order given (seed, epoch) that no number of ranks changes.

The order is drawn over row groups: they are permuted, and samples are shuffled inside windows of a few of them, so that
nothing is read before it is needed and memory does not grow with the cache. One global batch is one optimizer step; it
is cut into accumulation x ranks micro-batches, before anything is read: a rank reads the row groups of its own samples.
The state of the stream is one integer: the step. Where row groups come over a network, a step's samples go to the nodes by
the row groups they are in, and the ranks of a node take turns to fetch them: each rank fetches its share.

A micro-batch is one packed row without padding: samples stand one after the other, kept apart by position ids that
start again at 0, with no attention mask and no cache.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import query
from kdcache.cache.candidates import Candidates, concatenate
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError, UsageError
from kdcache.models import identity
from kdcache.storage import Location

WINDOW_ROW_GROUPS = 4
IGNORE = -100  # transformers' label of positions without a loss
MAX_MASS_BEYOND_HEAD = 1e-3

Batch = dict[str, Tensor]
_END = object()


@dataclass(frozen=True)
class Units:
    """The selected samples of several caches: which row group each is in, and how long it is (S samples)."""

    caches: tuple[Cache, ...]
    groups: tuple[tuple[int, str, int], ...]  # (cache, file, row group)
    group: np.ndarray  # [S] index into groups; samples of a group are neighbours
    row: np.ndarray  # [S] row inside the row group
    tokens: np.ndarray  # [S] prompt + completion
    completion_tokens: np.ndarray  # [S]
    too_long: int  # longer than max_length: dropped, or cut

    def __len__(self) -> int:
        return len(self.group)

    @property
    def remote(self) -> bool:
        return any(not isinstance(cache.path, Path) for cache in self.caches)

    def prefetch(self, groups: np.ndarray) -> None:
        """Begin to fetch row groups that will be needed soon."""
        for number in groups.tolist():
            cache, file, row_group = self.groups[number]
            self.caches[cache].prefetch(file, row_group)

    def wait(self, groups: np.ndarray) -> None:
        """Wait until other ranks of this node have fetched row groups; one that does not come is fetched as it is read."""
        for number in groups.tolist():
            cache, file, row_group = self.groups[number]
            self.caches[cache].wait(file, row_group)

    def load(self, picked: np.ndarray, columns: Sequence[str] = ()) -> list[Sample]:
        """Return the picked samples in that order, with ``columns`` of TOKEN_COLUMNS; each row group is read once."""
        found: dict[int, Sample] = {}
        for group in np.unique(self.group[picked]):
            members = picked[self.group[picked] == group]
            cache, file, row_group = self.groups[group]
            samples = self.caches[cache].read(file, row_group, self.row[members], columns)
            for index, sample in zip(members.tolist(), samples):
                found[index] = sample.first(int(self.completion_tokens[index]))
        return [found[index] for index in picked.tolist()]


def select(
    caches: Sequence[Cache], split: str, where: str | None = None, max_length: int | None = None, cut: bool = False
) -> Units:
    """The samples of ``split`` that fulfil ``where``.

    Those longer than ``max_length`` are dropped whole; with ``cut`` their completions lose what is beyond it, and only
    those of which nothing would be left are dropped.
    """
    groups: list[tuple[int, str, int]] = []
    columns: list[np.ndarray] = []  # [n, 4]: group, row, tokens, completion tokens
    too_long = 0
    for number, cache in enumerate(caches):
        # table [n, 4]: file, row, prompt, completion. Without a condition no SQL is needed to read three columns.
        files, table = query.select_samples(cache.path, where, split) if where else cache.lengths(split)
        if max_length is not None:
            long = table[:, 2] + table[:, 3] > max_length
            too_long += int(long.sum())
            if cut:
                table[:, 3] = np.minimum(table[:, 3], max_length - table[:, 2])
                table = table[table[:, 3] > 0]
            else:
                table = table[~long]
        table[:, 2] += table[:, 3]
        bounds = np.searchsorted(table[:, 0], np.arange(len(files) + 1))
        for name, first, last in zip(files, bounds, bounds[1:]):
            part = table[first:last]
            starts = np.concatenate([[0], np.cumsum(cache.row_groups(name))])
            row_groups = np.searchsorted(starts, part[:, 1], side="right") - 1
            columns.append(np.column_stack([len(groups) + row_groups, part[:, 1] - starts[row_groups], part[:, 2:]]))
            groups.extend((number, name, group) for group in range(len(starts) - 1))
    merged = np.concatenate(columns) if columns else np.zeros((0, 4))
    group, row, tokens, completion_tokens = (merged[:, column].astype(np.int32) for column in range(4))
    return Units(tuple(caches), tuple(groups), group, row, tokens, completion_tokens, too_long)


class _Reading(NamedTuple):
    """What a rank reads at a time."""

    steps: list[list[np.ndarray]]  # its parts of the steps that are complete with it
    samples: np.ndarray  # to load
    kept: np.ndarray  # of those loaded, what steps to come may want
    groups: np.ndarray  # row groups that its node wants


class Stream(torch.utils.data.IterableDataset):
    """Micro-batches of one rank, from ``step`` on. Iterating goes on where the last iteration ended.

    Args:
        samples_per_step: the global batch, over all ranks and accumulation steps.
        parts: accumulation steps x ranks: how many micro-batches make one step.
        rank, ranks: this process's.
        ranks_a_node: how many share a disk, and with it what was fetched of a remote cache.
        step: the first optimizer step to deliver: all the state there is.
    """

    def __init__(
        self,
        units: Units,
        head_rows: int,
        samples_per_step: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        step: int = 0,
        ranks_a_node: int = 1,
    ):
        self.ranks_a_node = ranks_a_node if ranks % ranks_a_node == 0 else 1
        self.node = rank // self.ranks_a_node
        self.units, self.head_rows, self.seed, self.step = units, head_rows, seed, step
        self.samples_per_step, self.parts, self.rank, self.ranks = samples_per_step, parts, rank, ranks
        self.steps_per_epoch = -(-len(units) // samples_per_step)

    def __len__(self) -> int:
        """Micro-batches an epoch, for this rank."""
        return self.steps_per_epoch * self.parts // self.ranks

    def __iter__(self) -> Iterator[Batch]:
        return read_ahead(self._batches())

    def _batches(self) -> Iterator[Batch]:
        wanted = self.steps_per_epoch
        while wanted:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            before = wanted
            for mine in self._steps(epoch, first):
                self.step += 1  # before the parts: a consumer need not come back after the last one
                for samples in mine:
                    yield pack(samples, self.head_rows)
                wanted -= 1
                if not wanted:
                    return
            if wanted == before:  # else this would go round for ever
                raise KDError("the shards have other samples than were selected: were they replaced meanwhile?", 3)

    def _steps(self, epoch: int, first: int) -> Iterator[list[list[Sample]]]:
        """This rank's parts of the global batches of an epoch, from the ``first`` on; what lies before is not read."""
        loaded: dict[int, Sample] = {}
        readings = self._readings(epoch, first)
        following = next(readings, None)
        self._prefetch(following)
        while following is not None:
            now, following = following, next(readings, None)
            self._prefetch(following)
            if self.units.remote:
                self.units.wait(np.setdiff1d(self.units.group[now.samples], self._turn(now)))
            loaded.update(zip(now.samples.tolist(), self.units.load(now.samples)))
            for parts in now.steps:
                yield [[loaded[i] for i in part.tolist()] for part in parts]
            loaded = {i: loaded[i] for i in now.kept.tolist()}

    def _readings(self, epoch: int, first: int) -> Iterator[_Reading]:
        """An epoch window by window. Lengths are known, so steps are divided before anything is read.

        A rank reads the row groups that its own samples are in. The last samples of a window are of a step that the next
        one completes: those that are in a row group just read are kept, and the others are read when it is known whose they are.
        """
        units, size = self.units, self.samples_per_step
        skip = first * size
        waiting = kept = np.empty(0, dtype=np.int64)  # drawn, not yet in a step; of these, read already
        ranks = np.empty((0, self.ranks), dtype=bool)  # which may have them
        for window in chain(self.order(epoch), [None]):
            if window is not None:
                if skip >= len(window):
                    skip -= len(window)
                    continue
                waiting = np.concatenate([waiting, window[skip:]])
                ranks = np.concatenate([ranks, self.allowed(window)[skip:]])
                skip = 0
            count = len(waiting) // size if window is not None else -(-len(waiting) // size)
            steps, mine, nodes = [], [kept[:0]], [kept[:0]]
            for step, may in ((waiting[i * size :][:size], ranks[i * size :][:size]) for i in range(count)):
                parts = [step[part] for part in divide(units.tokens[step], self.parts, may)]
                steps.append(parts[self.rank :: self.ranks])
                mine += steps[-1]
                nodes += [part for p, part in enumerate(parts) if p % self.ranks // self.ranks_a_node == self.node]
            if not steps:  # a step of several windows: nothing is read before it is known whose it is
                continue
            waiting, ranks = waiting[count * size :], ranks[count * size :]
            wanted = np.setdiff1d(np.concatenate(mine), kept)
            also = waiting[ranks[:, self.rank] & np.isin(units.group[waiting], units.group[wanted])]
            also = np.setdiff1d(also, kept)
            kept = np.intersect1d(waiting, np.concatenate([kept, also]))
            groups = np.unique(units.group[np.concatenate(nodes)])
            yield _Reading(steps, np.concatenate([wanted, also]), kept, groups)

    def _prefetch(self, reading: _Reading | None) -> None:
        if reading is not None and self.units.remote:
            self.units.prefetch(self._turn(reading))

    def _turn(self, reading: _Reading) -> np.ndarray:
        """The row groups that this rank fetches for all of its node."""
        return reading.groups[self.rank % self.ranks_a_node :: self.ranks_a_node]

    def allowed(self, window: np.ndarray) -> np.ndarray:
        """[S, ranks] bool: which ranks may have a window's samples. All of them on one node, or where reading is local.

        Otherwise the window's row groups go round the nodes. Where that cannot be even (three nodes and four row groups),
        a step would wait for the node that has most, and all may have all.
        """
        ranks, nodes = self.ranks, self.ranks // self.ranks_a_node
        groups, number = np.unique(self.units.group[window], return_inverse=True)
        if nodes == 1 or not self.units.remote or (len(groups) % nodes and nodes % len(groups)):
            return np.ones((len(window), ranks), dtype=bool)
        least = min(len(groups), nodes)
        return (number % least)[:, None] == (np.arange(ranks) // self.ranks_a_node % least)[None, :]

    def order(self, epoch: int) -> Iterator[np.ndarray]:
        """The epoch's sample indices, a window at a time."""
        random = np.random.default_rng([self.seed, epoch])
        bounds = np.searchsorted(self.units.group, np.arange(len(self.units.groups) + 1))
        groups = random.permutation(len(self.units.groups))
        for start in range(0, len(groups), WINDOW_ROW_GROUPS):
            window = np.concatenate(
                [np.arange(bounds[g], bounds[g + 1]) for g in groups[start : start + WINDOW_ROW_GROUPS]]
            )
            if len(window):
                yield random.permutation(window)


def in_order(units: Units, head_rows: int, samples_per_batch: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Batches for evaluation: every sample once, in the cache's order; each rank has a stretch of it, in as many batches."""
    stretch = -(-len(units) // (ranks * samples_per_batch)) * samples_per_batch

    def batches() -> Iterator[Batch]:
        for start in range(rank * stretch, (rank + 1) * stretch, samples_per_batch):
            yield pack(units.load(np.arange(start, min(start + samples_per_batch, len(units)))), head_rows)

    return read_ahead(batches())


def divide(tokens: np.ndarray, parts: int, allowed: np.ndarray) -> list[np.ndarray]:
    """Which of a step's samples each part has, about as many tokens each: longest first, to the part that has least.

    Part p is of rank p % ranks; ``allowed`` [S, ranks] says which ranks may have a sample.
    """
    made: list[list[int]] = [[] for _ in range(parts)]
    sums = np.zeros(parts)
    rank = np.arange(parts) % allowed.shape[1]
    for sample in np.argsort(-tokens, kind="stable").tolist():  # the same on every rank
        part = int(np.where(allowed[sample, rank], sums, np.inf).argmin())
        made[part].append(sample)
        sums[part] += tokens[sample]
    return [np.array(part, dtype=np.int64) for part in made]


def read_ahead(batches: Iterator[Batch], depth: int = 4) -> Iterator[Batch]:
    """The same batches, made in a thread of their own while the ones before are trained on."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    closed = threading.Event()

    def make() -> None:
        item: Any = _END
        try:
            for batch in batches:
                if not put(batch):
                    return
        except BaseException as error:  # raised where the batches are wanted
            item = error
        put(item)

    def put(item: Any) -> bool:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    thread = threading.Thread(target=make, name="kd-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


def pack(samples: Sequence[Sample], head_rows: int) -> Batch:
    """One packed row of L tokens, with the candidates of its N supervised positions.

    input_ids, position_ids, labels, shift_labels: (1, L). candidate_ids, candidate_logprobs: (N, K), padded with a
    candidate of the same position at log-probability -inf; tail_logprobs: (N,). Row n belongs to the n-th position
    whose shift_label is not -100. An empty list packs to one token without a loss.
    """
    if not samples:
        return _empty()
    tokens = np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.completion_ids)], dtype=np.int64)
    if tokens.max() >= head_rows:
        raise KDError(f"token id {tokens.max()} is beyond the student's vocabulary of {head_rows}; is this its cache?")
    parts = np.array([[len(s.prompt_ids), len(s.completion_ids)] for s in samples])  # [S, 2]
    lengths = parts.sum(axis=1)
    ends = np.cumsum(lengths)
    has_label = np.repeat(np.tile([False, True], len(samples)), parts.ravel())
    supervised = np.concatenate([s.supervised for s in samples])
    candidates = concatenate([s.candidates for s in samples])
    if not supervised.all():
        candidates = candidates.where(supervised)
        has_label[has_label] = supervised
    labels = np.where(has_label, tokens, IGNORE)
    shifted = np.append(labels[1:], IGNORE)
    shifted[ends - 1] = IGNORE  # a sample without a prompt begins with a label
    ids, logprobs = _rectangle(candidates)
    tail = candidates.tails
    if ids.size and ids.max() >= head_rows:
        ids, logprobs, tail = _fit_to_head(ids, logprobs, tail, head_rows)
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "position_ids": torch.from_numpy(np.arange(len(tokens)) - np.repeat(ends - lengths, lengths))[None],
        "labels": torch.from_numpy(labels)[None],
        "shift_labels": torch.from_numpy(shifted)[None],
        "candidate_ids": torch.from_numpy(ids),
        "candidate_logprobs": torch.from_numpy(logprobs),
        "tail_logprobs": torch.from_numpy(tail),
    }


def _empty() -> Batch:
    none = torch.full((1, 1), IGNORE)
    return {
        "input_ids": torch.zeros((1, 1), dtype=torch.int64),
        "position_ids": torch.zeros((1, 1), dtype=torch.int64),
        "labels": none,
        "shift_labels": none.clone(),
        "candidate_ids": torch.zeros((0, 1), dtype=torch.int64),
        "candidate_logprobs": torch.zeros((0, 1)),
        "tail_logprobs": torch.zeros(0),
    }


def _rectangle(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Flat candidates of N positions -> ids (N, K) int64 and log-probabilities (N, K) float32, K the largest count."""
    ids, logprobs, counts = candidates.ids, candidates.logprobs, candidates.counts
    width = int(counts.max(initial=1))
    if len(ids) == len(counts) * width:  # top-k: it is one already
        return ids.reshape(-1, width).astype(np.int64), logprobs.reshape(-1, width)
    if not len(ids):  # no position has any: padding alone
        return np.zeros((len(counts), 1), dtype=np.int64), np.full((len(counts), 1), -np.inf, dtype=np.float32)
    starts = candidates.starts
    to = np.arange(len(ids)) + np.repeat(np.arange(len(counts)) * width - starts, counts)
    wide_ids = np.empty((len(counts), width), dtype=np.int64)
    wide_ids[:] = ids[np.minimum(starts, len(ids) - 1)][:, None]
    wide_logprobs = np.full((len(counts), width), -np.inf, dtype=np.float32)
    wide_ids.ravel()[to] = ids
    wide_logprobs.ravel()[to] = logprobs
    return wide_ids, wide_logprobs


def _fit_to_head(
    ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, head_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move candidates that the student's head does not have to the tail; refuse it above MAX_MASS_BEYOND_HEAD."""
    beyond = ids >= head_rows
    mass = np.where(beyond, np.exp(logprobs), 0).sum(axis=1)
    if mass.mean() > MAX_MASS_BEYOND_HEAD:
        raise KDError(
            f"{mass.mean():.1%} of the teacher's probability is on tokens beyond the student's vocabulary of {head_rows}; "
            "this student cannot learn from this cache"
        )
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(tail) + mass).astype(np.float32)
    kept = np.take_along_axis(ids, beyond.argmin(axis=1)[:, None], axis=1)  # a candidate of the same position
    inside = np.where(beyond, np.where(kept < head_rows, kept, 0), ids)
    return inside, np.where(beyond, -np.inf, logprobs).astype(np.float32), tail


def open_caches(paths: Sequence[Location]) -> list[Cache]:
    """The caches to train on together: all of one tokenizer, and none twice."""
    caches = [Cache(path) for path in paths]
    for number, cache in enumerate(caches):
        same = next((other for other in caches[:number] if other.fingerprint == cache.fingerprint), None)
        if same is not None:
            raise UsageError(f"--from-cache {cache.path} is {same.path} once more, and its samples would count twice")
        theirs, first = cache.plan["tokenizer"], caches[0].plan["tokenizer"]
        if any(theirs.get(name) != first.get(name) for name in identity.SAME_IDS):
            raise KDError(f"{cache.path} and {caches[0].path} were made with different tokenizers and cannot be mixed")
    return caches
