"""One row of a shard as a type: a field per column, so that a misspelt column fails instead of becoming NULL.

Shapes: P prompt tokens, T completion tokens. Invariant: the fields and properties of ``CacheRow`` are the columns of
``kdcache.cache.format.SCHEMA``. The three columns of candidates are one field, ``candidates``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.cache.candidates import Candidates

#: The columns that ``CacheRow.candidates`` holds.
CANDIDATE_COLUMNS = ("candidate_ids", "candidate_logprobs", "tail_logprobs")


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One sample, ready to be written: a prompt, one completion of it, and the teacher's candidates at each token."""

    sample_id: str
    split: str
    prompt_ids: Sequence[int]  # [P]
    completion_ids: Sequence[int]  # [T]
    token_logprobs: np.ndarray  # [T] float32, nats
    token_ranks: np.ndarray  # [T] int32, 1-based
    entropies: np.ndarray  # [T] float32, nats
    candidates: Candidates  # of T positions

    prompt_id: str | None = None
    group_id: str | None = None
    source: str | None = None
    task: str | None = None
    language: str | None = None
    prompt: str | None = None
    completion: str | None = None
    reference: str | None = None
    completion_mask: Sequence[bool] | None = None  # [T]; None: every completion position is supervised
    origin: str | None = None  # given | sampled
    sample_index: int | None = None
    seed: int | None = None
    finish_reason: str | None = None
    verifier: str | None = None
    reward: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.completion_ids)
