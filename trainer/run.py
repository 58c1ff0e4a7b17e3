"""A training run, resolved before its first step: what was asked for, every derived number, and where it goes on.

Nothing here loads weights or writes; ``distill.py`` does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kdcache import machine, writer
from kdcache.errors import KDError, UsageError
from kdcache.format import FORMAT_VERSION, differing_fields
from kdcache.reader import Cache
from kdcache.storage import Location
from trainer import losses
from trainer.batches import Units, open_caches, select
from trainer.student import check_tokenizer, quantized_by

RUN_FILE = "kdcache.json"
CONFIG_FILE = "run.yaml"
METHODS = ("kd", "sft")
SAMPLES_PER_DEVICE = 8


@dataclass(frozen=True)
class StudentConfig:
    """What every training of a student is asked for; ``arguments`` are its library's, by their own names."""

    from_cache: tuple[Location, ...]
    student: str
    output_dir: Path
    where: str | None = None
    dtype: str = "float32"
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_modules: str = "all-linear"
    load_in_4bit: bool = False
    overwrite: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    #: Where things are, and what does not change the result.
    places: ClassVar[tuple[str, ...]] = ("from_cache", "output_dir", "overwrite")

    def as_json(self) -> dict[str, Any]:
        """What makes the result what it is."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.places}

    def as_yaml(self) -> str:
        """For ``--config``."""
        options = {**self.as_json(), "from_cache": [str(path) for path in self.from_cache]}
        options |= options.pop("arguments")
        return yaml.safe_dump({k: v for k, v in options.items() if v is not None}, sort_keys=False)


@dataclass(frozen=True)
class TrainConfig(StudentConfig):
    """What ``kd train`` was asked for; ``arguments`` are TrainingArguments."""

    method: str = "kd"
    alpha: float = 0.5
    divergence: str = "forward_kl"
    max_length: int = 2048
    too_long: str = "drop"
    evals_per_epoch: int = 4
    early_stopping_patience: int | None = None


@dataclass(frozen=True)
class Run:
    """A training run resolved: every derived number, before the first step."""

    config: TrainConfig
    train: Units
    validation: Units
    alpha: float
    ranks: int
    samples_per_device: int
    samples_per_step: int
    steps_per_epoch: int
    max_steps: int
    arguments: dict[str, Any]  # for TrainingArguments
    compile: dict[str, Any] | None  # for torch.compile
    record: dict[str, Any]
    checkpoint: str | None

    def facts(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.config.output_dir),
            "method": self.config.method,
            "alpha": self.alpha,
            "divergence": self.config.divergence if self.alpha else None,
            "train_samples": len(self.train),
            "train_completion_tokens": int(self.train.completion_tokens.sum()),
            "train_tokens": int(self.train.tokens.sum()),
            "longer_than_max_length": self.train.too_long,
            "validation_samples": len(self.validation),
            "samples_per_step": self.samples_per_step,
            "tokens_per_step": round(float(self.train.tokens.mean()) * self.samples_per_step),
            "steps_per_epoch": self.steps_per_epoch,
            "max_steps": self.max_steps,
            "resume_from": self.checkpoint,
        }


def open_for(config: StudentConfig) -> list[Cache]:
    """The caches, once it is clear that the student can be trained on them, and will not be deleted first."""
    if config.load_in_4bit and config.lora_r is None:
        raise UsageError(
            "--load-in-4bit needs --lora-r: weights of 4 bits cannot be trained, what LoRA adds to them can"
        )
    if quantized_by(config.student):
        raise KDError(
            f"{config.student} is quantized, and such weights cannot be trained: train the student that it was made from "
            "(--load-in-4bit --lora-r 16 for QLoRA)"
        )
    caches = open_caches(config.from_cache)
    check_tokenizer(config.student, caches[0])
    student = Path(config.student).resolve()
    if config.overwrite and config.output_dir.resolve() in (student, *student.parents):
        raise UsageError(
            f"--overwrite would delete the student {student}: it is inside --output-dir {config.output_dir}"
        )
    return caches


def prepare(config: TrainConfig) -> Run:
    """Check caches, tokenizer and folder, and work out the steps. Nothing is written, no weights are loaded."""
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    if not 0.0 <= config.alpha <= 1.0:
        raise UsageError(f"--alpha {config.alpha}: expected 0 (only cross-entropy) to 1 (only the teacher)")
    caches = open_for(config)
    alpha = config.alpha if config.method == "kd" else 0.0
    for cache in caches:
        if alpha:
            losses.check(config.divergence, cache.plan["fields"]["sparsify"])
    cut = config.too_long == "cut"
    train = select(caches, "train", config.where, config.max_length, cut)
    if not len(train):
        condition = f"--where {config.where!r} and " if config.where else ""
        raise KDError(
            f"no sample to train on: the train split is empty, or {condition}--max-length {config.max_length} leave nothing of it"
        )
    validation = select(caches, "validation", config.where, config.max_length, cut)
    arguments = dict(config.arguments)
    _check_arguments(arguments)
    samples_per_device = arguments.get("per_device_train_batch_size", SAMPLES_PER_DEVICE)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    samples_per_step = samples_per_device * arguments.get("gradient_accumulation_steps", 1) * ranks
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    max_steps = arguments.get("max_steps", -1)
    if max_steps <= 0:
        max_steps = math.ceil(arguments.get("num_train_epochs", 3) * steps_per_epoch)
    record = {
        "format_version": FORMAT_VERSION,
        "config": config.as_json(),
        "samples_per_step": samples_per_step,
        "caches": [{"path": str(c.path), "fingerprint": c.fingerprint} for c in caches],
        "made_with": made_with(),
        "finished": False,
        **bos_of(caches),
    }
    return Run(
        config,
        train,
        validation,
        alpha,
        ranks,
        samples_per_device,
        samples_per_step,
        steps_per_epoch,
        max_steps,
        compile=_take_compile(arguments),
        arguments=arguments,
        record=record,
        checkpoint=resume_point(config, record, _settings, "kd train"),
    )


def bos_of(caches: Sequence[Cache]) -> dict[str, str]:
    """How the prompts of the caches begin, where that was chosen: `kd chat` asks the student in the same way."""
    chosen = [cache.plan["fields"]["bos"] for cache in caches if "bos" in cache.plan["fields"]]
    return {"bos": chosen[0]} if chosen else {}


def made_with() -> dict[str, str]:
    """What a run was made on."""
    return {"device": machine.device(), **machine.versions()}


def begin(config: StudentConfig, record: dict[str, Any]) -> None:
    """Make the folder of a run: empty under --overwrite, with what was asked for and what it was resolved to."""
    folder = config.output_dir
    if config.overwrite and folder.is_dir():
        _clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer.write_json(folder / RUN_FILE, record)
    (folder / CONFIG_FILE).write_text(config.as_yaml(), encoding="utf-8")


def _clear(folder: Path) -> None:
    """Delete what a run left; refuse a folder that holds no run."""
    if not (folder / RUN_FILE).is_file() and get_last_checkpoint(str(folder)) is None and any(folder.iterdir()):
        raise KDError(f"--overwrite: {folder} holds no run; delete it yourself if that is meant")
    shutil.rmtree(folder)


def _take_compile(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """--torch-compile, --torch-compile-backend and --torch-compile-mode, taken out of ``arguments``."""
    asked = arguments.pop("torch_compile", None)
    options = {name: arguments.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in options.items() if value is not None}
    wanted = bool(options) if asked is None else asked
    return options if wanted else None


#: TrainingArguments that cannot mean here what they mean elsewhere.
REFUSED_ARGUMENTS = {
    "label_smoothing_factor": "the teacher's probabilities are the soft labels",
    "group_by_length": "the order of batches is fixed by the seed",
    "output_dir": "it is an option of this command",
    "remove_unused_columns": "batches hold just what is used",
    "ignore_data_skip": "the stream starts at the right batch by itself",
}


def _check_arguments(arguments: dict[str, Any]) -> None:
    """UsageError for what TrainingArguments would take and fail on later."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if name in REFUSED_ARGUMENTS:
            raise UsageError(f"{flag}: not used here, {REFUSED_ARGUMENTS[name]}")
        number = isinstance(defaults[name], int | float) and not isinstance(defaults[name], bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UsageError(f"{flag} {value}: expected a number")
        if name in ("eval_strategy", "save_strategy") and value == "epoch":
            raise UsageError(f"{flag} epoch: use --evals-per-epoch 1")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"):
        if name in arguments and arguments[name] <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {arguments[name]}: expected more than 0")


def resume_point(
    config: StudentConfig, record: dict[str, Any], settings: Callable[[dict[str, Any]], dict[str, Any]], command: str
) -> str | None:
    """The checkpoint to go on from. KDError if the folder holds something else: ``settings`` of a record must be the same."""
    folder = config.output_dir
    if config.overwrite or not folder.exists():
        return None
    if not folder.is_dir():
        raise UsageError(f"--output-dir {folder} is a file; expected a folder")
    checkpoint = get_last_checkpoint(str(folder))
    found = next(
        (f for f in (folder / RUN_FILE, *([Path(checkpoint) / RUN_FILE] if checkpoint else [])) if f.is_file()), None
    )
    if found is None:
        if any(folder.iterdir()):
            raise KDError(
                f"--output-dir {folder} is not empty and holds no run of {command}; use another, or --overwrite"
            )
        return None
    old = json.loads(found.read_text(encoding="utf-8"))
    if old.get("finished"):
        raise KDError(f"--output-dir {folder} holds a finished run; use another, or --overwrite")
    differing = differing_fields(settings(old), settings(record))
    if differing:
        raise KDError(
            f"--output-dir {folder} holds an interrupted run with other settings (old -> new):\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings to continue it, another folder, or --overwrite."
        )
    return checkpoint


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    config = dict(record["config"])
    cuts = ("per_device_train_batch_size", "gradient_accumulation_steps")  # of the same step into parts
    config["arguments"] = {name: value for name, value in config["arguments"].items() if name not in cuts}
    fingerprints = [cache["fingerprint"] for cache in record["caches"]]
    return {**config, "samples_per_step": record.get("samples_per_step"), "caches": fingerprints}


#: What options were called before transformers 5, or are called elsewhere.
RENAMED = {
    "evaluation_strategy": "--eval-strategy",
    "warmup_ratio": "--warmup-steps (below 1: a share of all steps)",
    "no_cuda": "--use-cpu",
    "use_mps_device": "nothing: the device is found by itself",
    "per_gpu_train_batch_size": "--per-device-train-batch-size",
    "per_gpu_eval_batch_size": "--per-device-eval-batch-size",
    "adafactor": "--optim adafactor",
    "fp16_full_eval": "--dtype float16",
    "bf16_full_eval": "--dtype bfloat16",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_model_id": "--hub-model-id",
    "push_to_hub_token": "--hub-token",
    "save_safetensors": "nothing: it is always safetensors",
    "jit_mode_eval": "--torch-compile",
    "torchdynamo": "--torch-compile-backend",
    "max_seq_length": "--max-length",
    "model_name_or_path": "--student",
    "temperature": "nothing: a divergence at another temperature needs the full vocabulary, which no cache holds",
    "loss_type": "--divergence",
    "lora_rank": "--lora-r",
    "packing": "nothing: samples are always packed, without padding",
}


def training_argument_names() -> Sequence[str]:
    return [f.name for f in dataclasses.fields(TrainingArguments)]
