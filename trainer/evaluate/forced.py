"""What a student says at cached positions, teacher-forced: for `kd evaluate`, and beside the teacher's own in `kd view`.

The KL is that of the K + 1 cells that were captured: the K best tokens, and all others as one. It is a lower bound of
the KL over the whole vocabulary. A topk cache stores these cells as they are. A threshold cache stores the captured tokens
as a sample, and two things follow that are corrected here. The teacher's entropy is taken as it was captured, because
that of a sample is too small. The student's mass outside the capture cannot be summed, because the names of the
captured tokens that were not drawn are not stored: the student's own best tokens besides the candidates stand for them.
No other tokens hold more of the student's mass, so that the KL is at most a little too high, by less the nearer the
student is to its teacher, and 0 at the teacher itself. All of this is so on average over positions: a single one is noisy and may be
below 0.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache import machine
from kdcache.cache.reader import Cache, Sample, entropy_unstored
from kdcache.errors import KDError
from trainer.data.pack import IGNORE, pack, to_device
from trainer.loss.head import Head, head_of
from trainer.loss.reference import cells, log_mass_beyond
from trainer.student.load import load_student

ROWS = 64  # positions that go through the head at once


@dataclass(frozen=True)
class Forced:
    """At T positions with N candidates in all."""

    probabilities: np.ndarray  # [N] the student's at the teacher's candidates
    tails: np.ndarray  # [T] the student's mass outside them
    kl: np.ndarray  # [T] nats, KL(teacher || student)
    logprobs: np.ndarray  # [T] nats, of the completion's own tokens
    ranks: np.ndarray  # [T] of them; 1 is best, ties count against the token
    best: np.ndarray  # [T] ids of the student's best tokens


class Student:
    """Loaded when it is first asked; one question at a time."""

    def __init__(self, model: str, cache: Cache):
        self.name, self.cache = model, cache
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Head] | None = None

    def __call__(self, sample: Sample) -> Forced:
        """Read one sample, which has its entropies."""
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.name)
            return forced(*self._loaded, sample, sampled_from(self.cache))


def _load(model: str) -> tuple[Any, Head]:
    student, _ = load_student(model, "float32" if machine.torch_device() == "cpu" else "auto")
    student.to(machine.torch_device()).eval()
    return student, head_of(student)


def sampled_from(cache: Cache) -> int | None:
    """How many captured candidates those of each position were drawn from; None: they are all that was captured."""
    return cache.policy.capture_k if cache.policy.samples else None


def forced(student: Any, head: Head, sample: Sample, captured: int | None) -> Forced:
    """What the student says at every position of the completion, supervised or not."""
    longest = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sample.tokens > longest:
        raise KDError(f"the sample has {sample.tokens:,} tokens, and the student's positions end at {longest:,}")
    everywhere = replace(sample, supervised=np.ones(len(sample.completion_ids), bool))
    found = at_positions(student, head, [everywhere], captured)
    stored = np.arange(found["cells"].shape[1] - 1) < sample.candidates.counts[:, None]  # (T, K)
    return Forced(
        probabilities=found["cells"][:, :-1][stored],
        tails=found["cells"][:, -1],
        **{name: found[name] for name in ("kl", "logprobs", "ranks", "best")},
    )


@torch.no_grad()
def at_positions(student: Any, head: Head, samples: Sequence[Sample], captured: int | None) -> dict[str, np.ndarray]:
    """By supervised position of all ``samples`` together, N of them, with K stored candidates at most.

    kl: nats, as at the top of this module. best: the student's best token, and confidence, its probability.
    logprobs, ranks: of the completion's own token; right, agreement: whether ``best`` is that token, and the teacher's
    best. cells: (N, K + 1), the student's probabilities of the stored candidates and of the rest; all others: (N,).
    The samples have their entropies where ``captured`` is given, which is as ``sampled_from`` says.
    """
    batch = to_device(pack(samples, len(head.weight)), head.weight.device)
    hidden = student.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    asked = batch["shift_labels"][0] != IGNORE
    hidden, targets = hidden[0][asked], batch["shift_labels"][0][asked]  # (N, D), (N,)
    parts: list[dict[str, np.ndarray]] = []
    for first in range(0, len(targets), ROWS):
        part = slice(first, first + ROWS)
        logits, own = head(hidden[part]), targets[part, None]  # (n, V), (n, 1)
        ids, log_ps, tails = (
            batch["candidate_ids"][part],
            batch["candidate_logprobs"][part],
            batch["tail_logprobs"][part],
        )
        log_p, log_q = cells(logits, ids, log_ps, tails)  # (n, K + 1)
        beyond = log_q[:, -1]
        if captured is not None:
            beyond = log_mass_beyond(logits, ids, (captured - (log_ps > -math.inf).sum(-1)).clamp_min(0))
        best, own_logits, log_z = logits.max(-1), logits.gather(1, own), logits.logsumexp(-1)
        found = {
            "cells": log_q.exp(),
            "kl": (log_p.exp() * (log_p - torch.cat([log_q[:, :-1], beyond[:, None]], dim=-1))).sum(-1),
            "logprobs": own_logits[:, 0] - log_z,
            "ranks": (logits >= own_logits).sum(-1),
            "best": best.indices,
            "confidence": (best.values - log_z).exp(),
            "right": best.indices == own[:, 0],
            "agreement": best.indices == ids[:, 0],
        }
        parts.append({name: value.cpu().numpy() for name, value in found.items()})
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if captured is not None:
        whole["kl"] = whole["kl"] - np.concatenate([entropy_unstored(sample) for sample in samples])
    return whole
