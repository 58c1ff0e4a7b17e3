"""A student's distributions at cached positions, teacher-forced: for `kd evaluate`, and beside the teacher's in `kd view`.

The KL is over the K + 1 cells that were captured: the K best tokens, and all others as one. It is a lower bound of the KL
over the whole vocabulary. A topk cache stores these cells as they are. A threshold cache stores the captured tokens as a
sample, and two things are corrected here for it:

* The teacher's entropy is the one that was captured, because the entropy of a sample is too small.
* The student's mass outside the capture cannot be summed, because the cache does not name the captured tokens that were not
  drawn. The student's own best tokens besides the candidates stand for them. No other tokens hold more of the student's
  mass, so that the KL is at most a little too high: by less the nearer the student is to its teacher, and by 0 at the
  teacher itself.

All of this holds on average over positions: a single one is noisy and may be below 0.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdcache import machine
from kdcache.cache.reader import Cache, Sample, entropy_unstored
from kdcache.errors import KDError
from trainer.data.pack import IGNORE, pack, to_device
from trainer.loss.head import Head, head_of
from trainer.loss.reference import cells, log_mass_beyond
from trainer.student.attention import Layers, layers_of
from trainer.student.load import load_student

ROWS = 64  # positions that go through the head at once


@dataclass(frozen=True)
class Forced:
    """What a student gives to one sample of T positions with N candidates in all."""

    probabilities: np.ndarray  # [N] the student's at the teacher's candidates
    tails: np.ndarray  # [T] the student's mass outside them
    kl: np.ndarray  # [T] nats, KL(teacher || student)
    logprobs: np.ndarray  # [T] nats, of the completion's tokens
    ranks: np.ndarray  # [T] of these tokens; 1 is best, ties count against the token
    best: np.ndarray  # [T] ids of the student's best tokens


@dataclass(frozen=True)
class PositionReadings:
    """A student at N supervised positions of several samples, which have K stored candidates at most."""

    cells: np.ndarray  # [N, K + 1] the student's probabilities of the stored candidates and of all other tokens
    kl: np.ndarray  # [N] nats, as at the top of this module
    logprobs: np.ndarray  # [N] nats, of the completion's tokens
    ranks: np.ndarray  # [N] of these tokens
    best: np.ndarray  # [N] ids of the student's best tokens
    confidence: np.ndarray  # [N] probabilities of the best tokens
    right: np.ndarray  # [N] bool: the best token is the completion's
    agreement: np.ndarray  # [N] bool: the best token is the teacher's


class Student:
    """A student for `kd view`. It is loaded for the first sample, and reads one sample at a time."""

    def __init__(self, model: str, cache: Cache):
        self.name, self.cache = model, cache
        self._lock = threading.Lock()
        self._loaded: tuple[Layers, Head] | None = None

    def __call__(self, sample: Sample) -> Forced:
        """Return what the student gives to a sample, which must have been read with its entropies."""
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.name)
            return forced(*self._loaded, sample, sampled_from(self.cache))


def _load(model: str) -> tuple[Layers, Head]:
    student, _ = load_student(model, "float32" if machine.torch_device() == "cpu" else "auto")
    student.to(machine.torch_device()).eval()
    return layers_of(student), head_of(student)


def sampled_from(cache: Cache) -> int | None:
    """Return how many captured tokens the candidates of a position were drawn from; None if all captured are stored."""
    return cache.policy.capture_k if cache.policy.samples else None


def forced(layers: Layers, head: Head, sample: Sample, captured: int | None) -> Forced:
    """Return the student at every position of the completion, supervised or not. ``captured``: see ``sampled_from``."""
    longest = getattr(layers.student.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sample.tokens > longest:
        raise KDError(f"the sample has {sample.tokens:,} tokens, and the student's positions end at {longest:,}")
    everywhere = replace(sample, supervised=np.ones(len(sample.completion_ids), bool))
    readings = at_positions(layers, head, [everywhere], captured)
    # Positions have different numbers of candidates; the columns beyond a position's own hold nothing.
    is_stored = np.arange(readings.cells.shape[1] - 1) < sample.candidates.counts[:, None]  # (T, K)
    return Forced(
        probabilities=readings.cells[:, :-1][is_stored],
        tails=readings.cells[:, -1],
        kl=readings.kl,
        logprobs=readings.logprobs,
        ranks=readings.ranks,
        best=readings.best,
    )


@torch.no_grad()
def at_positions(layers: Layers, head: Head, samples: Sequence[Sample], captured: int | None) -> PositionReadings:
    """Return the student at the supervised positions of all ``samples`` together, which are packed into one batch.

    ``captured`` is as ``sampled_from`` gives it. Where it is not None, the samples must have their entropies.
    """
    batch = to_device(pack(samples, len(head.weight)), head.weight.device)
    is_supervised = batch["shift_labels"][0] != IGNORE
    hidden = layers(batch["input_ids"], batch["offsets"])  # (L, D)
    hidden, targets = hidden[is_supervised], batch["shift_labels"][0][is_supervised]  # (N, D), (N,)
    chunks: list[dict[str, np.ndarray]] = []
    # Logits are the largest tensor by far, so that only ROWS positions have them at once.
    for first in range(0, len(targets), ROWS):
        rows = slice(first, first + ROWS)
        logits, tokens = head(hidden[rows]), targets[rows, None]  # (n, V), (n, 1)
        ids, log_ps = batch["candidate_ids"][rows], batch["candidate_logprobs"][rows]  # (n, K)
        tails = batch["tail_logprobs"][rows]  # (n,)
        log_p, log_q = cells(logits, ids, log_ps, tails)  # (n, K + 1): teacher, student
        beyond = log_q[:, -1]
        if captured is not None:  # mass outside the capture, instead of outside the stored sample of it
            beyond = log_mass_beyond(logits, ids, (captured - (log_ps > -math.inf).sum(-1)).clamp_min(0))
        best, token_logits, log_z = logits.max(-1), logits.gather(1, tokens), logits.logsumexp(-1)
        chunk = {
            "cells": log_q.exp(),
            "kl": (log_p.exp() * (log_p - torch.cat([log_q[:, :-1], beyond[:, None]], dim=-1))).sum(-1),
            "logprobs": token_logits[:, 0] - log_z,
            "ranks": (logits >= token_logits).sum(-1),
            "best": best.indices,
            "confidence": (best.values - log_z).exp(),
            "right": best.indices == tokens[:, 0],
            "agreement": best.indices == ids[:, 0],
        }
        chunks.append({name: value.cpu().numpy() for name, value in chunk.items()})
    readings = PositionReadings(**{name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]})
    if captured is not None:
        unstored = np.concatenate([entropy_unstored(sample) for sample in samples])  # nats
        readings = replace(readings, kl=readings.kl - unstored)
    return readings
