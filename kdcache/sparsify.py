"""What to keep of a teacher's distribution: [T, K] rows -> few candidates a position. Pure numpy.

A policy is one function from a capture to ``Candidates``; ``POLICIES`` names them. Invariant: at every position the
candidates are sorted best first, no id twice, and candidates + tail carry the whole mass (to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdcache.errors import UsageError
from kdcache.format import MIN_TAIL_MASS


@dataclass(frozen=True)
class Candidates:
    """The kept candidates of T positions, flat: position t owns ``counts[t]`` of the N entries."""

    ids: np.ndarray  # [N] int32
    logprobs: np.ndarray  # [N] float32, nats
    counts: np.ndarray  # [T] int32
    tail: np.ndarray  # [T] float32: log of the mass outside the candidates, -inf where there is none


@dataclass(frozen=True)
class Sparsifier:
    """``topk:64`` as parsed. ``capture_k`` is how many candidates the engine has to return for it."""

    policy: str
    parameter: float
    capture_k: int

    def __call__(self, ids: np.ndarray, logprobs: np.ndarray) -> Candidates:
        """Sparsify one completion: ``ids`` and ``logprobs`` are [T, K], best first."""
        return POLICIES[self.policy](ids, logprobs, self.parameter)

    def __str__(self) -> str:
        return f"{self.policy}:{self.parameter:g}"


def parse(spec: str, capture_k: int | None = None) -> Sparsifier:
    """``topk:K`` -> Sparsifier. ``capture_k`` defaults to what the policy needs; UsageError if it is too small."""
    policy, _, text = spec.partition(":")
    if policy not in POLICIES:
        raise UsageError(f"--sparsify {spec}: unknown policy {policy!r}; known: {', '.join(POLICIES)} (as in topk:64)")
    try:
        k = int(text)
    except ValueError:
        k = 0
    if k < 1:
        raise UsageError(f"--sparsify {spec}: expected topk:K with a whole number K of at least 1, as in topk:64")
    if capture_k is not None and capture_k < k:
        raise UsageError(f"--capture-k {capture_k} is smaller than the {k} candidates that --sparsify {spec} keeps")
    return Sparsifier(policy, k, capture_k or k)


def topk(ids: np.ndarray, logprobs: np.ndarray, k: float) -> Candidates:
    """The k best, and the mass of all others as one number, the *bucket*."""
    kept = min(int(k), ids.shape[1])
    positions = ids.shape[0]
    return Candidates(
        ids=np.ascontiguousarray(ids[:, :kept], dtype=np.int32).reshape(-1),
        logprobs=np.ascontiguousarray(logprobs[:, :kept], dtype=np.float32).reshape(-1),
        counts=np.full(positions, kept, dtype=np.int32),
        tail=log_tail(logprobs[:, :kept]),
    )


POLICIES: dict[str, Callable[[np.ndarray, np.ndarray, float], Candidates]] = {"topk": topk}


def tail_mass(logprobs: np.ndarray) -> np.ndarray:
    """[T, K] -> [T] float64: the probability outside the K, 0 where float32 log-probabilities cannot show any."""
    mass = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    return np.where(mass < MIN_TAIL_MASS, 0.0, mass)


def log_tail(logprobs: np.ndarray) -> np.ndarray:
    """[T, K] -> [T] float32: log of ``tail_mass``, -inf for none."""
    with np.errstate(divide="ignore"):
        return np.log(tail_mass(logprobs)).astype(np.float32)


def entropies(logprobs: np.ndarray) -> np.ndarray:
    """[T, K] -> [T] float32: entropy in nats of the K candidates and the rest as one cell.

    The rest is counted as if it were a single token, so this is a lower bound of the full-vocabulary entropy that
    grows with K.
    """
    logs = logprobs.astype(np.float64)
    rest = tail_mass(logprobs)
    with np.errstate(divide="ignore", invalid="ignore"):
        head = -(np.where(np.isneginf(logs), 0.0, np.exp(logs) * logs)).sum(axis=1)
        bucket = np.where(rest > 0, -rest * np.log(np.where(rest > 0, rest, 1.0)), 0.0)
    return np.maximum(head + bucket, 0.0).astype(np.float32)
