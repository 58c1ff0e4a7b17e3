"""The teacher's candidates: one type on the whole way from the sparsifier to the packed batch.

Shapes: T positions, K candidates at a position, N candidates in all. Log-probabilities are natural logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """The tokens that a teacher holds likely at T positions, flat: position t owns ``counts[t]`` of the N entries."""

    ids: np.ndarray  # [N] int32, best first within a position
    logprobs: np.ndarray  # [N] float32, nats
    counts: np.ndarray  # [T] int32
    tails: np.ndarray  # [T] float32: log of the mass outside the candidates, -inf where there is none

    def __len__(self) -> int:
        """The number of positions T."""
        return len(self.counts)

    @property
    def starts(self) -> np.ndarray:
        """[T]: the index of each position's first candidate."""
        return np.cumsum(self.counts) - self.counts

    def at(self, position: int) -> slice:
        """Select the entries of one position."""
        start = int(self.counts[:position].sum())
        return slice(start, start + int(self.counts[position]))

    def first(self, positions: int) -> Candidates:
        """Return the candidates of the first ``positions`` positions."""
        entries = int(self.counts[:positions].sum())
        return Candidates(self.ids[:entries], self.logprobs[:entries], self.counts[:positions], self.tails[:positions])

    def where(self, keep: np.ndarray) -> Candidates:
        """Return the candidates of the positions at which ``keep`` [T] is true."""
        entries = np.repeat(keep, self.counts)
        return Candidates(self.ids[entries], self.logprobs[entries], self.counts[keep], self.tails[keep])


def concatenate(parts: Sequence[Candidates]) -> Candidates:
    """Join the positions of at least one part, in order."""
    return Candidates(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "counts", "tails"))
    )
