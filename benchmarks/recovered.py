"""How much of full-vocabulary distillation do sparse targets recover? One student is trained on each of them.

    python benchmarks/recovered.py                          # the builtin examples: about 50 minutes and 5 GB on two cores
    python benchmarks/recovered.py --text rows.jsonl        # or a .txt; the same command with --results resumes
    python benchmarks/recovered.py --students scratch --seeds 1 --tokens 4096       # a quick look, two minutes
    python benchmarks/recovered.py --show benchmarks/results/recovered-....json     # the tables again

With glibc, MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 in front saves a fifth of the time,
because memory is reused.

The yardstick is that of RS-KD (Anshumann et al. 2025, Sparse Logit Sampling): with L the cross-entropy on held-out text,
recovered = (L_CE - L_x) / (L_CE - L_full), 0% for hard labels and 100% for the whole vocabulary, pairwise by student and
seed. It is noisy where full distillation gains little over CE, and undefined where it gains nothing:
a good student, or text unlike the teacher's, learns more from labels. Read it beside L, the KL to the full
teacher (with the same ratio) and the expected calibration error (ECE, 15 bins of the best token's confidence).

The teacher is SmolLM2-135M-Instruct in float32. Students: `pruned`, 10 of its 30 layers, evenly spread; and `scratch`, a
small model of the same kind with random weights. Documents are joined and cut into sequences, one per step; a tenth of the
documents is held out. Distillation is pure (alpha 1) and on the same tokens. A seed is the order of the data, what is
drawn from the teacher, and the first weights of `scratch`; all variants share it. Each student has one learning rate.

Sparse targets go through a cache (sparsify, a q8 shard, the reader; the counts of RS-KD stay exact) and are drawn once,
so a second epoch meets the same ones. Bytes are those of the candidates in the shard; `full` counts float16 log-probabilities.

Shapes: T positions of a sequence, S sequences, V the vocabulary, D hidden, K candidates.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other waste a machine that is shared

import numpy as np
import torch
from fidelity import Answer, Layout, Sparse, as_target, counted, draw, through_shard
from shared import hardware, say
from torch import Tensor

from kdcache.cache import sparsify
from kdcache.cache.candidates import Candidates
from kdcache.examples import load as examples
from kdcache.examples import types
from kdcache.hashing import stable_hash
from kdcache.machine import cpu, versions
from kdcache.storage import atomic
from trainer.loss.fused import distillation_loss
from trainer.loss.head import Head, head_of
from trainer.student.load import load_student
from trainer.student.make import init_student

T, HELD_OUT_SEQUENCES, HELD_OUT_DOCUMENTS = 256, 24, 0.1
CAPTURED, DRAWN, BINS = 256, 50, 15
ROWS = 64  # positions evaluated at once: larger buffers are slower here
TOKENS = {"pruned": 14_336, "scratch": 40_960}  # per run
LEARNING_RATES = {"pruned": 1e-3, "scratch": 3e-3}
WARMUP, WEIGHT_DECAY, CLIP = 0.1, 0.01, 1.0
SCRATCH = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
SCRATCH_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3}
#: What is trained on: a layout, and where the loss puts the mass outside it. None: no candidates at all.
VARIANTS: dict[str, tuple[Layout, str] | None] = {
    "before": None,  # not trained
    "ce": None,
    "full": None,
    "topk:16": (Layout("topk:16", CAPTURED), "bucket"),
    "topk:64": (Layout("topk:64", CAPTURED), "bucket"),
    "topk:64-scaled": (Layout("topk:64", CAPTURED), "scaled"),
    f"draws:{DRAWN}": (Layout(f"draws:{DRAWN}", CAPTURED), "scaled"),  # of the whole vocabulary
    "threshold:0.02": (Layout("threshold:0.02", CAPTURED), "bucket"),
    "threshold:0.01": (Layout("threshold:0.01", CAPTURED), "bucket"),
}
FIELDS = {  # row of the text's jsonl -> document: the first column there is of each
    "question": ("instruction", "prompt", "question"),
    "context": ("context", "input"),
    "answer": ("response", "output", "completion", "answer"),
}
HERE = Path(__file__).parent
Run = dict[str, Any]


# --- text -------------------------------------------------------------------------------------------------------------


def documents(text: str) -> list[str]:
    """Return the documents of ``builtin``, of a .jsonl with a question and an answer per row, or of text in WikiText's form."""
    if text == "builtin":
        rows = [row for row in examples.load("builtin", types.Columns()) if isinstance(row, types.Example)]
        return [f"{row.messages[-1]['content']}\n\n{row.completion}" for row in rows]
    content = Path(text).read_text(encoding="utf-8")
    if not text.endswith(".jsonl"):
        return [part for part in re.split(r"\n(?= = [^=])|\n{3,}", content) if part.strip()]
    texts = []
    for line in content.splitlines():
        row = json.loads(line)
        parts = (next((row[name] for name in names if row.get(name)), None) for names in FIELDS.values())
        texts.append("\n\n".join(part for part in parts if part))
    return texts


def cut(texts: Iterable[str], tokenizer: Any, most: int) -> Tensor:
    """Join documents with an end-of-text id after each; return at most ``most`` sequences of it, shuffled: (S, T + 1) ids."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    sequences = torch.tensor(ids).unfold(0, T + 1, T)
    return sequences[np.random.default_rng(0).permutation(len(sequences))[:most]]


def order(seed: int, sequences: int, steps: int) -> np.ndarray:
    """Return the sequence of every step: epochs, each with an order of its own."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.permutation(sequences) for _ in range(-(-steps // sequences))])[:steps]


# --- the teacher ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """The teacher on the training sequences; its distribution is the softmax of states W^T."""

    states: list[Tensor]  # S of (T, D)
    head: Tensor  # (V, D)
    targets: dict[tuple[str, int], Sparse]  # by variant and seed, S * T positions
    bytes_per_token: dict[tuple[str, int], float]

    def logprobs(self, sequence: int) -> Tensor:
        return (self.states[sequence] @ self.head.T).log_softmax(dim=-1)


@torch.no_grad()
def teach(teacher: Any, sequences: Tensor, seeds: list[int], variants: list[str]) -> Lesson:
    """Run the teacher once, and make the targets of all seeds."""
    lesson = Lesson([], teacher.get_output_embeddings().weight.detach(), {}, {})
    rows = [Answer(f"text:{i}:g", ids[:1].tolist(), ids[1:].tolist()) for i, ids in enumerate(sequences)]
    wanted = {variant: its for variant in variants if (its := VARIANTS[variant])}
    layouts = list(dict.fromkeys(layout for layout, _ in wanted.values()))
    kept: dict[tuple[Layout, int], list[Candidates]] = {(la, seed): [] for la in layouts for seed in seeds}
    begun = time.monotonic()
    for i, row in enumerate(rows):
        lesson.states.append(teacher.base_model(input_ids=sequences[None, i, :-1], use_cache=False)[0][0].clone())
        logprobs = lesson.logprobs(i)  # (T, V)
        best, ids = (array.numpy() for array in logprobs.topk(CAPTURED))
        for (layout, seed), candidates_so_far in kept.items():
            if layout.policy.startswith("draws"):
                ranks = draw(logprobs.numpy(), stable_hash(seed, row.sample_id))[:, :DRAWN]
                candidates_so_far.append(
                    counted(ranks, np.broadcast_to(np.arange(len(lesson.head), dtype=np.int32), logprobs.shape))
                )
            else:
                keep = sparsify.parse(layout.policy, layout.capture_k)
                candidates_so_far.append(keep(ids.astype(np.int32), best, seed, row.sample_id))
        if i % 20 == 19 or i + 1 == len(rows):
            say(f"teacher: {i + 1} of {len(rows)} sequences, {time.monotonic() - begun:.0f} s")
    for (layout, seed), candidates in kept.items():
        size, samples = through_shard(layout, rows, candidates)
        for variant, (wanted_layout, rest) in wanted.items():
            if wanted_layout == layout:
                lesson.targets[variant, seed] = as_target(samples, rest, sequences[:, 1:].flatten().numpy())
                lesson.bytes_per_token[variant, seed] = size
    return lesson


# --- students ---------------------------------------------------------------------------------------------------------


def make_student(name: str, teacher: Any, seed: int) -> Any:
    if name == "pruned":
        with tempfile.TemporaryDirectory() as folder:
            init_student("embedded", Path(folder) / "student", "10", overwrite=True)
            return load_student(str(Path(folder) / "student"), "float32")[0]
    torch.manual_seed(seed)
    config = copy.deepcopy(teacher.config)
    config.update(SCRATCH | SCRATCH_HEADS)
    return type(teacher)(config)


def train(student: Any, variant: str, seed: int, sequences: Tensor, steps: int, rate: float, lesson: Lesson) -> None:
    head = head_of(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)

    def factor(step: int) -> float:  # a warm-up, then a cosine to 0
        warmup = max(1, round(WARMUP * steps))
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup + 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    student.train()
    for sequence in order(seed, len(sequences), steps).tolist():
        ids = sequences[sequence]
        hidden = student.base_model(input_ids=ids[None, :-1], use_cache=False)[0][0]  # (T, D)
        (loss_of(variant, seed, hidden, head, ids[1:], sequence, lesson) / T).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def loss_of(
    variant: str, seed: int, hidden: Tensor, head: Head, labels: Tensor, sequence: int, lesson: Lesson
) -> Tensor:
    """Return nats summed over T positions: CE, KL over the whole vocabulary plus the teacher's entropy, or KL with a bucket."""
    if variant == "full":
        return torch.nn.functional.cross_entropy(head(hidden), lesson.logprobs(sequence).exp(), reduction="sum")
    if variant == "ce":
        ids, logprobs, tail, alpha = labels[:, None], torch.zeros(T, 1), torch.full((T,), -math.inf), 0.0
    else:
        target = lesson.targets[variant, seed].take(torch.arange(sequence * T, (sequence + 1) * T))
        ids, probs = (
            torch.nn.utils.rnn.pad_sequence(
                list(flat.split(target.counts.tolist())), batch_first=True, padding_value=-1
            )
            for flat in (target.ids, target.probs)
        )
        ids, logprobs = torch.where(ids < 0, ids[:, :1], ids), probs.clamp_min(0).log()
        tail, alpha = target.tail.log(), 1.0
    return distillation_loss(hidden, head.weight, labels, ids, logprobs, tail, alpha).loss


@torch.no_grad()
def logprobs_of(model: Any, sequences: Tensor) -> Iterator[Tensor]:
    """Yield the log-probabilities of all positions in order, (ROWS, V) at a time."""
    head = head_of(model)
    model.eval()
    for ids in sequences:
        hidden = model.base_model(input_ids=ids[None, :-1], use_cache=False)[0][0]
        yield from (head(part).log_softmax(dim=-1) for part in hidden.split(ROWS))


@torch.no_grad()
def evaluate(student: Iterable[Tensor], sequences: Tensor, teacher: list[Tensor]) -> dict[str, float]:
    """Return means over positions, in nats, and the ECE of the best token; both models are as ``logprobs_of`` yields them."""
    ce, kl = [], []
    confidence, right, counts = torch.zeros(BINS), torch.zeros(BINS), torch.zeros(BINS)
    for labels, log_q, log_p in zip(sequences[:, 1:].flatten().split(ROWS), student, teacher):
        ce.append(-log_q.gather(1, labels[:, None]).mean())
        kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
        best, choice = log_q.max(dim=-1)
        bins = (best.exp() * BINS).long().clamp_max(BINS - 1)
        confidence.index_add_(0, bins, best.exp())
        right.index_add_(0, bins, (choice == labels).float())
        counts += bins.bincount(minlength=BINS)
    return {
        "ce": float(torch.stack(ce).mean()),
        "kl": float(torch.stack(kl).mean()),
        "ece": float((confidence - right).abs().sum() / counts.sum()),
        "accuracy": float(right.sum() / counts.sum()),
    }


# --- from text to results ---------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    teacher, tokenizer = load_student("embedded", "float32")
    texts = documents(options.text)
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    apart = max(1, round(HELD_OUT_DOCUMENTS * len(texts)))
    tokens = {name: options.tokens or default for name, default in TOKENS.items()}
    held_out = cut(texts[:apart], tokenizer, HELD_OUT_SEQUENCES)
    sequences = cut(texts[apart:], tokenizer, max(tokens.values()) // T)
    settings = {
        "text": options.text if options.text == "builtin" else Path(options.text).stem,
        "text_hash": stable_hash(sequences.tolist(), held_out.tolist()),
        "tokens": tokens,
        "different_tokens": len(sequences) * T,
        "held_out_tokens": len(held_out) * T,
        "tokens_a_step": T,
        "learning_rates": LEARNING_RATES,
        "scratch": SCRATCH | SCRATCH_HEADS,
        "teacher": "SmolLM2-135M-Instruct, float32",
    }
    results: dict[str, Any] = {"date": str(date.today()), "machine": cpu(), "settings": settings, "runs": []}
    results["versions"] = versions("kdcache", "torch", "transformers", "numpy")
    if options.results.is_file():
        results = json.loads(options.results.read_text())
        if results["settings"] != settings:
            raise SystemExit(f"{options.results} was made with other settings; name another file with --results")
    finished = {(r["student"], r["seed"], r["variant"]) for r in results["runs"]}
    wanted = [(s, n, v) for n in range(options.seeds) for s in options.students for v in options.variants]
    pending = [key for key in wanted if key not in finished]
    say(f"{len(pending)} of {len(wanted)} runs to do, {len(sequences) * T:,} different training tokens")
    if not pending:
        return results

    lesson = teach(
        teacher, sequences, sorted({n for _, n, _ in pending}), list(dict.fromkeys(v for _, _, v in pending))
    )
    theirs = list(logprobs_of(teacher, held_out))
    results["teacher"] = evaluate(theirs, held_out, theirs)
    dense = {"full": 2.0 * len(lesson.head)}
    begun = time.monotonic()
    for number, (name, seed, variant) in enumerate(pending, 1):
        started = time.monotonic()
        student = make_student(name, teacher, seed)
        if variant != "before":
            train(student, variant, seed, sequences, tokens[name] // T, LEARNING_RATES[name], lesson)
        trained = time.monotonic()
        scores = evaluate(logprobs_of(student, held_out), held_out, theirs)
        size = lesson.bytes_per_token.get((variant, seed), dense.get(variant, 0.0))
        facts = {"student": name, "seed": seed, "variant": variant, "bytes_per_token": size}
        results["runs"].append(facts | scores | {"train_seconds": trained - started})
        options.results.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(options.results, results)
        spent = time.monotonic() - begun
        say(
            f"{number}/{len(pending)} {name} {seed} {variant}: CE {scores['ce']:.4f}, KL {scores['kl']:.4f}, "
            f"{trained - started:.0f} + {time.monotonic() - trained:.0f} s, {spent / 60:.1f} minutes so far"
        )
    return results


def recovered(runs: list[Run], student: str, variant: str, measure: str) -> list[float]:
    """Return percent of the gain of ``full`` over ``ce``, per seed that has all three; empty if any of these gains is not positive."""
    by = {(r["seed"], r["variant"]): r[measure] for r in runs if r["student"] == student}
    seeds = [n for n, name in by if name == variant and {(n, "ce"), (n, "full")} <= by.keys()]
    gains = [by[n, "ce"] - by[n, "full"] for n in seeds]
    if min(gains, default=0.0) <= 0:
        return []
    return [100 * (by[n, "ce"] - by[n, variant]) / gain for n, gain in zip(seeds, gains)]


def print_tables(results: dict[str, Any]) -> None:
    def cell(values: list[float], digits: int) -> str:
        if not values:
            return "-"
        low, high = min(values), max(values)
        spread = f" ({low:.{digits}f} to {high:.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    settings, teacher = results["settings"], results.get("teacher", {})
    print(
        f"{settings['text']}, {settings['held_out_tokens']:,} held-out tokens; {results['machine']}, {results['date']}"
    )
    print("teacher: " + ", ".join(f"{name} {value:.4f}" for name, value in teacher.items()))
    for student in dict.fromkeys(r["student"] for r in results["runs"]):
        runs = [r for r in results["runs"] if r["student"] == student]
        seeds = ", ".join(str(n) for n in sorted({r["seed"] for r in runs}))
        print(f"\n{student}, {settings['tokens'][student]:,} tokens per run, seeds {seeds}: mean (lowest to highest)\n")
        print("| target | bytes/token | recovered % | of the KL, % | CE | KL | ECE |\n|---|---|---|---|---|---|---|")
        for variant in [name for name in VARIANTS if any(r["variant"] == name for r in runs)]:
            runs_of_variant = [r for r in runs if r["variant"] == variant]
            ratios = [[] if variant == "before" else recovered(runs, student, variant, m) for m in ("ce", "kl")]
            cells = [cell(ratio, 0) for ratio in ratios]
            cells += [cell([r[m] for r in runs_of_variant], digits) for m, digits in (("ce", 3), ("kl", 3), ("ece", 3))]
            size = statistics.mean(r["bytes_per_token"] for r in runs_of_variant)
            print(f"| {variant} | {size:,.0f} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="builtin", help="builtin, a .jsonl with question and answer, or a text file")
    parser.add_argument("--students", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... [default: 3]")
    parser.add_argument("--tokens", type=int, help=f"training tokens per run [default: {TOKENS}]")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--results", type=Path, help="runs in this file are not repeated")
    parser.add_argument("--show", type=Path, help="print the tables of these results instead of measuring")
    options = parser.parse_args()
    name = f"recovered-{Path(options.text).stem}-{hardware()}-{date.today()}.json"
    options.results = options.results or HERE / "results" / name
    print_tables(json.loads(options.show.read_text()) if options.show else run(options))


if __name__ == "__main__":
    main()
