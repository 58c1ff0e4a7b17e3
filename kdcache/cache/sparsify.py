"""Decide what to keep of a teacher's distribution: [T, K] captured rows become a few candidates per position.

Each policy is one class, and ``POLICIES`` names them. Pure numpy.

Invariant: at every position the candidates are sorted best first, the first is the teacher's best token, no id occurs
twice, and candidates + tail carry the whole mass (``topk``: up to rounding; ``threshold``: to within TAU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from kdcache.cache.candidates import Candidates
from kdcache.cache.format import CODEBOOK, MIN_TAIL_MASS, round_logprobs
from kdcache.errors import UsageError
from kdcache.hashing import uniforms

#: How many candidates the engine returns for a policy that samples from them, unless --capture-k says otherwise.
DEFAULT_CAPTURE_K = 256


class Policy(Protocol):
    """What the rest of the program needs to know of a policy."""

    capture_k: int  # how many candidates per position the engine has to return
    samples: ClassVar[bool]  # whether unlikely candidates are drawn at random: only losses linear in p are unbiased

    @classmethod
    def parse(cls, text: str, capture_k: int | None) -> Policy:
        """Parse what follows the colon; ValueError with what was expected. ``capture_k`` is None for the default."""
        ...

    def __call__(self, ids: np.ndarray, logprobs: np.ndarray, seed: int = 0, sample_id: str = "") -> Candidates:
        """Sparsify one completion: ``ids`` and ``logprobs`` are [T, K], best first.

        What is drawn depends on (seed, sample_id, position) alone, whatever else is in the cache.
        """
        ...

    @property
    def most_candidates(self) -> int:
        """The most candidates of a position; ``threshold`` can exceed it where no token reaches TAU, which is rare."""
        ...

    @property
    def least_capture_k(self) -> int:
        """The smallest ``capture_k`` that this policy can work with."""
        ...

    @property
    def mass_error(self) -> float:
        """How far candidates + tail may be from 1 before rounding."""
        ...

    @property
    def largest_drawn_logprob(self) -> float | None:
        """The log-probability that drawn candidates are stored with at most, in nats; None if none is drawn."""
        ...


@dataclass(frozen=True)
class TopK:
    """``topk:K`` keeps the K best, and the mass of all others as one number, the *bucket*."""

    k: int
    capture_k: int

    samples: ClassVar[bool] = False
    mass_error: ClassVar[float] = 0.0
    largest_drawn_logprob: ClassVar[None] = None

    @classmethod
    def parse(cls, text: str, capture_k: int | None) -> TopK:
        """Parse K; ValueError with what was expected."""
        k = _number(text)
        if not (k >= 1 and k % 1 == 0):
            raise ValueError("topk:K with a whole number K of at least 1, as in topk:64")
        return cls(int(k), int(k) if capture_k is None else capture_k)

    @property
    def most_candidates(self) -> int:
        return self.k

    @property
    def least_capture_k(self) -> int:
        return self.k

    def __call__(self, ids: np.ndarray, logprobs: np.ndarray, seed: int = 0, sample_id: str = "") -> Candidates:
        positions, captured = ids.shape
        kept = min(self.k, captured)
        return Candidates(
            ids=np.ascontiguousarray(ids[:, :kept], dtype=np.int32).reshape(-1),
            logprobs=np.ascontiguousarray(logprobs[:, :kept], dtype=np.float32).reshape(-1),
            counts=np.full(positions, kept, dtype=np.int32),
            tails=log_tail(logprobs[:, :kept]),
        )

    def __str__(self) -> str:
        return f"topk:{self.k}"


@dataclass(frozen=True)
class Threshold:
    """``threshold:TAU`` keeps tokens with p >= TAU as they are, and of the others a systematic sample with step TAU.

    A token with p < TAU is kept with probability p / TAU and stored with probability TAU: an unbiased estimate of the
    captured distribution, whose total is off by less than TAU. The mass beyond the captured K stays as the tail.

    TAU is snapped to the codebook first, because otherwise rounding would shift every sampled weight the same way.
    Where no token reaches TAU, the step is the best token's probability (snapped down), so that the teacher's choice
    is always the first candidate and the order is the teacher's.

    Systematic sampling (Madow 1949): the tokens' p / step are laid end to end on a line, and a token is kept if one of
    the points u, u + 1, u + 2, ... falls on it, where u is one uniform number in [0, 1) per position.
    """

    tau: float
    capture_k: int

    samples: ClassVar[bool] = True
    least_capture_k: ClassVar[int] = 1

    @classmethod
    def parse(cls, text: str, capture_k: int | None) -> Threshold:
        """Parse TAU; ValueError with what was expected."""
        tau = _number(text)
        if not 0 < tau < 1:
            raise ValueError("threshold:TAU with TAU between 0 and 1, as in threshold:0.02")
        return cls(tau, DEFAULT_CAPTURE_K if capture_k is None else capture_k)

    @property
    def most_candidates(self) -> int:
        return min(self.capture_k, int(1 / self.tau + 1))

    @property
    def mass_error(self) -> float:
        return self.tau

    @property
    def largest_drawn_logprob(self) -> float:
        return float(round_logprobs(np.log(np.array([self.tau], dtype=np.float32)))[0])

    def __call__(self, ids: np.ndarray, logprobs: np.ndarray, seed: int = 0, sample_id: str = "") -> Candidates:
        uniform = uniforms(len(ids), seed, sample_id)
        # The codebook falls from 0 to -24, so its negative is sorted: the first value that is not above the best token.
        best = CODEBOOK[np.searchsorted(-CODEBOOK, -logprobs[:, 0], side="left").clip(max=len(CODEBOOK) - 1)]
        step = np.minimum(np.float32(self.largest_drawn_logprob), best)[:, None]  # [T, 1] log
        large = logprobs >= step  # [T, K]
        large[:, 0] = True
        shares = np.where(large, 0.0, np.exp(logprobs.astype(np.float64) - step))  # [T, K] p / step of the small ones
        points = np.ceil(np.cumsum(shares, axis=1) - uniform[:, None])  # [T, K] sampling points up to a token's end
        kept = large | (np.diff(points, axis=1, prepend=0.0) > 0)
        return Candidates(
            ids=ids[kept].astype(np.int32, copy=False),
            logprobs=np.maximum(logprobs, step)[kept].astype(np.float32, copy=False),
            counts=kept.sum(axis=1, dtype=np.int32),
            tails=log_tail(logprobs),
        )

    def __str__(self) -> str:
        return f"threshold:{self.tau:g}"


#: To add a policy, write its class above and name it here. Other code asks a policy only what ``Policy`` declares.
POLICIES: dict[str, Any] = {"topk": TopK, "threshold": Threshold}


def parse(spec: str, capture_k: int | None = None) -> Policy:
    """Parse ``topk:K`` or ``threshold:TAU``; raise UsageError if the text or ``capture_k`` makes no sense."""
    name, _, text = spec.partition(":")
    if name not in POLICIES:
        raise UsageError(f"--sparsify {spec}: unknown policy {name!r}; known: {', '.join(POLICIES)} (as in topk:64)")
    try:
        policy = POLICIES[name].parse(text, capture_k)
    except ValueError as error:
        raise UsageError(f"--sparsify {spec}: expected {error}") from None
    if policy.capture_k < policy.least_capture_k:
        raise UsageError(
            f"--capture-k {capture_k} is smaller than the {policy.least_capture_k} candidates that --sparsify {spec} "
            "keeps"
        )
    return policy


def _number(text: str) -> float:
    """Return a finite number, or NaN."""
    try:
        number = float(text)
    except ValueError:
        return float("nan")
    return number if np.isfinite(number) else float("nan")


def tail_mass(logprobs: np.ndarray) -> np.ndarray:
    """Return [T] float64: the probability outside the K of [T, K], 0 where float32 log-probabilities show none."""
    mass = 1.0 - np.exp(logprobs.astype(np.float64)).sum(axis=1)
    return np.where(mass < MIN_TAIL_MASS, 0.0, mass)


def log_tail(logprobs: np.ndarray) -> np.ndarray:
    """Return [T] float32: the logarithm of ``tail_mass`` of [T, K], -inf for none."""
    with np.errstate(divide="ignore"):
        return np.log(tail_mass(logprobs)).astype(np.float32)


def entropies(logprobs: np.ndarray) -> np.ndarray:
    """Return [T] float32: the entropy in nats of [T, K], the K candidates and the rest as one cell.

    The rest counts as if it were a single token, so this is a lower bound of the full-vocabulary entropy, which grows
    with K.
    """
    logs = logprobs.astype(np.float64)
    rest = tail_mass(logprobs)
    with np.errstate(divide="ignore", invalid="ignore"):
        head = -(np.where(np.isneginf(logs), 0.0, np.exp(logs) * logs)).sum(axis=1)
        bucket = np.where(rest > 0, -rest * np.log(np.where(rest > 0, rest, 1.0)), 0.0)
    return np.maximum(head + bucket, 0.0).astype(np.float32)
