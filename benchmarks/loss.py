"""What does the fused loss cost? Time of a forward and backward pass, and peak memory, compared with what it replaces.

    python benchmarks/loss.py                                  # an hour on two quiet cores
    python benchmarks/loss.py --sizes 49152x576x256 --rounds 15

Arms, in float32 on random hidden states and a random teacher: `fused_kd` (alpha 0.5, k = 64), `fused_ce` (alpha 0
through the same code), `reference` (all logits, forward KL with a bucket and cross-entropy by autograd) and `dense` (the
usual full-vocabulary distillation from the teacher's [N, V] logits). Every round runs all arms, in an order that
rotates; a ratio is the median over rounds, with a bootstrap 95% interval. For memory every arm runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from shared import hardware, peak_bytes, ratio
from torch import Tensor
from torch.nn import functional

from trainer.loss import fused
from trainer.loss import reference as losses

K, ALPHA = 64, 0.5
ARMS = ("fused_kd", "fused_ce", "reference", "dense")
RATIOS = (("fused_kd", "fused_ce"), ("fused_kd", "reference"), ("fused_kd", "dense"))
#: Vocabulary, hidden size, positions: SmolLM2-135M's head and Qwen2.5-0.5B's.
SIZES = [(49_152, 576, n) for n in (256, 1024, 4096)] + [(151_936, 896, n) for n in (256, 1024)]
LARGE = [(151_936, 896, 4096)]  # for memory alone
#: [N, V] float32 tensors that an arm holds at once, to skip what does not fit.
WHOLE = {"fused_kd": 0, "fused_ce": 0, "reference": 6, "dense": 8}


def make_arms(v: int, d: int, n: int, names: tuple[str, ...] = ARMS) -> dict[str, Callable[[], None]]:
    """Return each arm as a function that forms the loss of the same inputs, and the gradients of hidden states and head."""
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=chance).requires_grad_()
    weight = torch.randn(v, d, generator=chance).mul_(3 * d**-0.5).requires_grad_()
    targets = torch.randint(0, v, (n,), generator=chance)
    steps = torch.randint(1, v // K, (n, 1), generator=chance)
    ids = (targets[:, None] + steps * torch.arange(K)) % v  # K different ids per row, all over the vocabulary
    cells = torch.log_softmax(3 * torch.randn(n, K + 1, generator=chance), -1).sort(-1, descending=True).values
    teacher = ids, cells[:, :K].contiguous(), cells[:, K].contiguous()
    teacher_logits = torch.randn(n, v, generator=chance).mul_(3) if "dense" in names else None

    def fused_kd() -> Tensor:
        return fused.distillation_loss(hidden, weight, targets, *teacher, ALPHA).loss

    def fused_ce() -> Tensor:
        return fused.distillation_loss(hidden, weight, targets, *teacher, 0.0).loss

    def reference() -> Tensor:
        logits = hidden @ weight.t()
        ce, kl = losses.cross_entropy(logits, targets), losses.divergence("forward_kl", logits, *teacher)
        return (1 - ALPHA) * ce.sum() + ALPHA * kl.sum()

    def dense() -> Tensor:
        logits = hidden @ weight.t()
        log_q, log_p = functional.log_softmax(logits, -1), functional.log_softmax(teacher_logits, -1)
        kl = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
        return (1 - ALPHA) * functional.cross_entropy(logits, targets, reduction="sum") + ALPHA * kl

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = weight.grad = None
        (loss() / n).backward()

    return {f.__name__: (lambda f=f: step(f)) for f in (fused_kd, fused_ce, reference, dense) if f.__name__ in names}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_time(v: int, d: int, n: int, rounds: int) -> dict[str, Any]:
    arms = make_arms(v, d, n)
    for run in arms.values():
        run()
    seconds_of: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number % 2 else reversed(order):
            seconds_of[name].append(seconds(arms[name]))
    entry: dict[str, Any] = {"seconds": {name: round(statistics.median(t), 4) for name, t in seconds_of.items()}}
    for above, below in RATIOS:
        ratios = [a / b for a, b in zip(seconds_of[above], seconds_of[below])]
        entry[f"{above}_over_{below}"] = ratio(ratios) | {"ratios": [round(r, 4) for r in ratios]}
    return entry


def peak_of(arm: str, v: int, d: int, n: int) -> int:
    """Return the peak memory of a process that makes the inputs and runs one arm twice (``none``: only the inputs)."""
    return peak_bytes([sys.executable, __file__, "--arm", arm, "--sizes", f"{v}x{d}x{n}"])


def measure_memory(v: int, d: int, n: int, available: float) -> dict[str, int | None]:
    """Return MB above a process that only has the inputs. The teacher's [N, V] logits count as part of ``dense``."""
    inputs = peak_of("none", v, d, n)
    fits = {arm: WHOLE[arm] * n * v * 4 < available for arm in ARMS}
    return {arm: round((peak_of(arm, v, d, n) - inputs) / 1e6) if fits[arm] else None for arm in ARMS}


def size(text: str) -> tuple[int, int, int]:
    v, d, n = map(int, text.split("x"))
    return v, d, n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=size, nargs="+", help="vocabulary x hidden size x positions")
    parser.add_argument("--rounds", type=int, default=16, help="for time; 0 skips it")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a child process runs, for memory
    parser.add_argument("--hardware", default=hardware())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.arm:
        run = make_arms(*options.sizes[0], names=(options.arm,)).get(options.arm, lambda: None)
        run()
        run()
        return
    results: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": options.hardware,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "k": K,
        "alpha": ALPHA,
        "rounds": options.rounds,
        "chunk_bytes": fused.CHUNK_BYTES,
        "sizes": [],
    }
    available = 0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    sizes = options.sizes or SIZES + LARGE
    # Memory first: a process's peak counts what its parent held when it was started.
    memory = {} if options.no_memory else {size: measure_memory(*size, available) for size in sizes}
    for v, d, n in sizes:
        entry: dict[str, Any] = {"vocabulary": v, "hidden_size": d, "positions": n}
        if memory:
            entry["peak_mb_above_inputs"] = memory[v, d, n]
        if options.rounds and (v, d, n) not in LARGE:
            entry |= measure_time(v, d, n, options.rounds)
        short = {
            k: {a: b for a, b in x.items() if a != "ratios"} if isinstance(x, dict) else x for k, x in entry.items()
        }
        print(json.dumps(short), flush=True)
        results["sizes"].append(entry)
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"loss-{options.hardware}-{results['date']}.json"
    (options.results / name).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
