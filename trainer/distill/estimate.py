"""Estimate what training will take on one device, memory and time, from configurations alone: no weights are read.

kd train --from-cache data/cache --student data/student --output-dir data/kd --dry-run
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import numpy as np
import torch

from kdcache import machine, models
from kdcache.models.identity import model_folder
from trainer.distill.plan import Run
from trainer.loss.fused import rows_per_chunk
from trainer.loss.head import scale_and_cap
from trainer.student import lora as adapters

NF4_BYTES = 0.52  # per weight, with its doubly quantized scale


def estimate(run: Run) -> dict[str, Any]:
    """Return numbers for ``--dry-run``; memory in MB of 1,000,000 bytes.

    Activations are what autograd keeps of the longest micro-batch: about 10 hidden-sized and 4 MLP-sized tensors per
    layer; with gradient checkpointing one hidden-sized tensor per layer, and all tensors of one layer. This is a rough
    estimate, and the first step tells more.
    """
    config = run.config
    shape = models.config(model_folder(config.student)).get_text_config()
    with torch.device("meta"):
        student = models.untrained(shape)
        parameters = sum(p.numel() for p in student.parameters())
        in_layers = sum(p.numel() for p in student.base_model.layers.parameters())
        adapted = adapters.add(student, dataclasses.replace(config, load_in_4bit=False))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = parameters if config.lora_r is not None else 0

    weight = getattr(torch, config.dtype).itemsize  # bytes
    in_16_bits = run.arguments.get("bf16") or run.arguments.get("fp16")
    compute_dtype = torch.bfloat16 if in_16_bits else getattr(torch, config.dtype)
    moments = 2 if "8bit" in str(run.arguments.get("optim", "")) else 2 * weight
    tokens = int(np.sort(run.train.tokens)[-run.samples_per_device :].sum())
    kept_per_layer = 10 * shape.hidden_size + 4 * shape.intermediate_size
    kept = shape.num_hidden_layers * kept_per_layer
    if run.arguments.get("gradient_checkpointing"):
        kept = shape.num_hidden_layers * shape.hidden_size + kept_per_layer
    rows = rows_per_chunk(shape.vocab_size, compute_dtype, scale_and_cap(shape)[1] is not None)
    frozen_bytes: float = frozen * weight
    if config.load_in_4bit:  # the layers alone are quantized, not the embeddings and the head
        frozen_bytes = (frozen - in_layers) * weight + in_layers * NF4_BYTES
    parts = {
        "frozen weights": frozen_bytes,
        "trained weights": trained * weight,
        "gradients": trained * weight,
        "optimizer": trained * moments,
        "head chunk": min(rows, tokens) * shape.vocab_size * 4,
        "activations": tokens * kept * compute_dtype.itemsize,
    }
    # Per token and parameter: 2 operations forward, 4 backward (Kaplan et al. 2020, arXiv:2001.08361).
    flops = 6.0 * parameters * float(run.train.tokens.mean()) * run.samples_per_step * run.max_steps
    seconds = flops / (run.ranks * matmul_flops_per_second(shape.hidden_size, shape.intermediate_size, compute_dtype))
    return {
        "parameters": parameters,
        "trained_parameters": trained,
        "head_chunk_rows": rows,
        "longest_micro_batch_tokens": tokens,
        "training_flops": f"{flops:.2e}",
        "eta_at_least": f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}",
        "memory_mb": {name: round(size / 1e6) for name, size in parts.items() if size},
        "peak_memory_mb": round(sum(parts.values()) / 1e6),
    }


def matmul_flops_per_second(hidden: int, intermediate: int, dtype: torch.dtype, rows: int = 1024) -> float:
    """Return what this device reaches in an MLP's matrix product, the best of three."""
    device = machine.torch_device()
    a, b = (
        torch.ones(rows, hidden, dtype=dtype, device=device),
        torch.ones(hidden, intermediate, dtype=dtype, device=device),
    )
    best = math.inf
    for _ in range(4):  # the first warms up
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * hidden * intermediate / best
