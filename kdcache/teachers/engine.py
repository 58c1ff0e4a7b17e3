"""Load an engine by its name. Engines import the protocol from ``kdcache.teachers``; this module imports them."""

from __future__ import annotations

from kdcache.errors import UsageError
from kdcache.teachers import ENGINES, EngineOptions, Say, Teacher
from kdcache.teachers.device import cpu_has_bfloat16, runs_on_gpu


def load(engine: str, options: EngineOptions, say: Say = lambda _: None) -> Teacher:
    """Start an engine. KDError with what to install where its package is missing.

    ``say`` receives a sentence wherever the engine falls back to a slower way.
    """
    if engine == "vllm":
        from kdcache.teachers.vllm import VLLMTeacher

        return VLLMTeacher(options, say)
    if engine == "transformers":
        from kdcache.teachers.transformers import TransformersTeacher

        return TransformersTeacher(options)
    raise UsageError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")


def resolve_dtype(dtype: str, model_dtype: str | None, engine: str) -> str:
    """Return the dtype that ``auto`` stands for, and any other as it is.

    On a GPU ``auto`` is what vLLM would choose. On a CPU it is the checkpoint's own dtype, or float32 where the
    processor has no bfloat16 instructions, because vLLM's bfloat16 falls back to plain loops there
    (``benchmarks/dtype.py`` measures it). It is resolved here and not by the engine, because the fingerprint names it.
    """
    if dtype != "auto":
        return dtype
    if runs_on_gpu(engine):
        if engine == "vllm":
            from kdcache.teachers.vllm import preferred_dtype

            return preferred_dtype(model_dtype)
    elif not cpu_has_bfloat16():
        return "float32"
    return model_dtype or "float32"
