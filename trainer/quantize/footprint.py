"""What models take and how fast they run, side by side: disk, weights, peak memory, prefill and decode speed.

Each measurement is a fresh process that loads one model as its folder says. Models take turns, round by round, so that a
machine that is busy for a while is busy for all of them; what is said is the median over rounds, and of the ratios
within a round. One sequence at a time (batch 1). `kd quantize` runs it; it measures any model folders.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from kdcache import machine, quiet
from kdcache.errors import KDError
from kdcache.models import identity
from trainer.student.load import load_student

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 64, 2


def compare(
    before: str, after: str, prompt_ids: Sequence[int], rounds: int, progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """One row a figure: its medians before and after, the median ratio of a round, and the ratios' range over rounds."""
    taken: dict[str, list[dict[str, float]]] = {before: [], after: []}
    for number in range(rounds):
        for model in (before, after) if number % 2 == 0 else (after, before):
            taken[model].append(_apart(model, prompt_ids))
            progress(sum(map(len, taken.values())), 2 * rounds)
    found = []
    for name, unit in UNITS.items():
        pairs = [(one[name], other[name]) for one, other in zip(taken[before], taken[after])]
        ratios = sorted(other / one for one, other in pairs)
        medians = [statistics.median(values) for values in zip(*pairs)]
        row = {"metric": name, "unit": unit, "before": medians[0], "after": medians[1]}
        found.append(row | {"ratio": statistics.median(ratios), "ratio_range": (ratios[0], ratios[-1])})
    return found


UNITS = {
    "disk": "MB",
    "weights in memory": "MB",
    "peak memory": "MB",
    "prefill": "tokens/s",
    "decode": "tokens/s",
}


def _apart(model: str, prompt_ids: Sequence[int]) -> dict[str, float]:
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(measure, model, list(prompt_ids)).result()
    except BrokenProcessPool:
        raise KDError(f"{model}: the process that measured it was killed; is there memory enough for it?") from None


@torch.no_grad()
def measure(model: str, prompt_ids: Sequence[int]) -> dict[str, float]:
    """The figures of one model in this process; MB of 1,000,000 bytes."""
    quiet.libraries()  # this process is a new one
    student, _ = load_student(model, "auto")
    device = machine.torch_device()
    student.to(device).eval()
    ids = torch.tensor([list(prompt_ids)], device=device)  # [1, T]
    prefill_seconds, decode_seconds = [], []
    for repeat in range(1 + REPEATS):
        started = _now()
        output = student(ids, use_cache=True, logits_to_keep=1)
        prefilled = _now()
        for _ in range(NEW_TOKENS):
            best = output.logits[:, -1:].argmax(-1)  # [1, 1]
            output = student(best, past_key_values=output.past_key_values, use_cache=True)
        if repeat:  # the first warms up; compressed-tensors expands the weights in it
            prefill_seconds.append(prefilled - started)
            decode_seconds.append(_now() - prefilled)
    return {
        "disk": sum(file.stat().st_size for file in identity.weight_files(identity.model_folder(model))) / 1e6,
        "weights in memory": weight_bytes(student) / 1e6,
        "peak memory": _peak_bytes() / 1e6,
        "prefill": len(prompt_ids) / statistics.median(prefill_seconds),
        "decode": NEW_TOKENS / statistics.median(decode_seconds),
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """Parameters and buffers, with the scales that bitsandbytes keeps beside a parameter."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of 4 bits
        scales = state.as_dict(packed=False).values() if state is not None else [getattr(parameter, "SCB", None)]
        tensors += [value for value in scales if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    """Of the GPU's memory; else the peak resident memory of this process."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_resident_bytes()
