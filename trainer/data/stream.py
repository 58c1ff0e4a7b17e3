"""The order of training: which samples make which step, and which rank trains on which of them.

The order is a function of the selection, the seed and the epoch alone. The number of ranks does not change it, nor which
samples make a step; so a run may continue on another number of ranks. A stream that starts at a step needs to know that
one integer and nothing else.

    epoch     all samples once. Row groups are shuffled, and samples are shuffled inside *windows* of a few row groups.
              So nothing is read long before it is needed, and memory does not grow with the cache.
    step      the next ``samples_per_step`` samples of the epoch: the global batch of one optimizer step. The last step
              of an epoch may be shorter.
    part      a step is divided into accumulation steps x ranks parts of about equally many tokens. Part p is trained
              on by rank p % ranks, as one packed micro-batch (pack.py).

All of this follows from the lengths of samples, before anything is read. So a rank reads only the row groups that its
own samples are in. Where row groups come over a network, a step's samples go to the nodes by row group, and the ranks
of a node share out the fetching.

Shapes: S samples of the whole selection; n samples of a window or a step. A sample is named by its index into the
selection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from kdcache.cache.reader import Sample
from kdcache.errors import KDError
from trainer.data.pack import Batch, pack
from trainer.data.read_ahead import read_ahead
from trainer.data.select import Selection

WINDOW_ROW_GROUPS = 4


@dataclass(frozen=True)
class _Drawn:
    """Samples in the order of the epoch, and which ranks may train on each."""

    samples: np.ndarray  # [n] int64
    allowed: np.ndarray  # [n, ranks] bool

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> _Drawn:
        return _Drawn(self.samples[part], self.allowed[part])

    def followed_by(self, other: _Drawn) -> _Drawn:
        return _Drawn(
            np.concatenate([self.samples, other.samples]),
            np.concatenate([self.allowed, other.allowed]),
        )


@dataclass(frozen=True)
class _Reading:
    """What a rank loads at a time, and the steps that it can train on after it."""

    steps: list[list[np.ndarray]]  # of each step, the samples of each part of this rank
    load: np.ndarray  # the samples to load
    keep: np.ndarray  # the samples to keep in memory after these steps, for steps to come
    row_groups: np.ndarray  # what any rank of this node needs for these steps


class Stream(torch.utils.data.IterableDataset):
    """The micro-batches of one rank, from ``step`` on. One iteration has as many steps as an epoch, and the next continues.

    A thread makes batches ahead of the one that trains on them, so that ``self.step`` is ahead too: a checkpoint takes its
    step from the trainer.

    Args:
        head_rows: the size of the student's vocabulary.
        samples_per_step: the global batch, over all ranks and accumulation steps.
        parts: accumulation steps x ranks: how many micro-batches make one step.
        rank, ranks: of this process, and how many there are.
        step: the first optimizer step to deliver, counted over all epochs.
        ranks_per_node: how many ranks share a disk, and with it what was fetched of a remote cache.
    """

    def __init__(
        self,
        selection: Selection,
        head_rows: int,
        samples_per_step: int,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        step: int = 0,
        ranks_per_node: int = 1,
    ):
        self.ranks_per_node = (
            ranks_per_node if ranks % ranks_per_node == 0 else 1
        )  # nodes of unequal size share nothing
        self.selection, self.head_rows, self.seed, self.step = selection, head_rows, seed, step
        self.samples_per_step, self.parts, self.rank, self.ranks = samples_per_step, parts, rank, ranks
        self.steps_per_epoch = -(-len(selection) // samples_per_step)
        self._iterator: Callable[[], Generator[Batch] | None] = lambda: None

    def __len__(self) -> int:
        """Return the number of this rank's micro-batches per epoch."""
        return self.steps_per_epoch * self.parts // self.ranks

    def __iter__(self) -> Iterator[Batch]:
        iterator = read_ahead(self._batches())
        self._iterator = weakref.ref(iterator)  # weak, because the iterator holds this stream
        return iterator

    def close(self) -> None:
        """End the thread that makes batches ahead, when training stops before an iteration does."""
        iterator = self._iterator()
        if iterator is not None:
            iterator.close()

    def _batches(self) -> Iterator[Batch]:
        """Yield the micro-batches of as many steps as an epoch has; after a resume, they may span two epochs."""
        remaining = self.steps_per_epoch
        while remaining:
            epoch, first_step = divmod(self.step, self.steps_per_epoch)
            before = remaining
            for parts in self._load_steps(epoch, first_step):
                self.step += 1  # before the batches: whoever iterates may stop at the last one and never return here
                for samples in parts:
                    yield pack(samples, self.head_rows)
                remaining -= 1
                if not remaining:
                    return
            if remaining == before:  # no step came, and without this the loop would never end
                raise KDError("the shards have other samples than were selected: were they replaced meanwhile?", 3)

    def _load_steps(self, epoch: int, first_step: int) -> Iterator[list[list[Sample]]]:
        """Yield this rank's parts of each step of an epoch, from ``first_step`` on. Earlier steps are not read."""
        in_memory: dict[int, Sample] = {}
        readings = self._readings(epoch, first_step)
        upcoming = next(readings, None)
        self._prefetch(upcoming)
        while upcoming is not None:
            reading, upcoming = upcoming, next(readings, None)
            self._prefetch(upcoming)  # fetched while the student trains on what this reading loads
            if self.selection.remote:
                fetched_by_others = np.setdiff1d(
                    self.selection.row_group[reading.load], self._fetched_by_this_rank(reading)
                )
                self.selection.wait(fetched_by_others)
            in_memory.update(zip(reading.load.tolist(), self.selection.load(reading.load)))
            for parts in reading.steps:
                yield [[in_memory[sample] for sample in part.tolist()] for part in parts]
            in_memory = {sample: in_memory[sample] for sample in reading.keep.tolist()}

    # How an epoch is read: windows of the order, steps of 6 samples, and what waits between them.
    #
    #     windows   |a b c d e f g h i|j k l m|n o p q r s t u|v w|        samples in the order of the epoch
    #     steps     |a b c d e f|g h i j k l|m n o p q r|s t u v w|        of 6 samples; the last one is short
    #
    #     reading 1, at window 1: step 1 is complete.     g h i wait for the window that completes their step.
    #     reading 2, at window 2: step 2 is complete.     m waits.
    #     reading 3, at window 3: step 3 is complete.     s t u wait.
    #                at window 4: no step is complete:    s t u v w wait, and nothing is read.
    #     reading 4, at the end:  what waits is step 4.
    #
    # A reading loads this rank's samples of the complete steps. Which rank a waiting sample will go to is not known yet,
    # because a step is divided only when it is complete. But loading a sample means decoding all of its row group. So if a
    # waiting sample is in a row group that is decoded now, it is loaded with it and kept in memory. It is dropped later
    # if its step gives it to another rank. All other waiting samples are loaded when their step is complete.

    def _readings(self, epoch: int, first_step: int) -> Iterator[_Reading]:
        """Yield what to load and which steps to make of it, from ``first_step`` of the epoch on. Nothing is read here."""
        tokens, row_group = self.selection.tokens, self.selection.row_group
        in_memory = np.empty(0, dtype=np.int64)  # samples that wait and are loaded already
        for steps, waiting in self._complete_steps(epoch, first_step):
            of_rank: list[list[np.ndarray]] = []
            of_node: list[np.ndarray] = []
            for step in steps:
                parts = [step.samples[part] for part in divide(tokens[step.samples], self.parts, step.allowed)]
                of_rank.append(parts[self.rank :: self.ranks])
                of_node += [part for number, part in enumerate(parts) if self._on_this_node(number % self.ranks)]
            needed = np.setdiff1d(np.concatenate(list(chain.from_iterable(of_rank))), in_memory)

            decoded_anyway = np.isin(row_group[waiting.samples], row_group[needed])
            early = waiting.samples[waiting.allowed[:, self.rank] & decoded_anyway]
            early = np.setdiff1d(early, in_memory)
            in_memory = np.intersect1d(waiting.samples, np.concatenate([in_memory, early]))

            load = np.concatenate([needed, early])
            yield _Reading(of_rank, load, in_memory, np.unique(row_group[np.concatenate(of_node)]))

    def _complete_steps(self, epoch: int, first_step: int) -> Iterator[tuple[list[_Drawn], _Drawn]]:
        """Yield, at each window that completes a step, the steps complete by then and the samples that wait."""
        size = self.samples_per_step
        to_skip = first_step * size  # samples of steps that were trained on before a resume
        waiting = _Drawn(np.empty(0, dtype=np.int64), np.empty((0, self.ranks), dtype=bool))
        for window in self.order(epoch):
            if to_skip >= len(window):
                to_skip -= len(window)
                continue
            waiting = waiting.followed_by(_Drawn(window, self.allowed(window))[to_skip:])
            to_skip = 0
            complete = len(waiting) // size * size  # samples
            if complete:
                steps = [waiting[start : start + size] for start in range(0, complete, size)]
                waiting = waiting[complete:]
                yield steps, waiting
        if len(waiting):
            yield [waiting], waiting[:0]

    def _prefetch(self, reading: _Reading | None) -> None:
        if reading is not None and self.selection.remote:
            self.selection.prefetch(self._fetched_by_this_rank(reading))

    def _fetched_by_this_rank(self, reading: _Reading) -> np.ndarray:
        """Return the row groups that this rank fetches for all ranks of its node, which take turns."""
        return reading.row_groups[self.rank % self.ranks_per_node :: self.ranks_per_node]

    def _on_this_node(self, rank: int) -> bool:
        return rank // self.ranks_per_node == self.rank // self.ranks_per_node

    def allowed(self, window: np.ndarray) -> np.ndarray:
        """Return which ranks may train on which samples of a window [n], as [n, ranks] bool.

        On one node, or where all caches are local, every rank may train on every sample. Else the row groups of the
        window are assigned to the nodes in turn, so that each node fetches a share of the cache. With fewer row groups than
        nodes, several nodes share one. Where the shares cannot be even (three nodes and four row groups), every step would
        wait for the node with the largest share. In that case, too, every rank may train on every sample.
        """
        ranks, nodes = self.ranks, self.ranks // self.ranks_per_node
        row_groups, number = np.unique(self.selection.row_group[window], return_inverse=True)
        even = len(row_groups) % nodes == 0 or nodes % len(row_groups) == 0
        if nodes == 1 or not self.selection.remote or not even:
            return np.ones((len(window), ranks), dtype=bool)
        shares = min(len(row_groups), nodes)
        node = np.arange(ranks) // self.ranks_per_node
        return (number % shares)[:, None] == (node % shares)[None, :]

    def order(self, epoch: int) -> Iterator[np.ndarray]:
        """Yield the samples of an epoch in their order, a window [n] at a time."""
        random = np.random.default_rng([self.seed, epoch])
        count = len(self.selection.row_groups)
        starts = np.searchsorted(self.selection.row_group, np.arange(count + 1))  # first sample of each row group
        shuffled = random.permutation(count)
        for first in range(0, count, WINDOW_ROW_GROUPS):
            row_groups = shuffled[first : first + WINDOW_ROW_GROUPS]
            window = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in row_groups])
            if len(window):
                yield random.permutation(window)


def divide(tokens: np.ndarray, parts: int, allowed: np.ndarray) -> list[np.ndarray]:
    """Divide the n samples of a step into parts of about equally many tokens; return the indices (into n) of each part.

    The longest sample is placed first, and each sample goes to the part with the fewest tokens so far.

    Args:
        tokens: [n] length of each sample.
        allowed: [n, ranks] bool, which ranks may train on a sample. Part p is of rank p % ranks.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    tokens_per_part = np.zeros(parts)
    rank = np.arange(parts) % allowed.shape[1]
    for sample in np.argsort(-tokens, kind="stable").tolist():  # a stable sort is the same on every rank
        part = int(np.where(allowed[sample, rank], tokens_per_part, np.inf).argmin())
        members[part].append(sample)
        tokens_per_part[part] += tokens[sample]
    return [np.array(part, dtype=np.int64) for part in members]


def in_order(
    selection: Selection, head_rows: int, samples_per_batch: int, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yield batches for evaluation: every sample once, in the cache's order.

    Each rank has one stretch of the samples, and every rank yields the same number of batches; the last may be empty.
    """
    stretch = -(-len(selection) // (ranks * samples_per_batch)) * samples_per_batch

    def batches() -> Iterator[Batch]:
        for first in range(rank * stretch, (rank + 1) * stretch, samples_per_batch):
            yield pack(selection.load(np.arange(first, min(first + samples_per_batch, len(selection)))), head_rows)

    return read_ahead(batches())
