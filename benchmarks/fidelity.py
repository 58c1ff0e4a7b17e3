"""What does a sparse target cost, and what does it lose? Bytes per token, and the error of full-vocabulary KD's gradient.

    python benchmarks/fidelity.py                   # the builtin examples: about 25 minutes and 12 GB on two cores
    python benchmarks/fidelity.py --tokens 1500     # a quick look, three minutes
    python benchmarks/fidelity.py --examples rows.jsonl --completion-column response --name mine
    python benchmarks/fidelity.py --show benchmarks/results/fidelity-....json      # tables, claims and plot again

The teacher is SmolLM2-135M-Instruct in float32; the students are its own layers, without 2 of them (near) or 10 (far).
Each distribution goes through a cache: kdcache.cache.sparsify chooses, a shard is written, its footer tells the bytes, and
kdcache.cache.reader reads what a trainer gets. For every target the gradient of its loss
(trainer.loss.reference) is compared with that of KL(teacher || student) over the whole vocabulary, which is q - p on the logits:
the relative error ||G - G*|| / ||G*|| on the weights of the head, summed over a batch (noise falls as batches grow, bias
does not), and on the hidden states, where no sum averages it out. Batches are disjoint parts of one shuffled order of
positions. That these are the gradients of the true losses is asserted first, against autograd in float64.

On the logits every target's gradient is b q outside the stored candidates and something else on them, so one GEMM
(none where b = 1) and one sparse product give it.

RS-KD (Anshumann et al. 2025, Sparse Logit Sampling): N draws with replacement, weighted by their counts / N. Its bytes
are those of the same shard format. Its counts are exact and not rounded to the codebook, which would cost no more.

Shapes: B positions of a chunk, V the vocabulary, D hidden, N stored candidates, flat.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other waste a machine that is shared

import numpy as np
import pyarrow.parquet as pq
import torch
from shared import hardware, made_up_fields, save_figure, say, write_plan
from torch import Tensor

from kdcache.cache import reader, shard, sparsify, writer
from kdcache.cache.candidates import Candidates
from kdcache.cache.format import CANDIDATE_LEAVES, FORMAT_VERSION, CacheRow, fingerprint
from kdcache.cache.layout import shard_name
from kdcache.cache.reader import normalise
from kdcache.examples import load as examples
from kdcache.examples import types
from kdcache.hashing import stable_hash
from kdcache.machine import cpu, versions
from kdcache.models import embedded
from kdcache.prompts.tokenize import Prompts
from kdcache.storage import atomic
from trainer.loss import reference as losses
from trainer.student.load import load_student
from trainer.student.make import init_student

DROPPED = {"far": [17, 18, 14, 12, 13, 26, 25, 15, 16, 5], "near": [17, 18]}  # the teacher's cheapest layers first
TOPK, DRAWS, TAUS = (8, 16, 32, 64, 128), (12, 25, 50, 150), (0.1, 0.05, 0.025, 0.02, 0.01, 0.005)
CAPTURED = {"256": 256, "512": 512, "1024": 1024, "V": None}  # None: the whole vocabulary
CHUNK, BLOCK = 500, 3000  # positions: the small batch, and the middle one; the largest is all there is
MAX_MODEL_LEN = 2048
HERE = Path(__file__).parent


# --- what is compared -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What is stored: candidates chosen by ``policy`` (label, topk:K, threshold:TAU or draws:N) among the captured."""

    policy: str
    capture_k: int
    precision: str = "q8"

    @property
    def parameter(self) -> float:
        return float(self.policy.partition(":")[2] or 0)


@dataclass(frozen=True)
class Target:
    """A layout, and where the loss puts the mass outside it: bucket, scaled, ignored or label."""

    family: str
    layout: Layout
    rest: str

    def label(self, vocabulary: int) -> str:
        words = [self.layout.policy]
        if self.layout.policy.startswith("threshold"):
            words.append("K=V" if self.layout.capture_k == vocabulary else f"K={self.layout.capture_k}")
        return " ".join([*words, self.rest, *(["f32"] if self.layout.precision == "f32" else [])])


def targets_to_compare(vocabulary: int) -> list[Target]:
    targets = [Target("hard labels", Layout("label", 1), "scaled")]
    for rest in ("bucket", "scaled", "ignored", "label"):
        targets += [Target(f"top-k, rest {rest}", Layout(f"topk:{k}", k), rest) for k in TOPK]
    targets += [Target("RS-KD", Layout(f"draws:{n}", vocabulary), "scaled") for n in DRAWS]
    for name, captured in CAPTURED.items():
        layouts = [Layout(f"threshold:{tau}", captured or vocabulary) for tau in TAUS]
        targets += [Target(f"threshold, K={name}", layout, "bucket") for layout in layouts]
    targets += [Target("threshold, K=256, scaled", Layout(f"threshold:{tau}", 256), "scaled") for tau in TAUS]
    targets.append(Target("f32", Layout("topk:64", 64, "f32"), "bucket"))
    targets.append(Target("f32", Layout("threshold:0.02", 256, "f32"), "bucket"))
    return targets


@dataclass(frozen=True)
class Sparse:
    """A target of T positions: N candidates, flat, and the mass of the bucket (0: there is none)."""

    ids: Tensor  # (N) int64
    probs: Tensor  # (N)
    counts: Tensor  # (T) int64
    tail: Tensor  # (T)

    def take(self, positions: Tensor) -> Sparse:
        counts = self.counts[positions]
        shift = (self.counts.cumsum(0) - self.counts)[positions] - (counts.cumsum(0) - counts)
        index = shift.repeat_interleave(counts) + torch.arange(int(counts.sum()))
        return Sparse(self.ids[index], self.probs[index], counts, self.tail[positions])

    def to(self, dtype: torch.dtype) -> Sparse:
        return Sparse(self.ids, self.probs.to(dtype), self.counts, self.tail.to(dtype))


# --- text and hidden states -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    sample_id: str
    prompt_ids: list[int]
    completion_ids: list[int]


def answers(options: argparse.Namespace, prompts: Prompts) -> list[Answer]:
    """Return shuffled examples with a given answer, as many as have enough completion tokens together."""
    columns = types.Columns(options.prompt_column, options.completion_column)
    rows = examples.load(options.examples, columns)
    chosen, tokens = [], 0
    for index in np.random.default_rng(options.seed).permutation(len(rows)):
        row = rows[index]
        if isinstance(row, types.BadRow) or not row.completion:
            continue
        request = prompts.ask(row.messages, row.given)
        prompt, completion = request.prompt_ids, request.completion_ids
        if len(prompt) + len(completion) + 1 > MAX_MODEL_LEN:
            continue
        chosen.append(Answer(f"{row.source}:{row.row_id}:g", prompt, completion))
        tokens += len(completion)
        if tokens >= options.tokens:
            return chosen
    say(
        f"there are {tokens:,} completion tokens, fewer than --tokens {options.tokens:,}: the largest batch is {tokens:,}"
    )
    return chosen


def hidden_states(model: Any, rows: Sequence[Answer], name: str) -> list[Tensor]:
    """Return what the head of ``model`` reads at each completion position: (T, D) float32 per answer."""
    states_of_rows, start, tokens = [], time.monotonic(), 0
    total = sum(len(row.completion_ids) for row in rows)
    for number, row in enumerate(rows):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        states_of_rows.append(states[len(row.prompt_ids) - 1 : -1].clone())  # position t predicts token t + 1
        tokens += len(row.completion_ids)
        if number % 20 == 19 or tokens == total:
            say(f"{name}: hidden states of {tokens:,} of {total:,} tokens, {time.monotonic() - start:.0f} s")
    return states_of_rows


# --- targets, through a cache -----------------------------------------------------------------------------------------


def choose(layouts: Sequence[Layout], row: Answer, states: Tensor, head: Tensor, seed: int) -> list[Candidates]:
    """Return what each layout keeps of one answer's distributions."""
    logprobs, order = (states @ head.T).log_softmax(dim=-1).sort(dim=-1, descending=True)
    logprobs, ids = logprobs.numpy(), order.to(torch.int32).numpy()  # [T, V] best first
    drawn = draw(logprobs, stable_hash(seed, row.sample_id))
    candidates = []
    for layout in layouts:
        if layout.policy == "label":
            ones = np.ones(len(ids), np.int32)
            given = np.array(row.completion_ids, np.int32)
            candidates.append(Candidates(given, np.zeros(len(ids), np.float32), ones, nothing(len(ids))))
        elif layout.policy.startswith("draws"):
            candidates.append(counted(drawn[:, : int(layout.parameter)], ids))
        else:
            keep = sparsify.parse(layout.policy, layout.capture_k)
            k = layout.capture_k
            candidates.append(keep(ids[:, :k], logprobs[:, :k], seed, row.sample_id))
    return candidates


def nothing(positions: int) -> np.ndarray:
    """Return the tails of positions without any mass outside the candidates."""
    return np.full(positions, -np.inf, np.float32)


def draw(logprobs: np.ndarray, seed: int) -> np.ndarray:
    """Draw ranks [T, most draws] with replacement from full distributions [T, V], best first."""
    cumulative = np.exp(logprobs.astype(np.float64)).cumsum(axis=1)
    uniform = np.random.default_rng(seed).random((len(logprobs), max(DRAWS))) * cumulative[:, -1:]
    return np.stack([np.searchsorted(c, u, side="right") for c, u in zip(cumulative, uniform)])


def counted(drawn: np.ndarray, ids: np.ndarray) -> Candidates:
    """Return the candidates of RS-KD: each drawn token once, weighted by how often it was drawn, most frequent first."""
    flat, weights, counts = [], [], []
    for position, ranks in enumerate(drawn):
        unique, times = np.unique(ids[position, ranks], return_counts=True)
        best_first = np.argsort(-times, kind="stable")  # ties by id, which compresses best
        flat.append(unique[best_first])
        weights.append(times[best_first] / len(ranks))
        counts.append(len(unique))
    logprobs = np.log(np.concatenate(weights)).astype(np.float32)
    return Candidates(np.concatenate(flat), logprobs, np.array(counts, np.int32), nothing(len(drawn)))


def through_shard(
    layout: Layout, rows: Sequence[Answer], kept: Sequence[Candidates]
) -> tuple[float, list[reader.Sample]]:
    """Write a layout's candidates and read them back; return bytes per completion token, and what a trainer gets."""
    size, samples = written_and_read(layout.precision, rows, kept)
    if layout.policy.startswith("draws"):  # exact counts
        samples = written_and_read("f32", rows, kept)[1]
    return size / sum(len(row.completion_ids) for row in rows), samples


def written_and_read(
    precision: str, rows: Sequence[Answer], kept: Sequence[Candidates]
) -> tuple[int, list[reader.Sample]]:
    shard_rows = []
    for row, candidates in zip(rows, kept):
        zeros = np.zeros(len(row.completion_ids), np.float32)
        shard_row = CacheRow(
            sample_id=row.sample_id,
            split="train",
            prompt_ids=row.prompt_ids,
            completion_ids=row.completion_ids,
            token_logprobs=zeros,
            token_ranks=zeros.astype(np.int32),
            entropies=zeros,
            candidates=candidates,
        )
        shard_rows.append(shard_row)
    with tempfile.TemporaryDirectory() as scratch:
        name = shard_name("train", 0)
        path = Path(scratch) / name
        path.parent.mkdir()
        made_up = made_up_fields(sparsify.parse("topk:1"))  # no policy stands for all layouts, and reading needs none
        plan = {"format_version": FORMAT_VERSION, "fields": made_up, "fingerprint": fingerprint(made_up)}
        writer.write_shard(path, shard_rows, precision, {"fingerprint": plan["fingerprint"]})
        write_plan(
            Path(scratch), plan | {"vocab_size": 0, "end_of_turn": 0, "tokenizer": {}, "shards": [{"name": name}]}
        )
        chunks = shard.column_chunks(pq.read_metadata(path))
        size = sum(c.total_compressed_size for c in chunks if c.path_in_schema in CANDIDATE_LEAVES)
        cache = reader.Cache(Path(scratch))
        samples = []
        for group, count in enumerate(cache.row_groups(path.name)):
            samples += cache.read(path.name, group, range(count))
    return size, samples


def as_target(samples: Sequence[reader.Sample], rest: str, own_tokens: np.ndarray) -> Sparse:
    """Turn what the reader gives into what a loss takes; the reader's candidates sum to 1 - exp(tail)."""
    ids = np.concatenate([s.candidates.ids for s in samples]).astype(np.int64)
    logprobs = np.concatenate([s.candidates.logprobs for s in samples])
    counts = np.concatenate([s.candidates.counts for s in samples]).astype(np.int64)
    tail = np.concatenate([s.candidates.tails for s in samples])
    if rest == "scaled":
        logprobs = normalise(logprobs, counts, np.full_like(tail, -np.inf))
    probs, mass = np.exp(logprobs), np.exp(tail)
    if rest == "label":  # the rest of the mass goes to the token of the answer
        ends = counts.cumsum()
        ids, probs, counts = np.insert(ids, ends, own_tokens), np.insert(probs, ends, mass), counts + 1
    if rest != "bucket":
        mass = np.zeros_like(mass)
    return Sparse(*(torch.from_numpy(array) for array in (ids, probs, counts, mass)))


# --- gradients --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """What all targets share on B positions: the student's q, its inputs, and the gradient of the full-vocabulary KL."""

    positions: Tensor  # (B)
    hidden: Tensor  # (B, D)
    q: Tensor  # (B, V)
    p_head: Tensor  # (B, D) p W
    q_head: Tensor  # (B, D) q W
    p_hidden: Tensor  # (V, D) p^T H
    full: Tensor  # (V, D) (q - p)^T H
    kl_nats: float  # summed


def make_chunk(positions: Tensor, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Chunk:
    log_q, log_p = (hidden @ head.T).log_softmax(dim=-1), (teacher_hidden @ teacher_head.T).log_softmax(dim=-1)
    q, p = log_q.exp(), log_p.exp()
    p_hidden = p.T @ hidden
    kl = float((p * (log_p - log_q)).sum(dim=-1).double().sum())
    return Chunk(positions, hidden, q, p @ head, q @ head, p_hidden, q.T @ hidden - p_hidden, kl)


def error_of(target: Sparse, chunk: Chunk, head: Tensor, on_head: Tensor) -> Tensor:
    """Return the target's gradient minus the full one on the hidden states (B, D); that on the head goes to ``on_head`` (V, D).

    On the logits the target's gradient is (sum p + r) q - p + (r/s) q on the candidates, with s the student's mass
    outside them, and minus (r/s) q everywhere. With a bucket, sum p + r = 1; what is scaled has r = 0.
    """
    positions, vocabulary = chunk.q.shape
    rows = torch.arange(positions).repeat_interleave(target.counts)
    inside = chunk.q[rows, target.ids]  # (N)
    chunk.q[rows, target.ids] = 0
    outside = chunk.q.sum(dim=-1)  # its own sum: 1 - sum(inside) loses its digits
    chunk.q[rows, target.ids] = inside
    ratio = torch.where(target.tail > 0, target.tail / outside, 0)  # (B) r/s
    totals = torch.zeros_like(outside).index_add(0, rows, target.probs)
    dense = totals + target.tail - ratio - 1  # (B) what multiplies q in the difference to q - p
    dense = torch.where(dense.abs() < 1e-6, 0, dense)
    values = ratio[rows] * inside - target.probs  # (N)

    starts = torch.nn.functional.pad(target.counts.cumsum(0), (1, 0))
    sparse = torch.sparse_csr_tensor(starts, target.ids, values, (positions, vocabulary))
    on_hidden = chunk.p_head + dense[:, None] * chunk.q_head + sparse @ head
    by_token = target.ids.argsort(stable=True)
    starts = torch.nn.functional.pad(target.ids.bincount(minlength=vocabulary).cumsum(0), (1, 0))
    transposed = torch.sparse_csr_tensor(starts, rows[by_token], values[by_token], (vocabulary, positions))
    torch.addmm(chunk.p_hidden, transposed, chunk.hidden, out=on_head)
    if dense.any():
        on_head.addmm_(chunk.q.T, dense[:, None] * chunk.hidden)
    return on_hidden


def check_against_autograd(
    targets: dict[str, Sparse],
    labels: Tensor,
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
) -> None:
    """Assert that the gradients measured here equal autograd's of the trainer's own loss, in float64 on these positions."""
    hidden, head, teacher_hidden, teacher_head = (
        t.detach().double() for t in (hidden, head, teacher_hidden, teacher_head)
    )
    chunk = make_chunk(torch.arange(len(hidden)), hidden, head, teacher_hidden, teacher_head)
    inputs = (head.clone().requires_grad_(), hidden.clone().requires_grad_())

    def gradient(loss_of: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(loss_of(inputs[1] @ inputs[0].T).sum(), inputs)

    p = (teacher_hidden @ teacher_head.T).softmax(dim=-1)
    full = gradient(lambda logits: torch.nn.functional.kl_div(logits.log_softmax(dim=-1), p, reduction="none"))
    assert torch.allclose(chunk.full, full[0], atol=1e-10) and torch.allclose(chunk.q_head - chunk.p_head, full[1])
    worst, on_head = 0.0, torch.empty_like(head)
    for name, target in targets.items():
        target = target.to(torch.float64)
        if name.startswith("label"):
            expected = gradient(lambda logits: losses.cross_entropy(logits, labels))
        else:
            ids, probs = (
                torch.nn.utils.rnn.pad_sequence(
                    list(flat.split(target.counts.tolist())), batch_first=True, padding_value=-1
                )
                for flat in (target.ids, target.probs)
            )
            padded = torch.where(ids < 0, ids[:, :1], ids), probs.clamp_min(0).log(), target.tail.log()
            expected = gradient(lambda logits, padded=padded: losses.divergence("forward_kl", logits, *padded))
        on_hidden = error_of(target, chunk, head, on_head)
        for gradient_error, of_target, of_full in zip((on_head, on_hidden), expected, full):
            worst = max(worst, float((gradient_error - (of_target - of_full)).norm() / of_full.norm()))
    assert worst < 1e-5, f"a gradient measured here differs by {worst:.1e} from that of the trainer's loss"
    say(f"{len(targets)} targets on {len(hidden)} positions: gradients equal autograd's in float64 (worst {worst:.0e})")


def inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two float32 tensors, summed in float64 over pieces."""
    pieces = zip(a.reshape(-1).split(1 << 20), b.reshape(-1).split(1 << 20))
    return float(torch.stack([torch.dot(x, y) for x, y in pieces]).double().sum())


class Meter:
    """Relative errors and angles of one target: means over batches, per batch size."""

    def __init__(self) -> None:
        self.pairs: dict[int, list[tuple[float, float]]] = {}
        self.hidden = np.zeros(3)

    def add(self, tokens: int, error: Tensor, full: Tensor, full_square: float) -> None:
        self.pairs.setdefault(tokens, []).append(error_and_angle(inner(error, error), inner(error, full), full_square))

    def add_hidden(self, error: Tensor, full: Tensor) -> None:
        self.hidden += [inner(error, error), inner(error, full), inner(full, full)]

    def result(self) -> dict[str, Any]:
        means = {tokens: np.mean(pairs, axis=0).tolist() for tokens, pairs in self.pairs.items()}
        hidden = error_and_angle(*self.hidden)
        return {
            "head": {str(n): {"error": e, "degrees": a, "batches": len(self.pairs[n])} for n, (e, a) in means.items()},
            "hidden": {"error": hidden[0], "degrees": hidden[1]},
        }


def error_and_angle(error_square: float, error_full: float, full_square: float) -> tuple[float, float]:
    """Return ||E|| / ||G*||, and the angle between G* + E and G* in degrees, from the parts of E across and along G*."""
    along = error_full / full_square
    across = math.sqrt(max(error_square / full_square - along**2, 0.0))
    return math.sqrt(error_square / full_square), math.degrees(math.atan2(across, 1 + along))


def measure(
    name: str,
    targets: dict[str, Sparse],
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
) -> dict[str, Any]:
    """Return the errors of every target for one student; batches are cut from the positions in their order."""
    tokens, begun = len(hidden), time.monotonic()
    meters = {label: Meter() for label in targets}
    totals = {label: torch.zeros_like(head) for label in targets}
    full_total, kl_nats = torch.zeros_like(head), 0.0
    on_head, block = torch.empty_like(head), torch.empty_like(head)  # used again and again: new pages are slow
    for first in range(0, tokens, BLOCK):
        chunks = []
        for at in range(first, min(first + BLOCK, tokens), CHUNK):
            where = slice(at, min(at + CHUNK, tokens))
            positions = torch.arange(tokens)[where]
            chunks.append(make_chunk(positions, hidden[where], head, teacher_hidden[where], teacher_head))
        kl_nats += sum(chunk.kl_nats for chunk in chunks)
        squares = [inner(chunk.full, chunk.full) for chunk in chunks]
        full_block = torch.stack([chunk.full for chunk in chunks]).sum(dim=0)
        full_block_square = inner(full_block, full_block)
        full_total += full_block
        is_full = first + BLOCK <= tokens
        for label, target in targets.items():
            block.zero_()
            for chunk, square in zip(chunks, squares):
                on_hidden = error_of(target.take(chunk.positions), chunk, head, on_head)
                if len(chunk.positions) == CHUNK:
                    meters[label].add(CHUNK, on_head, chunk.full, square)
                meters[label].add_hidden(on_hidden, chunk.q_head - chunk.p_head)
                block += on_head
            if is_full and tokens > BLOCK:
                meters[label].add(BLOCK, block, full_block, full_block_square)
            totals[label] += block
        measured = min(first + BLOCK, tokens)
        spent = time.monotonic() - begun
        say(
            f"{name}: gradients of {measured:,} of {tokens:,} tokens, {spent:.0f} s, about {spent / measured * (tokens - measured):.0f} s to go"
        )
    full_square = inner(full_total, full_total)
    for label in targets:
        meters[label].add(tokens, totals[label], full_total, full_square)
    return {"kl_nats": kl_nats / tokens, "targets": {label: meter.result() for label, meter in meters.items()}}


# --- from text to results ---------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    teacher, tokenizer = load_student("embedded", "float32")
    teacher_head = teacher.get_output_embeddings().weight.detach()
    vocabulary = len(teacher_head)
    rows = answers(options, Prompts(str(embedded.prepare()), tokenizer))
    states = hidden_states(teacher, rows, "teacher")

    compared = targets_to_compare(vocabulary)
    layouts = list(dict.fromkeys(target.layout for target in compared))
    kept: list[list[Candidates]] = []
    for number, (row, row_states) in enumerate(zip(rows, states)):
        kept.append(choose(layouts, row, row_states, teacher_head, options.seed))
        if number % 20 == 19 or number + 1 == len(rows):
            say(f"targets of {number + 1} of {len(rows)} answers, {time.monotonic() - begun:.0f} s since the start")

    own_tokens = np.concatenate([np.array(row.completion_ids, np.int64) for row in rows])
    tokens = min(options.tokens, len(own_tokens))
    order = torch.from_numpy(np.random.default_rng(options.seed).permutation(len(own_tokens))[:tokens])
    sparse: dict[str, Sparse] = {}
    facts: dict[str, dict[str, Any]] = {}
    for index, layout in enumerate(layouts):
        size, samples = through_shard(layout, rows, [candidates[index] for candidates in kept])
        for target in compared:
            if target.layout != layout:
                continue
            label = target.label(vocabulary)
            sparse[label] = as_target(samples, target.rest, own_tokens).take(order)
            facts[label] = {
                "family": target.family,
                "policy": layout.policy,
                "capture_k": layout.capture_k,
                "precision": layout.precision,
                "rest": target.rest,
                "candidates_per_token": sum(len(s.candidates.ids) for s in samples) / len(own_tokens),
                # A token's own id is in every cache anyway.
                "candidate_bytes_per_token": 0.0 if layout.policy == "label" else size,
            }
    del kept

    labels, teacher_hidden = torch.from_numpy(own_tokens)[order], torch.cat(states)[order]
    students = {}
    for name, dropped in DROPPED.items():
        with tempfile.TemporaryDirectory() as scratch:
            depth = teacher.config.num_hidden_layers
            layers = ",".join(str(layer) for layer in range(depth) if layer not in dropped)
            init_student("embedded", Path(scratch) / name, keep_layers=layers)
            student, _ = load_student(str(Path(scratch) / name), "float32")
        hidden = torch.cat(hidden_states(student, rows, name))[order]
        head = student.get_output_embeddings().weight.detach()
        del student
        if not students:
            few = slice(0, 64)
            first_positions = {label: target.take(torch.arange(tokens)[few]) for label, target in sparse.items()}
            check_against_autograd(first_positions, labels[few], hidden[few], head, teacher_hidden[few], teacher_head)
        students[name] = {"dropped": dropped} | measure(name, sparse, hidden, head, teacher_hidden, teacher_head)
    return {
        "date": str(date.today()),
        "machine": cpu(),
        "versions": versions("kdcache", "torch", "transformers", "numpy", "pyarrow"),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "processor_minutes": round(time.process_time() / 60, 1),  # of all threads
        "teacher": "SmolLM2-135M-Instruct, float32",
        "text": options.name,
        "answers": len(rows),
        "tokens": tokens,
        "seed": options.seed,
        "facts": facts,
        "students": students,
    }


# --- tables, claims, plot ---------------------------------------------------------------------------------------------


def batch_sizes(results: dict[str, Any]) -> list[str]:
    return list(next(iter(results["students"]["far"]["targets"].values()))["head"])


def print_tables(results: dict[str, Any]) -> None:
    sizes = batch_sizes(results)
    by_bytes = sorted(results["facts"], key=lambda label: results["facts"][label]["candidate_bytes_per_token"])
    print(
        f"{results['text']}: {results['answers']} answers, {results['tokens']:,} completion tokens; {results['machine']}, {results['date']}"
    )
    for name, student in results["students"].items():
        print(
            f"\n{name} student: {len(student['dropped'])} layers dropped, KL to the teacher {student['kl_nats']:.3f} nats per token"
        )
        print(
            "relative error of the gradient: of the head by tokens per batch, with the angle at the largest; of the hidden states"
        )
        heading = [
            "target",
            "candidates",
            "bytes",
            *(f"{int(size):,}" for size in sizes),
            "degrees",
            "hidden",
            "degrees",
        ]
        lines = []
        for label in by_bytes:
            fact, result = results["facts"][label], student["targets"][label]
            lines.append(
                [
                    label,
                    f"{fact['candidates_per_token']:.1f}",
                    f"{fact['candidate_bytes_per_token']:.1f}",
                    *(f"{result['head'][size]['error']:.3f}" for size in sizes),
                    f"{result['head'][sizes[-1]]['degrees']:.1f}",
                    f"{result['hidden']['error']:.3f}",
                    f"{result['hidden']['degrees']:.1f}",
                ]
            )
        widths = [max(len(line[c]) for line in [heading, *lines]) for c in range(len(heading))]
        for line in [heading, ["-" * width for width in widths], *lines]:
            print(
                "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
            )


def claims(results: dict[str, Any]) -> list[str]:
    """Return what is claimed from these results, with their figures."""
    sizes, facts = batch_sizes(results), results["facts"]

    def error(student: str, label: str, size: str) -> float:
        return results["students"][student]["targets"][label]["head"][size]["error"]

    def cost(label: str) -> float:
        return facts[label]["candidate_bytes_per_token"]

    def at_bytes(student: str, family: str, size: str, wanted: float) -> float:
        """Return the error of a family at ``wanted`` bytes, on the line between measured points (both axes logarithmic)."""
        labels = sorted((label for label, fact in facts.items() if fact["family"] == family), key=cost)
        errors = np.log([error(student, label, size) for label in labels])
        return float(np.exp(np.interp(np.log(wanted), np.log([cost(label) for label in labels]), errors)))

    sentences = []
    draws = "draws:50 scaled"
    for student in results["students"]:
        for size in sizes:
            draws_error = error(student, draws, size)
            words = []
            for name in CAPTURED:
                threshold_error = at_bytes(student, f"threshold, K={name}", size, cost(draws))
                words.append(
                    f"K={name} {threshold_error:.3f}, {draws_error / threshold_error:.2f} times ({'met' if draws_error / threshold_error >= 1.7 else 'missed'})"
                )
            sentences.append(
                f"1. {student}, {int(size):,} tokens: RS-KD with 50 draws {draws_error:.3f} at {cost(draws):.1f} bytes; "
                f"threshold at the same bytes: {'; '.join(words)} (goal 1.7)"
            )
    ours_02, scaled = "threshold:0.02 K=256 bucket", "topk:64 scaled"
    for student in results["students"]:
        ratio = error(student, scaled, sizes[-1]) / error(student, ours_02, sizes[-1])
        sentences.append(
            f"2. {student}, {int(sizes[-1]):,} tokens: {scaled} {error(student, scaled, sizes[-1]):.3f}, {ours_02} "
            f"{error(student, ours_02, sizes[-1]):.3f}: {ratio:.2f} times (goal 4: {'met' if ratio >= 4 else 'missed'}), "
            f"at {cost(ours_02) / cost(scaled):.2f} of the bytes"
        )
    bucket = "topk:16 bucket"
    for student in results["students"]:
        pairs = [(size, error(student, ours_02, size), error(student, bucket, size)) for size in sizes]
        words = [
            f"{int(n):,} tokens {a:.3f} and {b:.3f}, {'threshold' if a < b else 'bucket'} wins" for n, a, b in pairs
        ]
        sentences.append(
            f"3. {student}: {ours_02} ({cost(ours_02):.1f} bytes) and {bucket} ({cost(bucket):.1f}): {'; '.join(words)}"
        )
    return sentences


# family: (legend, colour, line, marker)
LINES = {
    "top-k, rest scaled": ("top-K, scaled to 1", "#b5651d", "-", "s"),
    "top-k, rest ignored": ("top-K, rest ignored", "#c9a66b", ":", "s"),
    "top-k, rest label": ("top-K, rest to the label", "#8c8c8c", "-", "D"),
    "top-k, rest bucket": ("top-K, rest in a bucket", "#2a7f62", "-", "s"),
    "RS-KD": ("RS-KD, N draws", "#7b4fa3", "-", "^"),
    "threshold, K=256, scaled": ("threshold TAU of 256, scaled to 1", "#8fb8de", "-", "o"),
    "threshold, K=256": ("threshold TAU of 256, rest in a bucket", "#1f5fa8", "-", "o"),
    "threshold, K=512": ("threshold TAU of 512, rest in a bucket", "#1f5fa8", "--", "o"),
    "threshold, K=V": ("threshold TAU of the whole vocabulary", "#1f5fa8", ":", "o"),
}
# family: (where its points are named, beside the marker, in points; horizontal alignment)
NAMED = {
    "top-k, rest scaled": (0, 5, "center"),
    "RS-KD": (0, 5, "center"),
    "top-k, rest bucket": (0, -10, "center"),
    "threshold, K=256": (-5, -8, "right"),
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the frontier: a row per student, with the smallest and the largest batch beside each other."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import patheffects, pyplot
    from matplotlib.ticker import NullFormatter

    matplotlib.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "kdcache"}
    )
    sizes = batch_sizes(results)
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 9), sharex=True, sharey="row", facecolor="white")
    for row, (name, student) in zip(axes, results["students"].items()):
        for axis, size in zip(row, (sizes[0], sizes[-1])):
            for family, (legend, colour, line, marker) in LINES.items():
                labels = [label for label, fact in results["facts"].items() if fact["family"] == family]
                labels.sort(key=lambda label: results["facts"][label]["candidate_bytes_per_token"])
                x = [results["facts"][label]["candidate_bytes_per_token"] for label in labels]
                y = [student["targets"][label]["head"][size]["error"] for label in labels]
                hollow = {} if line == "-" else {"markerfacecolor": "white"}
                axis.plot(
                    x, y, line, marker=marker, color=colour, markersize=4.5, linewidth=1.5, label=legend, **hollow
                )
                if family in NAMED and axis is row[0]:  # the same points stand at the same bytes in both columns
                    *offset, side = NAMED[family]
                    if family == "top-k, rest bucket" and name == "far":  # here it is the upper of two lines
                        offset, side = (5, 2), "left"
                    for label, at_x, at_y in zip(labels, x, y):
                        text = results["facts"][label]["policy"].partition(":")[2]
                        if text == "0.025" or (name == "near" and text in ("0.01", "0.005")):
                            continue  # no room
                        axis.annotate(
                            text, (at_x, at_y), offset, textcoords="offset points", ha=side, color=colour, fontsize=7.5,
                            path_effects=[patheffects.withStroke(linewidth=2, foreground="white")], zorder=5,
                        )  # fmt: skip
            labels_error = student["targets"]["label scaled"]["head"][size]["error"]
            axis.axhline(labels_error, color="#444444", linewidth=1, linestyle=(0, (1, 2)))
            axis.annotate(
                "hard labels", (1, labels_error), (-4, -10), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", color="#444444", fontsize=8,
            )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
            ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            for which in (axis.xaxis, axis.yaxis):
                which.set_minor_formatter(NullFormatter())
            axis.grid(which="major", color="#e6e6e6", linewidth=0.8)
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            axis.tick_params(which="both", labelbottom=True, labelleft=True, color="#999999")
            dropped = len(student["dropped"])
            axis.set_title(
                f"{name} student ({dropped} layers dropped, KL {student['kl_nats']:.2f}), batch of {int(size):,} tokens",
                loc="left", fontsize=9.5,
            )  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("bytes per token, candidates")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error of the head's gradient")
    handles, legends = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, legends, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"What a sparse target costs, and how far its gradient is from full-vocabulary distillation ({results['text']})",
        x=0.02, ha="left", fontsize=11,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.075, 1, 0.99))
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", default="builtin", help="builtin, or a .jsonl or .parquet file")
    parser.add_argument("--prompt-column")
    parser.add_argument("--completion-column")
    parser.add_argument("--name", help="what to call the text in results and plot [default: that of --examples]")
    parser.add_argument("--tokens", type=int, default=20_000, help="completion tokens [default: 20000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="where to draw the frontier: an .svg or .png")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--show", type=Path, help="print and plot these results instead of measuring")
    options = parser.parse_args()
    options.name = options.name or Path(options.examples).stem
    if options.show:
        results = json.loads(options.show.read_text())
    else:
        with torch.no_grad():
            results = run(options)
        results["claims"] = claims(results)
        options.results.mkdir(exist_ok=True)
        atomic.write_json(options.results / f"fidelity-{options.name}-{hardware()}-{results['date']}.json", results)
    print_tables(results)
    print("\nclaims:", *claims(results), sep="\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
