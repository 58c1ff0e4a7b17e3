"""A training run, resolved before its first step: what was asked for, every derived number, and where it goes on.

Nothing here loads weights or writes; ``distill.py`` does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml
from transformers import TrainerCallback, TrainingArguments

from kdcache import machine
from kdcache.cache.format import FORMAT_VERSION, differing_fields
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError
from kdcache.storage import Location, atomic, folders
from trainer.data.stream import Units, open_caches, select
from trainer.loss import reference as losses
from trainer.run import checkpoints, parallel
from trainer.run.arguments import REFUSED_BY_TRAIN, check_lora, check_values, for_training
from trainer.run.checkpoints import Resume
from trainer.student.load import check_tokenizer, quantized_by

RUN_FILE = folders.RUN.marker
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
    parallel: str | None  # DDP or FSDP2, with the number of processes; None for one
    arguments: dict[str, Any]  # for TrainingArguments
    compile: dict[str, Any] | None  # for torch.compile
    record: dict[str, Any]
    checkpoint: str | None
    resume: Callable[[], Resume]  # finds ``checkpoint``, once more when the folder's lock is held
    notes: Sequence[str]  # on what it goes on from

    def facts(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.config.output_dir),
            "parallel": self.parallel,
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
    """Open the caches, after checking that this student can train on them and that --overwrite may delete what is there."""
    if config.load_in_4bit and config.lora_r is None:
        raise UsageError(
            "--load-in-4bit needs --lora-r: weights of 4 bits cannot be trained, what LoRA adds to them can"
        )
    if quantized_by(config.student):
        raise KDError(
            f"{config.student} is quantized, and such weights cannot be trained: train the student that it was made from "
            "(--load-in-4bit --lora-r 16 for QLoRA)"
        )
    folders.check_place(config.output_dir, "--output-dir")
    if config.overwrite:
        _check_deletable(config)
    caches = open_caches(config.from_cache)
    check_tokenizer(config.student, caches[0])
    return caches


def prepare(config: TrainConfig) -> Run:
    """Check caches, tokenizer and folder, and work out the steps. Nothing is written, no weights are loaded."""
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    if not 0.0 <= config.alpha <= 1.0:
        raise UsageError(f"--alpha {config.alpha}: expected 0 (only cross-entropy) to 1 (only the teacher)")
    max_steps = steps_asked_for(config.arguments)
    caches = open_for(config)
    alpha = config.alpha if config.method == "kd" else 0.0
    for cache in caches:
        if alpha:
            losses.check(config.divergence, cache.policy)
    cut = config.too_long == "cut"
    train = select(caches, "train", config.where, config.max_length, cut)
    if not len(train):
        condition = f"--where {config.where!r} and " if config.where else ""
        raise KDError(
            f"no sample to train on: the train split is empty, or {condition}--max-length {config.max_length} leave nothing of it"
        )
    validation = select(caches, "validation", config.where, config.max_length, cut)
    if config.early_stopping_patience is not None and not len(validation):
        raise UsageError("--early-stopping-patience needs a validation split, and the cache's is empty")
    arguments = check_values(config.arguments, REFUSED_BY_TRAIN)
    check_lora(config)
    samples_per_device = arguments.get("per_device_train_batch_size", SAMPLES_PER_DEVICE)
    ranks = parallel.processes()
    samples_per_step = samples_per_device * arguments.get("gradient_accumulation_steps", 1) * ranks
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    if max_steps is None:
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
    resume = partial(resume_point, config, record, _settings, "kd train")
    found = resume()
    run = Run(
        config,
        train,
        validation,
        alpha,
        ranks,
        samples_per_device,
        samples_per_step,
        steps_per_epoch,
        max_steps,
        parallel=parallel.mode(arguments),
        compile=_take_compile(arguments),
        arguments=arguments,
        record=record,
        checkpoint=found.path,
        resume=resume,
        notes=found.notes,
    )
    for_training(run)  # what cannot be together is told before anything is made
    return run


def bos_of(caches: Sequence[Cache]) -> dict[str, str]:
    """How the prompts of the caches begin, where that was chosen: `kd chat` asks the student in the same way."""
    chosen = [cache.plan["fields"]["bos"] for cache in caches if "bos" in cache.plan["fields"]]
    return {"bos": chosen[0]} if chosen else {}


def stop_unless_finite(logs: Mapping[Any, Any], step: int, fp16: bool = False) -> None:
    """KDError for a logged number that is not finite: nothing that is trained after it is worth keeping.

    Gradients of float16 overflow now and then, and such a step is left out by itself.
    """
    for name, value in logs.items():
        if isinstance(value, int | float) and not math.isfinite(value) and not (fp16 and name == "grad_norm"):
            raise KDError(
                f"step {step}: {name} is {value}, so the weights are no longer numbers; the last checkpoint is from before. "
                "Lower --learning-rate, or look for what the cache holds with: kd cache verify"
            )


def made_with() -> dict[str, str]:
    """What a run was made on."""
    return {"device": machine.device_name(), **machine.versions()}


class Resolved(Protocol):
    """What ``alone`` and ``begin`` need of a run."""

    @property
    def config(self) -> StudentConfig: ...
    @property
    def record(self) -> dict[str, Any]: ...
    @property
    def checkpoint(self) -> str | None: ...
    @property
    def resume(self) -> Callable[[], Resume]: ...


AnyRun = TypeVar("AnyRun", bound=Resolved)
Report = Callable[[int, int, dict[str, float]], None]  # step, steps, metrics


def alone(train: Callable[[AnyRun, Report], dict[str, Any]]) -> Callable[[AnyRun, Report], dict[str, Any]]:
    """``train`` while its first rank holds the lock of the run's folder: KDError if another process writes there.

    What ``begin`` set aside is deleted when the first step is done (``Begun``), and put back by an error before that.
    """

    @wraps(train)
    def holding(run: AnyRun, report: Report) -> dict[str, Any]:
        folder = run.config.output_dir
        if os.environ.get("RANK", "0") != "0":  # one process holds it for all that torchrun started
            return train(run, report)
        with folders.held(folder, folders.RUN, "--output-dir"):
            if run.resume().path != run.checkpoint:
                raise KDError(f"another process wrote to --output-dir {folder} just now; run the same command again")
            return train(run, report)

    return holding


class Begun(TrainerCallback):
    """Deletes what ``begin`` set aside once a step is done: the most that can go wrong has gone well by then."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folders.drop(Path(args.output_dir))


def begin(run: Resolved) -> None:
    """Write what was asked for and what it was resolved to, after all that can be checked; old contents are set aside.

    Without a checkpoint there is nothing to continue: what a start left that failed before its first one goes too.
    """
    config, folder = run.config, run.config.output_dir
    if config.overwrite:
        _check_deletable(config)  # again: loading took its time
    if run.checkpoint is None and (config.overwrite or folders.foreign(folder, folders.RUN) is None):
        folders.set_aside(folder)
    with checkpoints.saving(folder, 0):
        atomic.write_json(folder / RUN_FILE, run.record)
        atomic.write_text(folder / CONFIG_FILE, config.as_yaml())
    checkpoints.sweep(folder)


def _check_deletable(config: StudentConfig) -> None:
    folders.check_deletable(config.output_dir, folders.RUN, [config.student, *config.from_cache], flag="--output-dir")


def _take_compile(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """--torch-compile, --torch-compile-backend and --torch-compile-mode, taken out of ``arguments``."""
    asked = arguments.pop("torch_compile", None)
    options = {name: arguments.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in options.items() if value is not None}
    wanted = bool(options) if asked is None else asked
    return options if wanted else None


def steps_asked_for(arguments: dict[str, Any]) -> int | None:
    """--max-steps; None if it was not given, or is -1, its default. transformers also takes 0 and -7 for "not given"."""
    steps = arguments.get("max_steps", -1)
    if isinstance(steps, bool) or not isinstance(steps, int) or (steps < 1 and steps != -1):
        raise UsageError(
            f"--max-steps {steps}: expected a whole number of at least 1; leave it out for --num-train-epochs"
        )
    return None if steps == -1 else steps


def resume_point(
    config: StudentConfig, record: dict[str, Any], settings: Callable[[dict[str, Any]], dict[str, Any]], command: str
) -> Resume:
    """The checkpoint to go on from. KDError if the folder holds something else: ``settings`` of a record must be the same."""
    folder = config.output_dir
    if config.overwrite or folders.is_empty(folder):
        return Resume()
    records = [place / RUN_FILE for place in (folder, *checkpoints.listed(folder))]
    found = next((path for path in records if path.is_file()), None)
    if found is None:
        raise KDError(f"--output-dir {folder} is not empty and holds no run of {command}; use another")
    try:
        old = json.loads(found.read_text(encoding="utf-8"))
        finished, old_settings = old.get("finished"), settings(old)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KDError(
            f"{found} is damaged: it holds no record of a run; use another --output-dir, or --overwrite"
        ) from None
    if finished:
        raise KDError(f"--output-dir {folder} holds a finished run; use another, or --overwrite")
    differing = differing_fields(old_settings, settings(record))
    if differing and folders.has_results(folder, folders.RUN):  # else there is nothing to lose
        raise KDError(
            f"--output-dir {folder} holds an interrupted run with other settings (old -> new):\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings to continue it, another folder, or --overwrite."
        )
    return checkpoints.to_continue(folder, parallel.processes())


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
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "push_to_hub_model_id": "kd push",
    "push_to_hub_token": "kd push",
    "save_safetensors": "nothing: it is always safetensors",
    "jit_mode_eval": "--torch-compile",
    "torchdynamo": "--torch-compile-backend",
    "max_seq_length": "--max-length",
    "model_name_or_path": "--student",
    "temperature": "nothing: a divergence at another temperature needs the full vocabulary, which no cache holds",
    "loss_type": "--divergence",
    "lora_rank": "--lora-r",
    "group_by_length": "nothing: the order of batches is fixed by the seed",
    "packing": "nothing: samples are always packed, without padding",
}


def training_argument_names() -> Sequence[str]:
    return [f.name for f in dataclasses.fields(TrainingArguments)]
