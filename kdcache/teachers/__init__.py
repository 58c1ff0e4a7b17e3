"""What a teacher is: it takes requests (score a given answer, or sample one) and yields [T, K] arrays for each.

Shapes: T completion positions, K candidates per position. ``vllm`` is the engine for real work; ``transformers`` is the
reference that vllm is checked against, and serves where vllm cannot be installed. Both return natural log-probabilities
of the full-vocabulary softmax at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from kdcache.settings import option

if TYPE_CHECKING:  # `kd --help` imports this module
    import numpy as np

ENGINES = ("vllm", "transformers")


@dataclass(frozen=True)
class Sampling:
    """How a teacher's own answers are drawn."""

    temperature: float = option(
        1.0, "Temperature of sampling; 0 is greedy. Stored log-probabilities are always at temperature 1."
    )
    top_p: float = option(1.0, "Sample from the most probable tokens that together have this probability.")
    max_tokens: int = option(256, "Maximum number of tokens in a sampled answer.")


@dataclass(frozen=True)
class Request:
    """Score ``completion_ids`` after ``prompt_ids``; with ``completion_ids`` None, sample one with ``seed``."""

    key: tuple[str, str]  # shard and sample_id
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int] | None = None
    seed: int | None = None
    sampling: Sampling | None = None  # wins over the engine's (vLLM only)


@dataclass(frozen=True)
class Answer:
    """The teacher's distributions at the T positions of one completion."""

    completion_ids: Sequence[int]  # [T]
    ids: np.ndarray  # [T, K] int32, best first
    logprobs: np.ndarray  # [T, K] float32, nats
    token_logprobs: np.ndarray  # [T] float32, nats, of the completion's own tokens
    token_ranks: np.ndarray  # [T] int32, 1-based; ties count against the token
    finish_reason: str | None = None  # of sampled answers: stop | length


@dataclass(frozen=True)
class Refusal:
    """Why the teacher could not answer one request. The other requests are not affected."""

    reason: str


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is started."""

    model: str
    capture_k: int
    max_model_len: int
    dtype: str
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()  # that end an answer, besides those of the model's generation_config
    extra: dict[str, Any] = field(default_factory=dict)  # the engine's own options, by its names


class Teacher(Protocol):
    """A loaded engine."""

    version: str  # engine and version, for the records

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Yield answers in the order in which they are ready. Requests are drawn when the engine has room for them."""
        ...


Say = Callable[[str], None]  # takes a sentence for the user
