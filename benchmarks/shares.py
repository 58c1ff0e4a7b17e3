"""How much of a cache does each rank read? It is counted from the order and the division of samples; no file is opened.

    python benchmarks/shares.py

The cache is made up: 100,000 samples in row groups of 128, with lognormal lengths (median 150 tokens, sigma 0.7). An epoch is
counted with 16 samples per rank and step, on nodes of 8 ranks. The table has:

* the rows that rank 0 decodes per sample that it trains on;
* the share of the cache that its node fetches from an object store;
* the tokens of a step's fullest micro-batch, for which all others wait, over those of its mean one (median over steps).
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from trainer.data.select import RowGroupKey, Selection
from trainer.data.stream import Stream, divide

SAMPLES, ROWS, PER_RANK, PER_NODE = 100_000, 128, 16, 8


class Remote(Selection):
    """A selection of a cache on an object store."""

    remote = True


def measure(ranks: int, kind: type[Selection]) -> tuple[float, float, float]:
    """Return rows decoded per sample, the share of the cache that a node fetches, and the fullest micro-batch over the mean."""
    tokens = np.exp(np.random.default_rng(0).normal(np.log(150), 0.7, SAMPLES)).astype(np.int32)
    number = np.arange(SAMPLES)
    row_groups = tuple(RowGroupKey(0, "", g) for g in range(-(-SAMPLES // ROWS)))
    selection = kind((), row_groups, number // ROWS, number % ROWS, tokens, tokens, 0)
    stream = Stream(selection, 0, PER_RANK * ranks, parts=ranks, ranks=ranks, ranks_per_node=min(PER_NODE, ranks))
    decoded = trained = 0
    fetched: set[int] = set()
    for reading in stream._readings(0, 0):
        decoded += len(np.unique(selection.row_group[reading.load])) * ROWS
        trained += sum(len(part) for parts in reading.steps for part in parts)
        fetched.update(reading.row_groups.tolist())

    windows = itertools.islice(stream.order(0), 200)
    drawn, allowed = (np.concatenate(both) for both in zip(*((w, stream.allowed(w)) for w in windows)))
    fullest = []
    for first in range(0, len(drawn) - stream.samples_per_step + 1, stream.samples_per_step):
        step = slice(first, first + stream.samples_per_step)
        sums = [tokens[drawn[step][part]].sum() for part in divide(tokens[drawn[step]], ranks, allowed[step])]
        fullest.append(max(sums) / np.mean(sums))
    return decoded / trained, len(fetched) / len(row_groups), float(np.median(fullest))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(
        "| ranks | rows decoded per sample | fullest / mean | from a store: rows decoded | share of a node | fullest / mean |"
    )
    print("|---|---|---|---|---|---|")
    for ranks in (1, 2, 8, 16, 32, 64, 256, 1024):
        local, remote = measure(ranks, Selection), measure(ranks, Remote)
        print(f"| {ranks:,} | {local[0]:.1f} | {local[2]:.2f} | {remote[0]:.1f} | {remote[1]:.3f} | {remote[2]:.2f} |")


if __name__ == "__main__":
    main()
