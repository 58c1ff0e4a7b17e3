"""What the students kept, measured on a cache's held-out split; the teacher's rows come from the cache, no teacher is loaded.

    kd evaluate before=data/student sft=data/sft kd=data/kd --from-cache data/qwen --out data/evaluation

Each model is measured by itself, sample by sample, into a folder of two Parquet files: ``forced`` (teacher-forced: KL,
agreement, cross-entropy, calibration, of the cache's completions) and ``answers`` (generated, with what each scored).
``compare.py`` makes the tables of them. A model that was measured before, with the same settings, is left as it is.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdcache import hashing
from kdcache.bounds import MOST_SAMPLES, check_sampling, check_whole
from kdcache.cache import query
from kdcache.cache.format import SPLITS
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError, UsageError
from kdcache.judge import answers, verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.models import identity
from kdcache.prompts.thoughts import whole_turn
from kdcache.storage import atomic, folders
from trainer.data.stream import Units, open_caches, select
from trainer.evaluate import metrics
from trainer.evaluate.compare import COPY, EVALUATION_FILE, TEACHER
from trainer.evaluate.forced import at_positions, sampled_from
from trainer.loss.fused import head_of
from trainer.student import generate
from trainer.student.generate import Ask, Decoding
from trainer.student.load import cached_stop_ids, check_tokenizer, load_student

Progress = Callable[[str, int, int], None]  # what, done, of how many


@dataclass(frozen=True)
class EvaluateConfig:
    """``models``: (label, folder or Hub id); those of one label are runs of a kind. None: as the teacher was sampled."""

    models: tuple[tuple[str, str], ...]
    from_cache: tuple[Path, ...]
    out: Path
    split: str = "test"
    where: str | None = None
    max_length: int = 2048
    batch_size: int = 8
    generate: int | None = None  # prompts to generate for; None: all, 0: none
    temperatures: tuple[float, ...] = ()
    top_p: float | None = None
    seeds: int | None = None  # answers a prompt, at temperatures above 0
    max_new_tokens: int | None = None
    dtype: str = "float32"
    engine: str = "auto"
    unsafe_exec: bool = False


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    group_id: str
    ids: list[int]
    judges: tuple[verifiers.Judge, ...]  # one or more: the best verdict counts
    teacher: list[str] = field(repr=False)  # the teacher's own answers
    text: str = field(default="", repr=False)


def _check(config: EvaluateConfig) -> None:
    """UsageError for values that nothing could be measured with."""
    for label, model in config.models:
        if not label or not model:
            raise UsageError(f"{label}={model}: expected a model, or LABEL=MODEL")
    for temperature in config.temperatures or (0.0,):
        check_sampling(temperature, config.top_p)
    check_whole("--max-length", config.max_length, 1)
    check_whole("--batch-size", config.batch_size, 1)
    check_whole("--generate", config.generate, 0)
    check_whole("--seeds", config.seeds, 1, MOST_SAMPLES)
    check_whole("--max-new-tokens", config.max_new_tokens, 1)


def label_of(argument: str) -> tuple[str, str]:
    """``label=model`` or a model, which is then its own label."""
    label, equals, model = argument.partition("=")
    return (label, os.path.expanduser(model)) if equals and not Path(argument).exists() else (argument, argument)


def evaluate(
    config: EvaluateConfig, progress: Progress = lambda *_: None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Measure what is not measured yet; returns the folder, whose evaluation.json names the parts.

    ``say`` is told what the user should know of the engine that generates.
    """
    _check(config)
    with folders.held(config.out, folders.EVALUATION):
        folders.check_writable(config.out, folders.EVALUATION)
        return _evaluate(config, progress, say)


def _evaluate(config: EvaluateConfig, progress: Progress, say: Callable[[str], None]) -> Path:
    if config.split not in SPLITS:
        raise KDError(f"--split {config.split}: expected one of {', '.join(SPLITS)}", 2)
    caches = open_caches(config.from_cache)
    for _, model in config.models:
        check_tokenizer(model, caches[0])
    units = select(caches, config.split, config.where, config.max_length)
    if not len(units):
        raise KDError(f"the {config.split} split has no sample to evaluate on (--where, --max-length, --split-ratios?)")
    decoding, temperatures, seeds = _decoding(config, caches[0])
    prompts = _prompts(config)
    sandbox = verifiers.sandbox_for((verifier for p in prompts for verifier, _ in p.judges), config.unsafe_exec)
    engine = generate.resolve(config.engine, [model for _, model in config.models], config.dtype) if prompts else None
    groups = _groups(config, caches)
    settings = {
        "measures": MEASURES_VERSION,
        "caches": [cache.fingerprint for cache in caches],
        "split": config.split,
        "where": config.where,
        "max_length": config.max_length,
        "samples": len(units),
        "prompts": len(prompts),
        "prompts_hash": hashing.of_json([prompt.prompt_id for prompt in prompts]),
        "engine": engine,
        "temperatures": list(temperatures),
        "seeds": seeds,
        **asdict(decoding),
    }

    asks = [
        Ask(prompt.prompt_id, prompt.ids, temperature, seed)
        for prompt in prompts
        for temperature in temperatures
        for seed in range(seeds if temperature > 0 else 1)
    ]

    def judged(asked: Sequence[Ask], texts: Sequence[str], is_teacher: bool = False) -> pa.Table:
        return _judge(prompts, asked, texts, is_teacher, sandbox)

    def of_model(label: str, model: str) -> tuple[pa.Table, pa.Table]:
        at = lambda *numbers: progress(f"{label}: held-out KL", *numbers)  # noqa: E731
        forced = _forced(model, units, groups, sampled_from(caches[0]), config, at)
        texts = generate.answers(
            model, asks, decoding, engine or "auto", lambda *at: progress(f"{label}: answers", *at), say
        )
        return forced, judged(asks, texts)

    def of_teacher() -> tuple[pa.Table, pa.Table]:
        temperature = _sampled_at(caches[0])
        own = [(Ask(p.prompt_id, [], temperature, i), text) for p in prompts for i, text in enumerate(p.teacher)]
        return _forced_teacher(units, groups), judged([a for a, _ in own], [t for _, t in own], is_teacher=True)

    def of_copying() -> tuple[pa.Table, pa.Table]:
        copied = {p.prompt_id: _baseline(p) or "" for p in prompts}
        return FORCED.empty_table(), judged(asks, [copied[ask.prompt_id] for ask in asks])

    todo: list[tuple[str, str, Callable[[], tuple[pa.Table, pa.Table]]]] = [(TEACHER, "cache", of_teacher)]
    if any(_baseline(prompt) is not None for prompt in prompts):
        todo.append((COPY, "baseline", of_copying))
    for label, model in config.models:
        todo.append((label, model, functools.partial(of_model, label, model)))
    entries = []
    for label, model, measure in todo:
        weights = None if label in (TEACHER, COPY) else identity.weights(identity.model_folder(model))
        entries.append(_kept(config.out, label, model, settings | {"weights": weights}, measure))
    atomic.write_json(config.out / EVALUATION_FILE, {"settings": settings, "entries": entries})
    return config.out


def _kept(
    out: Path, label: str, model: str, settings: dict[str, Any], measure: Callable[[], tuple[pa.Table, pa.Table]]
) -> dict[str, str]:
    """The folder with one model's measurements, made unless it is there; model.json is written last."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name if label == model else label).strip("-.") or "model"
    name = f"{slug}-{hashing.of_json(settings | {'model': model})[:8]}"
    if not (out / name / "model.json").is_file():
        forced, answers = measure()
        (out / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(forced, out / name / "forced.parquet", compression="zstd")
        pq.write_table(answers, out / name / "answers.parquet", compression="zstd")
        atomic.write_json(out / name / "model.json", {"label": label, "model": model, "settings": settings})
    return {"label": label, "model": model, "folder": name}


# --- what the cache knows ---------------------------------------------------------------------------------------------


def _rows(
    config: EvaluateConfig, columns: str, rest: str = "", length: str = "prompt_tokens + completion_tokens"
) -> list[tuple[Any, ...]]:
    """``columns`` of the chosen samples whose ``length`` is not above --max-length, of all caches together."""
    rest = f"AND {length} <= {config.max_length:d} {rest}"
    tables = [query.select(path, columns, config.where, config.split, rest) for path in config.from_cache]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    """Each prompt of the split once, in the order of its hash; where the teacher answered some, only those.

    A prompt may stand in several rows, and in several caches. It is judged by the best of what they say of it, and
    nothing here depends on the order in which DuckDB's threads find them.
    """
    if config.generate == 0:
        return []
    rows = _rows(
        config,
        "prompt_id, min(group_id), first(prompt_ids ORDER BY sample_id), min(prompt), "
        "list(DISTINCT {verifier: verifier, reference: reference} ORDER BY {verifier: verifier, reference: reference}), "
        "list(completion ORDER BY sample_index, sample_id) FILTER (origin = 'sampled')",
        "GROUP BY prompt_id ORDER BY prompt_id",
        length="prompt_tokens",  # however long the teacher's answers are
    )
    by_id: dict[str, Prompt] = {}
    for name, group, ids, text, judges, own in rows:
        known = by_id.get(name, Prompt(name, group, ids, (), [], text))
        pairs = dict.fromkeys([*known.judges, *((judge["verifier"], judge["reference"]) for judge in judges)])
        by_id[name] = replace(known, judges=tuple(pairs), teacher=[*known.teacher, *(own or [])])
    prompts = [by_id[name] for name in sorted(by_id)]
    if any(prompt.teacher for prompt in prompts):
        prompts = [prompt for prompt in prompts if prompt.teacher]
    return prompts[: config.generate]


def _groups(config: EvaluateConfig, caches: Sequence[Cache]) -> dict[str, str]:
    """The problem of each sample. KDError for caches that cannot stand in one table."""
    rows = _rows(config, "sample_id, group_id")
    groups = dict(rows)
    if len(groups) < len(rows):
        raise KDError("the caches share samples, which would count twice; evaluate on each by itself")
    for name in ("sampling", "sparsify", "capture_k", "samples"):
        if len({str(cache.plan["fields"][name]) for cache in caches}) > 1:
            raise KDError(f"the caches differ in {name}; evaluate on each by itself")
    return groups


def _sampled_at(cache: Cache) -> float:
    return float((cache.plan["fields"]["sampling"] or {}).get("temperature", 0.0))


def _decoding(config: EvaluateConfig, cache: Cache) -> tuple[Decoding, tuple[float, ...], int]:
    """How students answer: as the teacher did, where nothing else is asked for; else greedily, 128 tokens."""
    fields = cache.plan["fields"]
    taught = fields["sampling"] or {}
    top_p = config.top_p if config.top_p is not None else taught.get("top_p", 1.0)
    longest = config.max_new_tokens or taught.get("max_tokens", 128)
    temperatures = config.temperatures or (_sampled_at(cache),)
    seeds = config.seeds or fields["samples"] or 1
    stops = cached_stop_ids(cache.plan)
    return Decoding(top_p, longest, stops, config.batch_size, config.dtype), temperatures, seeds


def _baseline(prompt: Prompt) -> str | None:
    """What a student would answer that only copies the problem, where the data set says what that is."""
    for verifier, _ in prompt.judges:
        try:
            found = json.loads(verifier or "{}")
        except ValueError:  # no verifier: its verdict will say so
            continue
        if isinstance(found, dict) and found.get("baseline") is not None:
            return found["baseline"]
    return None


# --- teacher-forced ---------------------------------------------------------------------------------------------------

MEASURES_VERSION = 4
ENTROPIES = len(metrics.ENTROPY_EDGES_NATS) + 1  # buckets of them
FORCED = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("sample_id", "group_id")),
        *(pa.field(name, pa.float64()) for name in ("tokens", "kl", "agreement", "ce")),  # summed over its positions
        pa.field("confident", pa.list_(pa.float64(), metrics.BINS)),  # of the best token, by bin of its probability
        pa.field("right", pa.list_(pa.float64(), metrics.BINS)),
        # The same by the bucket of the teacher's entropy.
        *(pa.field(f"{name}_by_entropy", pa.list_(pa.float64(), ENTROPIES)) for name in ("tokens", "kl", "agreement")),
    ]
)


def _forced(
    model: str,
    units: Units,
    groups: dict[str, str],
    captured: int | None,
    config: EvaluateConfig,
    progress: Callable[[int, int], None],
) -> pa.Table:
    """One row a sample, summed over its supervised positions. KL is to the distribution as it was captured."""
    student, _ = load_student(model, config.dtype)
    student.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    head, rows = head_of(student), []
    for first in range(0, len(units), config.batch_size):
        samples = units.load(np.arange(first, min(first + config.batch_size, len(units))), ("entropies",))
        found = at_positions(student, head, samples, captured)
        measured = {name: found[name] for name in ("kl", "agreement", "confidence", "right")} | {
            "ce": -found["logprobs"]
        }
        ends = np.cumsum([sample.supervised.sum() for sample in samples])
        for sample, low, high in zip(samples, [0, *ends[:-1]], ends):
            mine = {name: array[low:high].astype(np.float64) for name, array in measured.items()}
            rows.append(_summed(sample.sample_id, groups, entropy=_supervised(sample, "entropies"), **mine))
        progress(min(first + config.batch_size, len(units)), len(units))
    del student
    gc.collect()
    return pa.Table.from_pylist(rows, FORCED)


def _supervised(sample: Sample, column: str) -> np.ndarray:
    """One of a sample's TOKEN_COLUMNS at its supervised positions, float64."""
    return np.array(getattr(sample, column), dtype=np.float64)[sample.supervised]


def _forced_teacher(units: Units, groups: dict[str, str]) -> pa.Table:
    """The teacher's own row per sample, from its cached log-probabilities."""
    rows = []
    for first in range(0, len(units), 256):
        for sample in units.load(np.arange(first, min(first + 256, len(units))), ("entropies", "token_logprobs")):
            best, confidence = _first_candidates(sample)
            picked = sample.supervised
            rows.append(
                _summed(
                    sample.sample_id,
                    groups,
                    entropy=_supervised(sample, "entropies"),
                    kl=np.zeros(picked.sum()),
                    agreement=np.ones(picked.sum()),
                    ce=-_supervised(sample, "token_logprobs"),
                    confidence=confidence[picked],
                    right=(best == sample.completion_ids)[picked].astype(np.float64),
                )
            )
    return pa.Table.from_pylist(rows, FORCED)


def _first_candidates(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's choice at each of T positions and its probability; -1 and 0 where there is no candidate."""
    candidates = sample.candidates
    best, confidence = np.full(len(candidates), -1), np.zeros(len(candidates))
    has_any = candidates.counts > 0
    first = candidates.starts[has_any]
    best[has_any], confidence[has_any] = candidates.ids[first], np.exp(candidates.logprobs[first])
    return best, confidence


def _summed(
    sample_id: str,
    groups: dict[str, str],
    entropy: np.ndarray,
    kl: np.ndarray,
    agreement: np.ndarray,
    ce: np.ndarray,
    confidence: np.ndarray,
    right: np.ndarray,
) -> dict[str, Any]:
    for name, values in (("the teacher's entropy", entropy), ("the KL", kl), ("the cross-entropy", ce)):
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values))[0])
            raise KDError(f"sample {sample_id}: {name} at its supervised position {position} is {values[position]}", 3)
    bins = metrics.bin_of(confidence)
    buckets = np.searchsorted(metrics.ENTROPY_EDGES_NATS, entropy, side="right")
    return {
        "sample_id": sample_id,
        "group_id": groups[sample_id],
        "tokens": float(len(ce)),
        "kl": kl.sum(),
        "agreement": agreement.sum(),
        "ce": ce.sum(),
        "confident": np.bincount(bins, confidence, metrics.BINS).tolist(),
        "right": np.bincount(bins, right, metrics.BINS).tolist(),
        "tokens_by_entropy": np.bincount(buckets, minlength=ENTROPIES).astype(np.float64).tolist(),
        "kl_by_entropy": np.bincount(buckets, kl, ENTROPIES).tolist(),
        "agreement_by_entropy": np.bincount(buckets, agreement, ENTROPIES).tolist(),
    }


# --- answers ----------------------------------------------------------------------------------------------------------

ANSWERS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("prompt_id", "group_id")),
        pa.field("temperature", pa.float64()),
        pa.field("seed", pa.int32()),
        pa.field("answer", pa.string()),
        *(pa.field(name, pa.float64()) for name in ("rougeL", "rougeL_paper", "rougeL_teacher", "exact", "reward")),
        pa.field("reason", pa.string()),  # of the reward
    ]
)


def _judge(
    prompts: list[Prompt], asks: Sequence[Ask], texts: Sequence[str], is_teacher: bool, sandbox: Sandbox | None
) -> pa.Table:
    """One row an answer, with its scores; null where there is nothing to compare with, the best where there is more than one."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    of = [by_id[ask.prompt_id] for ask in asks]
    turns = [whole_turn(prompt.text, text) for prompt, text in zip(of, texts)]
    items = [(v, turn, reference) for p, turn in zip(of, turns) for v, reference in p.judges]
    verdicts = iter(verifiers.verify_many(items, sandbox))

    def rows() -> Iterator[dict[str, Any]]:
        for ask, prompt, text, turn in zip(asks, of, texts, turns):
            verdict = verifiers.best([next(verdicts) for _ in prompt.judges])
            row: dict[str, Any] = {
                "prompt_id": prompt.prompt_id,
                "group_id": prompt.group_id,
                "temperature": ask.temperature,
                "seed": ask.seed,
                "answer": text,
                "reward": verdict.reward,
                "reason": verdict.reason,
            }
            known = [(verifier, reference) for verifier, reference in prompt.judges if reference is not None]
            if known:
                row["rougeL"] = max(metrics.rouge_l(text, reference) for _, reference in known)
                row["rougeL_paper"] = max(metrics.rouge_l_of_the_paper(text, reference) for _, reference in known)
                row["exact"] = max(metrics.exact(answers.answer_in(turn, verifier), ref) for verifier, ref in known)
            if prompt.teacher and not is_teacher:
                row["rougeL_teacher"] = metrics.rouge_l(text, prompt.teacher[0])
            yield row

    return pa.Table.from_pylist(list(rows()), ANSWERS)
