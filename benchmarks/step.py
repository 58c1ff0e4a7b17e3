"""What does one optimizer step cost? Distilling from the cache against fine-tuning alone, and against a live teacher.

    kd init-student --from embedded --keep-layers 20 --out data/student
    kd cache-teacher --limit 200 --sparsify topk:64 --out data/c
    python benchmarks/step.py data/c --student data/student      # about half an hour on two quiet cores

A step is forward, backward and AdamW on one packed batch of the cache, on the CPU. The arms get the very same samples:
`sft` (alpha 0) and `kd` (alpha 0.5) by trainer.distill.trainer; and, with the teacher in memory and its forward pass in the
step, the forward KL alone:
`trl_gkd`, by TRL's GKDTrainer, off-policy (lmbda 0, beta 0), on rows padded by its own collator, no checkpointing;
`online_dense`, the same loss of TRL's on all logits of the packed batch, without padding;
`online_chunked`, the loss of TRL's DistillationTrainer, never all logits, on supervised positions of the packed batch.
The last two are kinder to TRL than it is: it offers neither for given answers.

`sft` and `kd` are timed in pairs, then `kd` and those with a teacher in rounds: all on one batch, in an order that
rotates. A ratio is the median over rounds, with a bootstrap 95% interval. For memory every arm runs in its own
process: peak resident memory with the interpreter and libraries, which are the same in all (`none` has only those).
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from shared import hardware, peak_bytes, ratio
from torch import Tensor
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from kdcache.cache import documents
from kdcache.cache.reader import Cache
from kdcache.machine import cpu, versions
from kdcache.storage import atomic
from trainer.data.pack import IGNORE, Batch
from trainer.data.select import select
from trainer.data.stream import Stream
from trainer.distill.trainer import attach_loss
from trainer.student.attention import layers_of
from trainer.student.load import load_student

HERE = Path(__file__).parent
ALPHA = 0.5
MEMORY_STEPS = 3
CACHED, ONLINE = ("sft", "kd"), ("trl_gkd", "online_dense", "online_chunked")
ARMS = (*CACHED, *ONLINE)
RATIOS = (("kd", "sft"), *((arm, "kd") for arm in ONLINE))
GOALS = {
    "kd_over_sft": "time 1.05 (upper end under 1.10), memory the same",
    "trl_gkd_over_kd": "time at least 2, memory at least 1.6",
}
Arm = tuple[Any, Callable[[Batch], Tensor]]
Times = dict[str, dict[str, list[float]]]  # seconds of every round, by group and arm


def make_batches(options: argparse.Namespace, count: int) -> list[Batch]:
    selection = select([Cache(options.cache)], "train", None, options.max_length)
    head_rows = documents.read_plan(options.cache)["vocab_size"]
    stream = Stream(selection, head_rows, options.samples)
    batches: list[Batch] = []
    while len(batches) < count:
        batches.extend(islice(stream, count - len(batches)))
    return batches


# --- arms: the loss of a packed batch, and the student's forward it needs ---------------------------------------------


def make_arms(options: argparse.Namespace, student: Any, tokenizer: Any, names: tuple[str, ...]) -> dict[str, Arm]:
    plain_forward = student.forward
    arms: dict[str, Arm] = {}
    for name, alpha in (("sft", 0.0), ("kd", ALPHA)):
        attach_loss(student, alpha)
        arms[name] = student.forward, lambda batch: student(**batch)["loss"]
        student.forward = plain_forward
    if set(names) & set(ONLINE):
        teacher, _ = load_student(options.teacher, options.teacher_dtype)
        arms |= packed_online(student, teacher.eval())
        if "trl_gkd" in names:
            arms["trl_gkd"] = trl_gkd(student, teacher, tokenizer)
            student.forward = plain_forward
    return arms


def packed_online(student: Any, teacher: Any) -> dict[str, Arm]:
    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    layers_of_student, layers_of_teacher = layers_of(student), layers_of(teacher)

    def online_dense(batch: Batch) -> Tensor:
        with torch.no_grad():
            teacher_logits = heads[1](layers_of_teacher(batch["input_ids"], batch["offsets"]))[None]  # (1, L, V)
        student_logits = heads[0](layers_of_student(batch["input_ids"], batch["offsets"]))[None]
        return GKDTrainer.generalized_jsd_loss(student_logits, teacher_logits, labels=batch["shift_labels"], beta=0.0)

    def online_chunked(batch: Batch) -> Tensor:
        has_loss = batch["shift_labels"][0] != IGNORE
        with torch.no_grad():
            teacher_hidden = layers_of_teacher(batch["input_ids"], batch["offsets"])[has_loss][None]  # (1, N, D)
        student_hidden = layers_of_student(batch["input_ids"], batch["offsets"])[has_loss][None]
        return _chunked_divergence_loss(
            student_hidden,
            teacher_hidden,
            *(head.weight for head in heads),
            torch.ones(student_hidden.shape[:2]),
            beta=0.0,
        )[0]

    return {run.__name__: (student.forward, run) for run in (online_dense, online_chunked)}


def trl_gkd(student: Any, teacher: Any, tokenizer: Any) -> Arm:
    """Return the loss of GKDTrainer itself, on what its collator makes of the samples in a packed batch."""
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]}])
    with tempfile.TemporaryDirectory() as unused:
        config = GKDConfig(unused, lmbda=0.0, beta=0.0, bf16=False, gradient_checkpointing=False, use_cpu=True)
        trainer = GKDTrainer(student, teacher, config, train_dataset=rows, processing_class=tokenizer)
    return student.forward, lambda batch: trainer.compute_loss(student, trainer.data_collator(rows_of(batch)))


def rows_of(batch: Batch) -> list[dict[str, Any]]:
    """Return the samples of a packed batch, as the collator of GKDTrainer takes them."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    rows = []
    for first, last in itertools.pairwise(batch["offsets"].tolist()):
        mask = [int(label != IGNORE) for label in labels[first:last]]
        rows.append({"prompt": "", "input_ids": ids[first:last], "completion_mask": mask})
    return rows


# --- measuring --------------------------------------------------------------------------------------------------------


def make_step(options: argparse.Namespace, names: tuple[str, ...]) -> Callable[[str, Batch], float]:
    """A whole step of a named arm, which returns the loss. All train one student with one optimizer.

    The learning rate is 0: AdamW does the same work, and every arm meets the same weights.
    """
    student, tokenizer = load_student(str(options.student), options.dtype)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.01, fused=True)
    arms = make_arms(options, student, tokenizer, names)

    def step(name: str, batch: Batch) -> float:
        student.forward, arm = arms[name]
        loss = arm(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure_time(
    options: argparse.Namespace, names: tuple[str, ...], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the seconds of every round by arm, and the positions per step: packed, with a loss, and padded."""
    batches = make_batches(options, rounds + 1)  # the first warms up
    step = make_step(options, names)
    tolerance = 1e-3 if options.dtype == options.teacher_dtype == "float32" else 0.05
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number, batch in enumerate(batches):
        turn = number // 2 % len(names)
        order = names[turn:] + names[:turn]
        losses: dict[str, float] = {}
        for name in order if number % 2 else reversed(order):
            begun = time.perf_counter()
            losses[name] = step(name, batch)
            if number:
                taken[name].append(round(time.perf_counter() - begun, 4))
        check_same([losses[name] for name in names if name in ONLINE], tolerance)
        print(f"round {number} of {rounds}: {', '.join(names)}", file=sys.stderr, flush=True)
    lengths = [[len(row["input_ids"]) for row in rows_of(batch)] for batch in batches[1:]]
    return taken, {
        "packed": statistics.mean(map(sum, lengths)),
        "with_loss": statistics.mean(len(batch["tail_logprobs"]) for batch in batches[1:]),
        "padded": statistics.mean(len(row) * max(row) for row in lengths),
    }


def check_same(losses: list[float], tolerance: float) -> None:
    """Stop unless all arms with a live teacher have the same loss: else the times of different losses are compared."""
    if losses and max(losses) > (1 + tolerance) * min(losses):
        raise SystemExit(f"the losses with the live teacher differ: {losses}")


def peak_mb(arm: str) -> float:
    """Return the peak memory of a process that runs one arm (``none``: the same libraries and batches, no model)."""
    return round(peak_bytes([sys.executable, __file__, *sys.argv[1:], "--arm", arm]) / 1e6, 1)


def run_one(options: argparse.Namespace) -> None:
    batches = make_batches(options, MEMORY_STEPS)
    if options.arm != "none":
        step = make_step(options, (options.arm,))
        for batch in batches:
            step(options.arm, batch)


def compare(above: str, below: str, taken: Times, peak: dict[str, int]) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    times = taken.get("pairs" if below == "sft" else "rounds")
    if times:
        entry["time"] = ratio([a / b for a, b in zip(times[above], times[below])])
    if peak:
        entry["memory"] = round(peak[above] / peak[below], 4)
        entry["memory_above_none"] = round((peak[above] - peak["none"]) / (peak[below] - peak["none"]), 4)
    return entry


def show(results: dict[str, Any]) -> None:
    print(f"{results['sparsify']}, {results['samples_per_step']} samples per step, {results['dtype']}, ", end="")
    print(f"teacher {results['teacher_dtype']}; {results['machine']}, {results['threads']} threads, {results['date']}")
    for group, times in results["seconds"].items():
        positions = ", ".join(f"{name} {mean:,.0f}" for name, mean in results["positions_per_step"][group].items())
        print(f"\n{f'{group}: seconds per step':<28}  (positions: {positions})")
        for name, seconds in times.items():
            print(f"{name:<16}  {seconds:10.3f}")
    if results["peak_mb"]:
        print(f"\n{'peak memory, MB':<28}")
    for name, megabytes in results["peak_mb"].items():
        print(f"{name:<16}  {megabytes:10,}")
    print()
    for name, entry in results["ratios"].items():
        measures = []
        if "time" in entry:
            low, high = entry["time"]["interval"]
            measures.append(f"time {entry['time']['median']:.3f} ({low:.3f} to {high:.3f})")
        if "memory" in entry:
            measures.append(f"memory {entry['memory']:.3f} ({entry['memory_above_none']:.3f} above none)")
        goal = f"   [goal: {GOALS[name]}]" if name in GOALS else ""
        print(f"{name:<22}  {', '.join(measures)}{goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--dtype", default="float32", help="of the student")
    parser.add_argument("--teacher-dtype", default="float32")
    parser.add_argument("--samples", type=int, default=8, help="samples per step")
    parser.add_argument("--max-length", type=int, default=512, help="longer samples are left out")
    parser.add_argument("--pairs", type=int, default=40, help="of sft and kd, for time; 0 skips it")
    parser.add_argument("--rounds", type=int, default=12, help="of kd and those with the teacher; 0 skips it")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes per arm; 0 skips memory")
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a child process runs, for memory
    parser.add_argument("--hardware", default=hardware())
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if options.arm:
        return run_one(options)
    # Memory first: a process's peak counts what its parent held when it was started.
    peaks: dict[str, list[float]] = {name: [] for name in ("none", *ARMS)}
    for number in range(options.memory_runs):
        for name in peaks:
            peaks[name].append(peak_mb(name))
        print(f"memory run {number + 1} of {options.memory_runs}", file=sys.stderr, flush=True)
    taken: Times = {}
    positions: dict[str, dict[str, float]] = {}
    for group, names, rounds in (("pairs", CACHED, options.pairs), ("rounds", ("kd", *ONLINE), options.rounds)):
        if rounds:
            taken[group], positions[group] = measure_time(options, names, rounds)
    sparsify = documents.read_plan(options.cache)["fields"]["sparsify"]
    peak = {name: round(statistics.median(runs)) for name, runs in peaks.items() if runs}
    results: dict[str, Any] = {
        "date": str(date.today()),
        "machine": cpu(),
        "versions": versions("kdcache", "torch", "transformers", "trl"),
        "threads": torch.get_num_threads(),
        "sparsify": sparsify,
        "alpha": ALPHA,
        "dtype": options.dtype,
        "teacher_dtype": options.teacher_dtype,
        "samples_per_step": options.samples,
        "positions_per_step": positions,
        "seconds": {
            group: {name: round(statistics.median(times), 4) for name, times in arms.items()}
            for group, arms in taken.items()
        },
        "peak_mb": peak,
        "ratios": {f"{above}_over_{below}": compare(above, below, taken, peak) for above, below in RATIOS},
        "goals": GOALS,
        "memory_runs": peaks,
        **taken,
    }
    show(results)
    name = f"step-{re.sub(r'[^a-z0-9.]+', '-', sparsify)}-{options.dtype}-{options.hardware}-{results['date']}.json"
    options.results.mkdir(parents=True, exist_ok=True)
    atomic.write_json(options.results / name, results)


if __name__ == "__main__":
    main()
