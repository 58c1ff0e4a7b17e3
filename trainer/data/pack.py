"""Samples packed into one batch: a single row without padding, in which samples stand one after the other.

The batch says where each sample begins. The student's layers keep the samples apart by that (``trainer.student.attention``).

Shapes: L tokens of the row, N supervised positions, K candidates (the largest number at any of these positions), S
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.candidates import Candidates, concatenate
from kdcache.cache.reader import Sample
from kdcache.errors import KDError

IGNORE = -100  # transformers' label of positions without a loss
MAX_MASS_BEYOND_HEAD = 1e-3


class Batch(TypedDict):
    """A packed row. Row n of the last three belongs to the n-th position whose shift_label is not IGNORE."""

    input_ids: Tensor  # (1, L) int64
    offsets: Tensor  # (S + 1,) int32, where each sample begins in the row; the last one is L
    labels: Tensor  # (1, L) int64: the token where it is supervised, else IGNORE
    shift_labels: Tensor  # (1, L) int64: the label of the next token of the same sample, else IGNORE
    candidate_ids: Tensor  # (N, K) int64, padded with a candidate of the same position
    candidate_logprobs: Tensor  # (N, K) float32, nats; -inf where padded
    tail_logprobs: Tensor  # (N,) float32, nats: log of the mass outside the candidates


def pack(samples: Sequence[Sample], head_rows: int) -> Batch:
    """Pack samples into one row. An empty list packs to one token without a loss, so that every rank has a batch.

    Raises:
        KDError: a token id is beyond the student's vocabulary of ``head_rows`` tokens, or more than
            MAX_MASS_BEYOND_HEAD of the teacher's probability is.
    """
    if not samples:
        return _empty()
    tokens = np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.completion_ids)], dtype=np.int64)
    if tokens.max() >= head_rows:
        raise KDError(f"token id {tokens.max()} is beyond the student's vocabulary of {head_rows}; is this its cache?")
    lengths = np.array([[len(s.prompt_ids), len(s.completion_ids)] for s in samples])  # [S, 2]
    ends = np.cumsum(lengths.sum(axis=1))  # [S] where each sample ends in the row
    has_label = np.repeat(np.tile([False, True], len(samples)), lengths.ravel())  # [L] true on completions
    supervised = np.concatenate([s.supervised for s in samples])
    candidates = concatenate([s.candidates for s in samples])
    if not supervised.all():
        candidates = candidates.where(supervised)
        has_label[has_label] = supervised
    labels = np.where(has_label, tokens, IGNORE)
    shift_labels = np.append(labels[1:], IGNORE)
    shift_labels[ends - 1] = (
        IGNORE  # a sample without a prompt begins with a label, which the sample before must not see
    )
    ids, logprobs = _rectangle(candidates)
    tails = candidates.tails
    if ids.size and ids.max() >= head_rows:
        ids, logprobs, tails = _fit_to_head(ids, logprobs, tails, head_rows)
    return {
        "input_ids": torch.from_numpy(tokens)[None],
        "offsets": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "labels": torch.from_numpy(labels)[None],
        "shift_labels": torch.from_numpy(shift_labels)[None],
        "candidate_ids": torch.from_numpy(ids),
        "candidate_logprobs": torch.from_numpy(logprobs),
        "tail_logprobs": torch.from_numpy(tails),
    }


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with all of its tensors on ``device``."""
    tensors = cast(dict[str, Tensor], batch)
    return cast(Batch, {name: tensor.to(device) for name, tensor in tensors.items()})


def _empty() -> Batch:
    no_label = torch.full((1, 1), IGNORE)
    return {
        "input_ids": torch.zeros((1, 1), dtype=torch.int64),
        "offsets": torch.tensor([0, 1], dtype=torch.int32),
        "labels": no_label,
        "shift_labels": no_label.clone(),
        "candidate_ids": torch.zeros((0, 1), dtype=torch.int64),
        "candidate_logprobs": torch.zeros((0, 1)),
        "tail_logprobs": torch.zeros(0),
    }


def _rectangle(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    """Return flat candidates as ids (N, K) int64 and log-probabilities (N, K) float32, K being the largest count."""
    ids, logprobs, counts = candidates.ids, candidates.logprobs, candidates.counts
    width = int(counts.max(initial=1))
    if len(ids) == len(counts) * width:  # all counts are equal, as in top-k caches: it is a rectangle already
        return ids.reshape(-1, width).astype(np.int64), logprobs.reshape(-1, width)
    if not len(ids):  # no position has a candidate: there is nothing to repeat, and id 0 is as good as any
        return np.zeros((len(counts), 1), dtype=np.int64), np.full((len(counts), 1), -np.inf, dtype=np.float32)
    starts = candidates.starts
    # Candidate i of the flat list belongs to position t, and moves from starts[t] + j to t * width + j.
    places = np.arange(len(ids)) + np.repeat(np.arange(len(counts)) * width - starts, counts)
    wide_ids = np.empty((len(counts), width), dtype=np.int64)
    wide_ids[:] = ids[np.minimum(starts, len(ids) - 1)][:, None]
    wide_logprobs = np.full((len(counts), width), -np.inf, dtype=np.float32)
    wide_ids.ravel()[places] = ids
    wide_logprobs.ravel()[places] = logprobs
    return wide_ids, wide_logprobs


def _fit_to_head(
    ids: np.ndarray, logprobs: np.ndarray, tails: np.ndarray, head_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move the mass of candidates that the student's head lacks to the tail; KDError above MAX_MASS_BEYOND_HEAD."""
    beyond = ids >= head_rows
    mass = np.where(beyond, np.exp(logprobs), 0).sum(axis=1)
    if mass.mean() > MAX_MASS_BEYOND_HEAD:
        raise KDError(
            f"{mass.mean():.1%} of the teacher's probability is on tokens beyond the student's vocabulary of {head_rows}; "
            "this student cannot learn from this cache"
        )
    with np.errstate(divide="ignore"):
        tails = np.log(np.exp(tails) + mass).astype(np.float32)
    # Padding repeats a candidate of the same position: the first that the head has, and id 0 where it has none of them.
    first_inside = np.take_along_axis(ids, beyond.argmin(axis=1)[:, None], axis=1)  # (N, 1)
    padded = np.where(beyond, np.where(first_inside < head_rows, first_inside, 0), ids)
    return padded, np.where(beyond, -np.inf, logprobs).astype(np.float32), tails
