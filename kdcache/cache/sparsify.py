"""What to keep of a teacher's distribution: [T, K] rows -> few candidates a position. Pure numpy.

A policy is one function from a capture to ``Candidates``; ``POLICIES`` names them. Invariant: at every position the
candidates are sorted best first, the first is the teacher's best token, no id stands twice, and candidates + tail carry
the whole mass (``topk``: to rounding; ``threshold``: to within TAU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdcache.cache.format import CODEBOOK, MIN_TAIL_MASS, round_logprobs
from kdcache.errors import UsageError
from kdcache.hashing import uniforms

#: What a policy that looks beyond the candidates it keeps takes from the engine, unless --capture-k says otherwise.
DEFAULT_CAPTURE_K = 256


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

    def __call__(self, ids: np.ndarray, logprobs: np.ndarray, seed: int = 0, sample_id: str = "") -> Candidates:
        """Sparsify one completion: ``ids`` and ``logprobs`` are [T, K], best first.

        What is drawn follows from (seed, sample_id, position) alone, whatever else is in the cache.
        """
        keep = POLICIES[self.policy].keep
        return keep(ids, logprobs, self.parameter, uniforms(len(ids), seed, sample_id))

    @property
    def most_candidates(self) -> int:
        """What a position holds at most (but for ``threshold`` where no token reaches TAU, which is rare)."""
        return min(self.capture_k, POLICIES[self.policy].keeps(self.parameter))

    @property
    def mass_error(self) -> float:
        """How far candidates + tail may be from 1, before rounding."""
        return POLICIES[self.policy].mass_error(self.parameter)

    def __str__(self) -> str:
        return f"{self.policy}:{self.parameter:g}"


def topk(ids: np.ndarray, logprobs: np.ndarray, k: float, _: np.ndarray) -> Candidates:
    """The k best, and the mass of all others as one number, the *bucket*."""
    kept = min(int(k), ids.shape[1])
    positions = ids.shape[0]
    return Candidates(
        ids=np.ascontiguousarray(ids[:, :kept], dtype=np.int32).reshape(-1),
        logprobs=np.ascontiguousarray(logprobs[:, :kept], dtype=np.float32).reshape(-1),
        counts=np.full(positions, kept, dtype=np.int32),
        tail=log_tail(logprobs[:, :kept]),
    )


def threshold(ids: np.ndarray, logprobs: np.ndarray, tau: float, uniform: np.ndarray) -> Candidates:
    """Tokens with p >= tau as they are, of the other captured ones a systematic sample with step tau.

    A token with p < tau is kept with probability p / tau and stored with probability tau: an unbiased estimate of the
    captured distribution, whose total is off by less than tau. The mass beyond the captured K stays as the tail.

    tau is snapped to the codebook first, else every sampled weight would be off the same way. Where no token reaches
    tau, the step is the best token's probability (snapped down), so that the teacher's choice is always the first
    candidate and the order is that of the teacher.

    Systematic sampling (Madow 1949): the tokens' p / step are laid end to end on a line, and a token is kept if one
    of the points u, u + 1, u + 2, ... falls on it. uniform: [T] u of each position, in [0, 1).
    """
    snapped = float(round_logprobs(np.log(np.array([tau], dtype=np.float32)))[0])
    best = CODEBOOK[np.searchsorted(-CODEBOOK, -logprobs[:, 0], side="left").clip(max=len(CODEBOOK) - 1)]
    step = np.minimum(np.float32(snapped), best)[:, None]  # [T, 1] log
    large = logprobs >= step  # [T, K]
    large[:, 0] = True
    shares = np.where(large, 0.0, np.exp(logprobs.astype(np.float64) - step))  # [T, K] p / step of the small ones
    points = np.ceil(np.cumsum(shares, axis=1) - uniform[:, None])  # [T, K] sampling points up to a token's end
    kept = large | (np.diff(points, axis=1, prepend=0.0) > 0)
    return Candidates(
        ids=ids[kept].astype(np.int32, copy=False),
        logprobs=np.maximum(logprobs, step)[kept].astype(np.float32, copy=False),
        counts=kept.sum(axis=1, dtype=np.int32),
        tail=log_tail(logprobs),
    )


@dataclass(frozen=True)
class Policy:
    """All that is known of one policy; each function but ``keep`` takes its parameter."""

    keep: Callable[[np.ndarray, np.ndarray, float, np.ndarray], Candidates]
    takes: Callable[[float], bool]  # whether the parameter makes sense
    expected: str
    needs: Callable[[float], int]  # the candidates to capture, at least
    captures: Callable[[float], int]  # and by default
    keeps: Callable[[float], int]  # the candidates of a position, at most
    mass_error: Callable[[float], float]  # how far candidates + tail may be from 1, before rounding


POLICIES = {
    "topk": Policy(
        keep=topk,
        takes=lambda k: k >= 1 and k % 1 == 0,
        expected="topk:K with a whole number K of at least 1, as in topk:64",
        needs=int,
        captures=int,
        keeps=int,
        mass_error=lambda k: 0.0,
    ),
    "threshold": Policy(
        keep=threshold,
        takes=lambda tau: 0 < tau < 1,
        expected="threshold:TAU with TAU between 0 and 1, as in threshold:0.02",
        needs=lambda tau: 1,
        captures=lambda tau: DEFAULT_CAPTURE_K,
        keeps=lambda tau: int(1 / tau + 1),
        mass_error=lambda tau: tau,
    ),
}


def parse(spec: str, capture_k: int | None = None) -> Sparsifier:
    """``topk:K`` or ``threshold:TAU`` -> Sparsifier; UsageError if the spec or ``capture_k`` makes no sense."""
    name, _, text = spec.partition(":")
    if name not in POLICIES:
        raise UsageError(f"--sparsify {spec}: unknown policy {name!r}; known: {', '.join(POLICIES)} (as in topk:64)")
    policy = POLICIES[name]
    try:
        parameter = float(text)
    except ValueError:
        parameter = float("nan")
    if not policy.takes(parameter):
        raise UsageError(f"--sparsify {spec}: expected {policy.expected}")
    if capture_k is not None and capture_k < policy.needs(parameter):
        raise UsageError(
            f"--capture-k {capture_k} is smaller than the {policy.needs(parameter)} candidates that --sparsify {spec} keeps"
        )
    return Sparsifier(name, parameter, capture_k or policy.captures(parameter))


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
