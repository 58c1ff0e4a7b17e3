"""Write a trained student with its linear layers in 4 or 8 bits, and measure what that saves and costs.

    kd quantize data/kd --out data/kd-nf4 --from-cache data/qwen

nf4 and int8 are formats of bitsandbytes. w4a16 is AutoRound's in the layout of compressed-tensors, calibrated on the cache's
train split. Embeddings and head stay as they are. The folder loads with ``from_pretrained`` and is saved completely or not
at all; ``quantization.json`` in it says what it was made from and, once measured, both sides of every figure.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache import machine, models
from kdcache.errors import KDError, UsageError, first_line
from kdcache.models import identity
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.storage import atomic, folders
from trainer.data.select import Selection, open_caches, select
from trainer.quantize.config import QuantizeConfig
from trainer.quantize.measure import MAX_LENGTH, Measurement, csv_table, measure
from trainer.student.load import check_tokenizer, load_student, quantized_by

RECORD, TABLE = folders.QUANTIZED.marker, "quantization.csv"
CALIBRATION_ROWS, CALIBRATION_TOKENS = 64, 512

FORMATS = {
    "nf4": "4-bit NormalFloat, double quantization (bitsandbytes)",
    "int8": "8-bit integers, LLM.int8() (bitsandbytes)",
    "w4a16": "4-bit integers in groups, calibrated (AutoRound, compressed-tensors)",
}


@dataclass(frozen=True)
class QuantizationRecord:
    """What quantization.json says."""

    settings: dict[str, Any]  # equal settings give an equal student
    student: str
    meaning: str  # of the format
    measured: Measurement | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "student": self.student,
            "meaning": self.meaning,
            "measured": None if self.measured is None else self.measured.as_json(),
        }


@dataclass(frozen=True)
class Quantization:
    """A quantization that passed all checks, before anything is written."""

    config: QuantizeConfig
    dtype: str  # of the student, and of what stays as it is
    group_size: int  # of w4a16
    train: Selection | None
    test: Selection | None
    record: QuantizationRecord
    sizes: dict[str, int]

    def facts(self) -> dict[str, Any]:
        return {"student": self.config.student, "out": str(self.config.out), **self.record.settings, **self.sizes}


def prepare(config: QuantizeConfig) -> Quantization:
    """Check student, cache and folder. Nothing is written, no weights are loaded."""
    if config.format not in FORMATS:
        raise UsageError(f"--format {config.format}: expected one of {', '.join(FORMATS)}")
    folder, out = Path(identity.model_folder(config.student)).resolve(), config.out.resolve()
    if quantized_by(config.student):
        raise KDError(f"{config.student} is quantized already; quantize the student that it comes from")
    if out in (folder, *folder.parents) or folder in out.parents:
        raise UsageError(
            f"--out {config.out}: the student and its quantized copy need separate folders, neither inside the other"
        )
    if config.format == "w4a16" and not config.from_cache:
        raise UsageError("--format w4a16 is calibrated on a cache's train split: name a cache with --from-cache")
    train = test = None
    if config.from_cache:
        caches = open_caches(config.from_cache)
        check_tokenizer(config.student, caches[0])
        train, test = (select(caches, split, None, MAX_LENGTH) for split in ("train", "test"))
        if config.format == "w4a16" and not len(train):
            raise KDError("--format w4a16 is calibrated on the cache's train split, which is empty")
        if config.measure and not len(test):
            raise KDError(
                "the cache's test split is empty, so no quality can be measured on it; use another cache, or --no-measure"
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
    record = QuantizationRecord(settings, config.student, FORMATS[config.format])
    _is_saved(config, settings)  # refuses a folder that holds anything else
    return Quantization(config, dtype, group_size, train, test, record, _sizes(shape, config.format, group_size))


def _is_saved(config: QuantizeConfig, settings: dict[str, Any]) -> bool:
    """Return whether this very student is saved and not measured yet; KDError if the folder holds anything else."""
    out = config.out
    folders.check_place(out, "--out")
    if config.overwrite:
        folders.check_deletable(out, folders.QUANTIZED, reads=[config.student, *config.from_cache])
        return False
    if folders.is_empty(out):
        return False
    if folders.holds(out, folders.QUANTIZED):
        saved = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if saved["settings"] == settings and saved["measured"] is None:
            return True
    raise KDError(f"--out {out} is not empty; use another, or --overwrite")


def quantize(quantization: Quantization, show: ShowProgress = silent) -> QuantizationRecord:
    """Save the quantized student and, unless ``--no-measure`` was given, measure both; return its record."""
    config, record = quantization.config, quantization.record
    with folders.held(config.out, folders.QUANTIZED):
        if not _is_saved(config, record.settings):  # checked again, as another process may have written there since
            with folders.replacing(config.out, folders.QUANTIZED) as scratch:
                _save(quantization, scratch, show)
                atomic.write_text(scratch / "README.md", _card(quantization))
                atomic.write_json(scratch / RECORD, record.as_json())
        if not config.measure:
            return record
        measured = measure(config.student, config.out, config.from_cache, quantization.test, config.rounds, show)
        record = replace(record, measured=measured)
        atomic.write_csv(config.out / TABLE, *csv_table(measured.changes))
        atomic.write_json(config.out / RECORD, record.as_json())
        return record


def _card(quantization: Quantization) -> str:
    """Return the student's own card, where it has one, with a section on the format."""
    card = Path(identity.model_folder(quantization.config.student)) / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {quantization.config.out.resolve().name}\n"
    return (
        f"{before}\n## Quantized\n\nThe linear layers of this model are {FORMATS[quantization.config.format]}; embeddings and head stay in "
        f"{quantization.dtype}. If it was measured, what that saves and costs is in `{RECORD}`.\n"
    )


# --- saving -----------------------------------------------------------------------------------------------------------


def _save(quantization: Quantization, folder: Path, show: ShowProgress) -> None:
    show(Progress(0, 1, "students", "quantizing"))
    if quantization.config.format == "w4a16":
        _auto_round(quantization, folder)
    else:
        student, tokenizer = load_student(quantization.config.student, quantization.dtype, quantization.config.format)
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    show(Progress(1, 1, "students", "quantizing"))


def _auto_round(quantization: Quantization, folder: Path) -> None:
    """Quantize with AutoRound without tuning (``iters=0``): rounding weighed by the layers' inputs on the cache's samples."""
    from auto_round import AutoRound

    logging.getLogger("autoround").setLevel(logging.WARNING)  # below it is only progress, which kd shows itself
    student, tokenizer = load_student(quantization.config.student, quantization.dtype)
    assert quantization.train is not None
    rows = calibration(quantization.train)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            AutoRound(
                student,
                tokenizer,
                scheme="W4A16",
                group_size=quantization.group_size,
                iters=0,
                dataset=list(rows.split(1)),
                nsamples=len(rows),
                seqlen=rows.shape[1],
                device_map=machine.torch_device(),
                enable_torch_compile=False,
                trust_remote_code=models.code_is_trusted(),  # its own default is True
            ).quantize_and_save(str(folder), format="llm_compressor")
        except Exception as error:
            raise KDError(f"AutoRound could not quantize {quantization.config.student}: {first_line(error)}") from error
    if not (folder / "config.json").is_file():  # AutoRound has saved into a folder inside, whose name it chose
        (inner,) = folder.iterdir()
        for file in inner.iterdir():
            file.rename(folder / file.name)
        inner.rmdir()


def calibration(units: Selection) -> torch.Tensor:
    """Return prompts and completions of random samples of the train split, end to end, cut into [rows, tokens]."""
    random = np.random.default_rng(0)
    order = random.permutation(len(units))
    tokens = np.cumsum(units.tokens[order])
    enough = order[: int(np.searchsorted(tokens, CALIBRATION_ROWS * CALIBRATION_TOKENS)) + 1]
    ids = np.concatenate([np.concatenate([s.prompt_ids, s.completion_ids]) for s in units.load(enough)])
    width = min(CALIBRATION_TOKENS, len(ids))
    rows = min(CALIBRATION_ROWS, len(ids) // width)
    return torch.as_tensor(ids[: rows * width].reshape(rows, width).astype(np.int64))


# --- sizes, without weights -------------------------------------------------------------------------------------------


def _shape(student: str) -> Any:
    """Return the student's modules without memory for their weights."""
    config = models.config(identity.model_folder(student))
    with torch.device("meta"):
        return models.untrained(config, dtype=config.dtype or torch.float32)


def _linear(shape: Any) -> list[torch.nn.Linear]:
    """Return the layers that are quantized: every linear one except the head."""
    head = shape.get_output_embeddings()
    return [module for module in shape.modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _group_size(shape: Any) -> int:
    """Return the largest group that divides the inputs of all layers."""
    for size in (128, 64, 32):
        if all(layer.in_features % size == 0 for layer in _linear(shape)):
            return size
    raise KDError(
        "--format w4a16 needs layers whose numbers of inputs are multiples of 32; this student has others, so use nf4"
    )


def _sizes(shape: Any, format_name: str, group_size: int) -> dict[str, int]:
    """Return the bytes of the weights before, and an estimate of those after."""
    weights_bytes = sum(p.numel() * p.element_size() for p in shape.parameters())
    layers = [layer.weight for layer in _linear(shape)]
    quantized = sum(weight.numel() for weight in layers)
    scales_bytes = {
        "nf4": quantized / 64 * (1 + 4 / 256),  # one byte per 64 weights, and one float per 256 of these
        "int8": 4 * sum(weight.shape[0] for weight in layers),  # one float per row
        "w4a16": quantized / group_size * 2,  # 16 bits per group
    }[format_name]
    bytes_per_weight = 1 if format_name == "int8" else 0.5
    after = weights_bytes - quantized * shape.dtype.itemsize + quantized * bytes_per_weight + scales_bytes
    return {
        "quantized_parameters": quantized,
        "weights_bytes": weights_bytes,
        "weights_bytes_quantized": round(after),
    }
