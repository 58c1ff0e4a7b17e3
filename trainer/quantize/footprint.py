"""What a model takes and how fast it runs: disk, weights, peak memory, prefill and decode speed.

Each measurement is a fresh process that loads one model as its folder says. Two models take turns, round by round, so that
a machine that is busy for a while slows both. One sequence at a time (batch 1). `kd quantize` runs it; it measures
any model folder.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from kdcache import machine, quiet
from kdcache.errors import KDError
from kdcache.models import identity
from kdcache.progress import Progress, ShowProgress
from trainer.student.load import load_student

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 64, 2


UNITS = {
    "disk": "MB",
    "weights in memory": "MB",
    "peak memory": "MB",
    "prefill": "tokens/s",
    "decode": "tokens/s",
}


def in_turns(
    before: str, after: str, prompt_ids: Sequence[int], rounds: int, show: ShowProgress
) -> dict[str, list[dict[str, float]]]:
    """Return model -> its figures in each round; the other model goes first in every second one."""
    of_model: dict[str, list[dict[str, float]]] = {before: [], after: []}
    for number in range(rounds):
        for model in (before, after) if number % 2 == 0 else (after, before):
            of_model[model].append(_in_fresh_process(model, prompt_ids))
            show(Progress(sum(map(len, of_model.values())), 2 * rounds, "measurements", "in turns"))
    return of_model


def _in_fresh_process(model: str, prompt_ids: Sequence[int]) -> dict[str, float]:
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            return process.submit(measure, model, list(prompt_ids)).result()
    except BrokenProcessPool:
        raise KDError(f"{model}: the process that measured it was killed; it may have needed more memory") from None


@torch.no_grad()
def measure(model: str, prompt_ids: Sequence[int]) -> dict[str, float]:
    """Return the figures of one model in this process, by the names of UNITS; MB of 1,000,000 bytes."""
    quiet.libraries()  # nobody has called it yet in this process
    student, _ = load_student(model, "auto")
    device = machine.torch_device()
    student.to(device).eval()
    ids = torch.tensor([list(prompt_ids)], device=device)  # [1, T]
    prefill_seconds, decode_seconds = [], []
    for repeat in range(1 + REPEATS):
        started = _seconds()
        output = student(ids, use_cache=True, logits_to_keep=1)
        prefilled = _seconds()
        for _ in range(NEW_TOKENS):
            best = output.logits[:, -1:].argmax(-1)  # [1, 1]
            output = student(best, past_key_values=output.past_key_values, use_cache=True)
        if repeat:  # the first pass warms up; compressed-tensors expands the weights in it
            prefill_seconds.append(prefilled - started)
            decode_seconds.append(_seconds() - prefilled)
    return {
        "disk": sum(file.stat().st_size for file in identity.weight_files(identity.model_folder(model))) / 1e6,
        "weights in memory": weight_bytes(student) / 1e6,
        "peak memory": _peak_bytes() / 1e6,
        "prefill": len(prompt_ids) / statistics.median(prefill_seconds),
        "decode": NEW_TOKENS / statistics.median(decode_seconds),
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of parameters and buffers, with the scales that bitsandbytes keeps beside a parameter."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        four_bits = getattr(parameter, "quant_state", None)
        eight_bits = getattr(parameter, "SCB", None)
        scales = [eight_bits] if four_bits is None else four_bits.as_dict(packed=False).values()
        tensors += [value for value in scales if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _seconds() -> float:
    """Return a clock reading after everything that the GPU was given is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    """Return the peak of the GPU's memory, or without a GPU of this process's resident memory."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_resident_bytes()
