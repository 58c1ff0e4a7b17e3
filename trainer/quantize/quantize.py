"""A trained student with its linear layers in 4 or 8 bits, and what that saves and costs, measured before and after.

    kd quantize data/kd --out data/kd-nf4 --from-cache data/qwen

nf4, fp4 and int8 are bitsandbytes'; w4a16 is AutoRound's, in compressed-tensors' layout, calibrated on the cache's train
split. Embeddings and head stay as they are. The folder loads with ``from_pretrained`` as it is, and is saved whole or not
at all; ``quantization.json`` in it says what it was made of and, once measured, both sides of every figure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache import machine, models
from kdcache.errors import KDError, UsageError, first_line
from kdcache.models import identity
from kdcache.storage import atomic, folders
from trainer.data.stream import Units, open_caches, select
from trainer.evaluate import compare
from trainer.evaluate.run import EvaluateConfig, evaluate
from trainer.quantize import footprint
from trainer.student.load import check_tokenizer, load_student, quantized_by

Progress = Callable[[str, int, int], None]  # what, done, of how many

RECORD, TABLE = folders.QUANTIZED.marker, "quantization.csv"
MAX_LENGTH = 2048
CALIBRATION_ROWS, CALIBRATION_TOKENS = 64, 512
ANSWERS = 256  # prompts to answer at most, greedily
NATS = {"kl": "nats/token", "ce": "nats/token"}

FORMATS = {
    "nf4": "4-bit NormalFloat, double quantization (bitsandbytes)",
    "fp4": "4-bit floating point, double quantization (bitsandbytes)",
    "int8": "8-bit integers, LLM.int8() (bitsandbytes)",
    "w4a16": "4-bit integers in groups, calibrated (AutoRound, compressed-tensors)",
}


@dataclass(frozen=True)
class QuantizeConfig:
    """``from_cache``: to calibrate w4a16 on (train split), and to measure quality on (test split)."""

    student: str
    out: Path
    format: str = "nf4"
    from_cache: tuple[Path, ...] = ()
    measure: bool = True
    rounds: int = 5
    overwrite: bool = False


@dataclass(frozen=True)
class Plan:
    """A quantization that can be done."""

    config: QuantizeConfig
    dtype: str  # of the student, and of what stays
    group_size: int  # of w4a16
    train: Units | None
    test: Units | None
    record: dict[str, Any]
    sizes: dict[str, int]

    def facts(self) -> dict[str, Any]:
        return {"student": self.config.student, "out": str(self.config.out), **self.record["settings"], **self.sizes}


def prepare(config: QuantizeConfig) -> Plan:
    """Check student, cache and folder. Nothing is written, no weights are loaded."""
    if config.format not in FORMATS:
        raise UsageError(f"--format {config.format}: expected one of {', '.join(FORMATS)}")
    folder, out = Path(identity.model_folder(config.student)).resolve(), config.out.resolve()
    if quantized_by(config.student):
        raise KDError(f"{config.student} is quantized already; quantize the student that it was made from")
    if out in (folder, *folder.parents) or folder in out.parents:
        raise UsageError(f"--out {config.out}: the student and its quantized copy must be in folders apart")
    if config.format == "w4a16" and not config.from_cache:
        raise UsageError("--format w4a16 is calibrated on a cache's train split: name one with --from-cache")
    train = test = None
    if config.from_cache:
        caches = open_caches(config.from_cache)
        check_tokenizer(config.student, caches[0])
        train, test = (select(caches, split, None, MAX_LENGTH) for split in ("train", "test"))
        if config.format == "w4a16" and not len(train):
            raise KDError("--format w4a16 is calibrated on the cache's train split, which is empty")
        if config.measure and not len(test):
            raise KDError(
                "the cache's test split is empty, so no quality can be measured on it; use another, or --no-measure"
            )
    shape = _shape(config.student)
    dtype = str(shape.dtype).removeprefix("torch.")
    group_size = _group_size(shape) if config.format == "w4a16" else 64
    settings = {
        "format": config.format,
        "dtype": dtype,
        "student_weights": identity.weights_hash(str(folder)),
        "calibrated_on": [cache.fingerprint for cache in train.caches] if train and config.format == "w4a16" else None,
    }
    record = {"settings": settings, "student": config.student, "meaning": FORMATS[config.format], "measured": None}
    _is_made(config, settings)  # or it is refused
    return Plan(config, dtype, group_size, train, test, record, _sizes(shape, config.format, group_size))


def _is_made(config: QuantizeConfig, settings: dict[str, Any]) -> bool:
    """Whether the quantized student is there already, and not measured yet; KDError if the folder holds anything else."""
    out = config.out
    folders.check_place(out, "--out")
    if config.overwrite:
        folders.check_deletable(out, folders.QUANTIZED, reads=[config.student, *config.from_cache])
        return False
    if folders.is_empty(out):
        return False
    found = json.loads((out / RECORD).read_text(encoding="utf-8")) if folders.holds(out, folders.QUANTIZED) else None
    if found is not None and found["settings"] == settings and found["measured"] is None:
        return True
    raise KDError(f"--out {out} is not empty; use another, or --overwrite")


def quantize(plan: Plan, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Save the quantized student and, if asked, measure both; returns what quantization.json says."""
    out = plan.config.out
    with folders.held(out, folders.QUANTIZED):
        if not _is_made(plan.config, plan.record["settings"]):  # again, now that nobody else writes there
            with folders.replacing(out, folders.QUANTIZED) as scratch:
                _save(plan, scratch, progress)
                atomic.write_text(scratch / "README.md", _card(plan))
                atomic.write_json(scratch / RECORD, plan.record)
        if not plan.config.measure:
            return plan.record
        record = plan.record | {"measured": _measure(plan, progress)}
        atomic.write_csv(out / TABLE, *table(record["measured"]["rows"], exact=True))
        atomic.write_json(out / RECORD, record)
        return record


def _card(plan: Plan) -> str:
    """The student's own card, where it has one, and what was done since."""
    card = Path(identity.model_folder(plan.config.student)) / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {plan.config.out.resolve().name}\n"
    return (
        f"{before}\n## Quantized\n\nThe linear layers of this model are {FORMATS[plan.config.format]}; embeddings and head stay in "
        f"{plan.dtype}. What that saves and costs is in `{RECORD}`, where it was measured.\n"
    )


# --- saving -----------------------------------------------------------------------------------------------------------


def _save(plan: Plan, folder: Path, progress: Progress) -> None:
    progress("quantizing", 0, 1)
    if plan.config.format == "w4a16":
        _auto_round(plan, folder)
    else:
        student, tokenizer = load_student(plan.config.student, plan.dtype, plan.config.format)
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    progress("quantizing", 1, 1)


def _auto_round(plan: Plan, folder: Path) -> None:
    """Round to nearest, weighed by what the layers' inputs are on the cache's samples (AutoRound with ``iters=0``)."""
    from auto_round import AutoRound

    logging.getLogger("autoround").setLevel(logging.WARNING)  # below it is progress, which is ours to show
    student, tokenizer = load_student(plan.config.student, plan.dtype)
    assert plan.train is not None
    rows = calibration(plan.train)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            AutoRound(
                student,
                tokenizer,
                scheme="W4A16",
                group_size=plan.group_size,
                iters=0,
                dataset=list(rows.split(1)),
                nsamples=len(rows),
                seqlen=rows.shape[1],
                device_map=machine.torch_device(),
                enable_torch_compile=False,
                trust_remote_code=models.code_is_trusted(),  # its own default is True
            ).quantize_and_save(str(folder), format="llm_compressor")
        except Exception as error:
            raise KDError(f"AutoRound could not quantize {plan.config.student}: {first_line(error)}") from error
    if not (folder / "config.json").is_file():  # it names a folder of its own
        (made,) = folder.iterdir()
        for file in made.iterdir():
            file.rename(folder / file.name)
        made.rmdir()


def calibration(units: Units) -> torch.Tensor:
    """Prompts and completions of the train split, end to end, cut into [rows, tokens]: spread over all of the split."""
    random = np.random.default_rng(0)
    wanted = CALIBRATION_ROWS * CALIBRATION_TOKENS
    order = random.permutation(len(units))
    picked = order[: int(np.searchsorted(np.cumsum(units.tokens[order]), wanted)) + 1]
    ids = np.concatenate([np.concatenate([s.prompt_ids, s.completion_ids]) for s in units.load(picked)])
    width = min(CALIBRATION_TOKENS, len(ids))
    rows = min(CALIBRATION_ROWS, len(ids) // width)
    return torch.as_tensor(ids[: rows * width].reshape(rows, width).astype(np.int64))


# --- sizes, without weights -------------------------------------------------------------------------------------------


def _shape(student: str) -> Any:
    config = models.config(identity.model_folder(student))
    with torch.device("meta"):
        return models.untrained(config, dtype=config.dtype or torch.float32)


def _linear(shape: Any) -> list[torch.nn.Linear]:
    """The layers that are quantized: every linear one but the head."""
    head = shape.get_output_embeddings()
    return [module for module in shape.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _group_size(shape: Any) -> int:
    for size in (128, 64, 32):
        if all(layer.in_features % size == 0 for layer in _linear(shape)):
            return size
    raise KDError("--format w4a16 needs layers whose inputs are multiples of 32, which this student has not; use nf4")


def _sizes(shape: Any, format: str, group_size: int) -> dict[str, int]:
    """Bytes of the weights before, and an estimate of those after."""
    whole = sum(p.numel() * p.element_size() for p in shape.parameters())
    layers = [layer.weight for layer in _linear(shape)]
    inside = sum(weight.numel() for weight in layers)
    scales = {
        "nf4": inside / 64 * (1 + 4 / 256),
        "fp4": inside / 64 * (1 + 4 / 256),
        "int8": 4 * sum(weight.shape[0] for weight in layers),
        "w4a16": inside / group_size * 2,
    }[format]
    after = whole - inside * shape.dtype.itemsize + inside * (1 if format == "int8" else 0.5) + scales
    return {"quantized_parameters": inside, "weights_bytes": whole, "weights_bytes_quantized": round(after)}


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure(plan: Plan, progress: Progress) -> dict[str, Any]:
    config = plan.config
    before, after = config.student, str(config.out)
    rows = footprint.compare(
        before, after, _prompt(plan), config.rounds, lambda *at: progress("measuring in turns", *at)
    )
    if config.from_cache:
        evaluation = config.out / "evaluation"
        asked = EvaluateConfig(
            models=(("before", before), ("after", after)),
            from_cache=config.from_cache,
            out=evaluation,
            max_length=MAX_LENGTH,
            generate=ANSWERS,
            temperatures=(0.0,),  # greedy, so that answers differ by the weights alone
        )
        rows += quality(compare.rows([evaluate(asked, progress)], against="before"))
    return {
        "device": machine.device_name(),
        "date": date.today().isoformat(),
        "versions": machine.versions(),
        "rounds": config.rounds,
        "prompt_tokens": footprint.PROMPT_TOKENS,
        "new_tokens": footprint.NEW_TOKENS,
        "batch": 1,
        "quality_on": [cache.fingerprint for cache in plan.test.caches] if plan.test else None,
        "verdict": verdict(rows, machine.device_name()),
        "rows": rows,
    }


def _prompt(plan: Plan) -> list[int]:
    """Prompts of the test split, end to end, as long as is measured; tokens drawn at random where there is no cache."""
    if plan.test is None:
        size = models.config(identity.model_folder(plan.config.student)).get_text_config().vocab_size
        return np.random.default_rng(0).integers(size, size=footprint.PROMPT_TOKENS).tolist()
    first = plan.test.load(np.arange(min(len(plan.test), footprint.PROMPT_TOKENS)))
    ids = np.concatenate([sample.prompt_ids for sample in first])
    return np.resize(ids, footprint.PROMPT_TOKENS).tolist()


def quality(compared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a metric: before, after, and the paired difference with its 95% interval."""
    values = {(row["label"], row["metric"]): row for row in compared}
    rows = []
    for (label, metric), row in values.items():
        if label == "after" and "difference" in row:
            before = values["before", metric]["value"]
            mine = {"metric": metric, "unit": NATS.get(metric, ""), "before": before, "after": row["value"]}
            rows.append(mine | {"difference": row["difference"], "interval": row["difference_interval"]})
    return rows


def table(rows: Sequence[dict[str, Any]], exact: bool = False) -> tuple[list[str], list[list[Any]]]:
    """Names and lines: for the screen, or ``exact`` for a file."""
    if exact:
        names = ["metric", "unit", "before", "after", "ratio", "difference"]
        spans = [(row.get("ratio_range") or row.get("interval") or (None, None)) for row in rows]
        return [*names, "low", "high"], [[row.get(n) for n in names] + list(span) for row, span in zip(rows, spans)]
    lines = [
        [
            row["metric"],
            row["unit"],
            row["before"],
            row["after"],
            _within(row.get("ratio"), row.get("ratio_range")),
            compare.with_interval(row.get("difference"), row.get("interval")),
        ]
        for row in rows
    ]
    return ["metric", "unit", "before", "after", "after / before (range)", "difference (95%)"], lines


def _within(ratio: float | None, span: Sequence[float] | None) -> str:
    return compare.with_interval(ratio, None if span is None or span[0] == span[1] else (span[0], span[1]))


def verdict(rows: Sequence[dict[str, Any]], device: str) -> str:
    """What it saves and what it costs, in a sentence or two."""
    of = {row["metric"]: row for row in rows}
    speed = {name: _within(of[name]["ratio"], of[name].get("ratio_range")) for name in ("prefill", "decode")}
    size = {name: f"{of[name]['before']:.0f} to {of[name]['after']:.0f} MB" for name in ("disk", "weights in memory")}
    said = (
        f"Weights on disk {size['disk']} ({1 / of['disk']['ratio']:.2f} times smaller), in memory {size['weights in memory']}. "
        f"On this machine ({device}), one sequence at a time, it reads prompts at {speed['prefill']} and writes answers at "
        f"{speed['decode']} times the speed of before (range over rounds). "
    )
    if "kl" not in of:
        return said + "What it costs in quality was not measured: that needs --from-cache."
    kl = of["kl"]
    changed = compare.with_interval(kl["difference"], kl["interval"])
    unsure = kl["interval"] is None or kl["interval"][0] <= 0 <= kl["interval"][1]
    said += (
        f"KL to the teacher goes from {kl['before']:.3f} to {kl['after']:.3f} nats a token, a difference of {changed}"
    )
    return said + (", which these samples cannot tell from none." if unsure else ".")
