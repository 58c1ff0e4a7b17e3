"""What a student says at the positions of one cached sample, teacher-forced: beside the teacher's own in `kd view`.

The cells are those of losses.py (the teacher's candidates, and all other tokens as one), and the KL that of evaluate.py:
on a threshold cache it is corrected for the entropy that is not stored, and is then right on average over positions but
noisy at each, so that single values below 0 occur.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdcache.errors import KDError
from kdcache.reader import Cache, Sample, entropy_unstored
from trainer.batches import IGNORE, pack
from trainer.fused import Head, head_of
from trainer.losses import cells
from trainer.student import load_student

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

    def __call__(self, sample: Sample, entropies: np.ndarray) -> Forced:
        """``entropies`` [T]: the teacher's, as they were captured."""
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self.name)
            found = forced(*self._loaded, sample)
        if self.cache.plan["fields"]["sparsify"].startswith("threshold"):
            everywhere = replace(sample, supervised=np.ones(len(sample.completion_ids), bool))
            return replace(found, kl=found.kl - entropy_unstored(everywhere, entropies.tolist()))
        return found


def _load(model: str) -> tuple[Any, Head]:
    student, _ = load_student(model, "auto" if torch.cuda.is_available() else "float32")
    student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return student, head_of(student)


@torch.no_grad()
def forced(student: Any, head: Head, sample: Sample) -> Forced:
    """The student's cells at every position of the completion, supervised or not. The KL is that of the stored cells."""
    longest = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sample.tokens > longest:
        raise KDError(f"the sample has {sample.tokens:,} tokens, and the student's positions end at {longest:,}")
    everywhere = replace(sample, supervised=np.ones(len(sample.completion_ids), bool))
    batch = {name: value.to(head.weight.device) for name, value in pack([everywhere], len(head.weight)).items()}
    hidden = student.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]
    asked = batch["shift_labels"][0] != IGNORE
    hidden, targets = hidden[0][asked], batch["shift_labels"][0][asked]  # (T, D), (T,)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("cells", "kl", "logprobs", "ranks", "best")}
    for first in range(0, len(targets), ROWS):
        part = slice(first, first + ROWS)
        logits = head(hidden[part])  # (n, V)
        names = ("candidate_ids", "candidate_logprobs", "tail_logprobs")
        log_p, log_q = cells(logits, *(batch[name][part] for name in names))  # (n, K + 1)
        own = logits.gather(1, targets[part, None])  # (n, 1)
        found = {
            "cells": log_q.exp(),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "logprobs": own[:, 0] - logits.logsumexp(-1),
            "ranks": (logits >= own).sum(-1),
            "best": logits.argmax(-1),
        }
        for name, value in found.items():
            parts[name].append(value.cpu().numpy())
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    stored = np.arange(whole["cells"].shape[1] - 1) < sample.counts[:, None]  # (T, K)
    return Forced(whole["cells"][:, :-1][stored], whole["cells"][:, -1], *(whole[n] for n in list(whole)[1:]))
