"""Resolve a run of ``kd train`` before its first step: every check, and every number that is derived from the options.

    kd train --from-cache data/cache --student data/student --output-dir data/kd --dry-run

Nothing here loads weights or writes files; ``trainer.train`` does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from kdcache import machine
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError
from trainer.data.select import Selection, select
from trainer.distill.config import TrainConfig
from trainer.loss import divergences
from trainer.run import parallel
from trainer.run.arguments import build
from trainer.run.folder import Start, find_start
from trainer.run.inputs import check_lora, open_checked
from trainer.run.record import fingerprints, new_record
from trainer.run.refused import REFUSED_BY_TRAIN
from trainer.run.values import check_values, requested_steps

METHODS = ("kd", "sft")
SAMPLES_PER_DEVICE = 8
EPOCHS = 3  # transformers' default of --num-train-epochs


@dataclass(frozen=True)
class Intervals:
    """After how many steps something happens; the warm-up lasts ``warmup`` steps."""

    warmup: int
    log: int
    measure: int | None
    save: int | None


@dataclass(frozen=True)
class Run:
    """A run of ``kd train``, resolved: every number is known before the first step."""

    config: TrainConfig
    train: Selection
    validation: Selection
    alpha: float  # the weight of the divergence; 0 under --method sft
    ranks: int
    samples_per_device: int
    samples_per_step: int
    steps_per_epoch: int
    max_steps: int
    parallel: str | None  # DDP or FSDP2, with the number of processes; None for one process
    arguments: dict[str, Any]  # as given, for TrainingArguments
    compile: dict[str, Any] | None  # options of torch.compile; None if it is off
    record: dict[str, Any]
    start: Start
    intervals: Intervals | None = None  # set last, as they need everything above

    def facts(self) -> dict[str, Any]:
        """Return every derived number, for the user to check before the first step."""
        accumulated = self.samples_per_step // (self.samples_per_device * self.ranks)
        facts = {
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
            "samples_per_device": self.samples_per_device,
            "gradient_accumulation_steps": accumulated,
            "samples_per_step": self.samples_per_step,
            "tokens_per_step": round(float(self.train.tokens.mean()) * self.samples_per_step),
            "steps_per_epoch": self.steps_per_epoch,
            "max_steps": self.max_steps,
        }
        if self.intervals is not None:
            facts |= {
                "warmup_steps": self.intervals.warmup,
                "steps_per_log": self.intervals.log,
                "steps_per_measurement": self.intervals.measure,
                "steps_per_checkpoint": self.intervals.save,
            }
        return facts | {"resume_from": self.start.checkpoint}


def prepare(config: TrainConfig) -> Run:
    """Return the resolved run. UsageError or KDError for anything that would end it before or during training."""
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    if not 0.0 <= config.alpha <= 1.0:
        raise UsageError(f"--alpha {config.alpha}: expected 0 (only cross-entropy) to 1 (only the teacher)")
    arguments = check_values(config.arguments, REFUSED_BY_TRAIN)
    caches = open_checked(config)
    check_lora(config)
    alpha = config.alpha if config.method == "kd" else 0.0
    if alpha:
        for cache in caches:
            divergences.check(config.divergence, cache.policy)
    train, validation = _selected(config, caches)

    samples_per_device = arguments.get("per_device_train_batch_size", SAMPLES_PER_DEVICE)
    ranks = parallel.processes()
    samples_per_step = samples_per_device * arguments.get("gradient_accumulation_steps", 1) * ranks
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    max_steps = requested_steps(arguments)
    if max_steps is None:
        max_steps = math.ceil(arguments.get("num_train_epochs", EPOCHS) * steps_per_epoch)
    record = new_record(config, caches, samples_per_step=samples_per_step)
    run = Run(
        config=config,
        train=train,
        validation=validation,
        alpha=alpha,
        ranks=ranks,
        samples_per_device=samples_per_device,
        samples_per_step=samples_per_step,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        parallel=parallel.mode(arguments),
        compile=pop_compile(arguments),
        arguments=arguments,
        record=record,
        start=find_start(config, record, _settings, "kd train"),
    )
    return dataclasses.replace(run, intervals=_intervals(training_arguments(run)))


def _selected(config: TrainConfig, caches: Sequence[Cache]) -> tuple[Selection, Selection]:
    """Return the samples to train on and to measure on."""
    cut = config.too_long == "cut"
    train = select(caches, "train", config.where, config.max_length, cut)
    if not len(train):
        condition = f"--where {config.where!r} and " if config.where else ""
        raise KDError(
            f"no sample to train on: the train split is empty, or {condition}--max-length {config.max_length} exclude all of it"
        )
    validation = select(caches, "validation", config.where, config.max_length, cut)
    if config.early_stopping_patience is not None and not len(validation):
        raise UsageError("--early-stopping-patience needs a validation split, and the cache's is empty")
    return train, validation


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a run to resume.

    Into how many parts a step is cut may differ, as long as the step keeps its samples.
    """
    config = dict(record["config"])
    cuts = ("per_device_train_batch_size", "gradient_accumulation_steps")
    config["arguments"] = {name: value for name, value in config["arguments"].items() if name not in cuts}
    return {**config, "samples_per_step": record.get("samples_per_step"), "caches": fingerprints(record)}


# --- TrainingArguments ------------------------------------------------------------------------------------------------


def training_argument_names() -> Sequence[str]:
    """Return the names of the options that are passed on to transformers."""
    return [f.name for f in dataclasses.fields(TrainingArguments)]


def pop_compile(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Remove --torch-compile and its backend and mode from ``arguments``; return them as options of torch.compile.

    None if it is off. A backend or a mode turns it on by itself. Trainer would compile the loss too, so it is not asked.
    """
    switch = arguments.pop("torch_compile", None)
    options = {name: arguments.pop(f"torch_compile_{name}", None) for name in ("backend", "mode")}
    options = {name: value for name, value in options.items() if value is not None}
    on = bool(options) if switch is None else switch
    return options if on else None


def training_arguments(run: Run) -> TrainingArguments:
    """Return the TrainingArguments of a run: what was given, else our defaults. UsageError for what cannot be combined.

    On several processes this starts their process group.
    """
    config, given = run.config, dict(run.arguments)
    measures = len(run.validation) > 0
    if not measures and given.get("eval_strategy", "no") != "no":
        raise UsageError(f"--eval-strategy {given['eval_strategy']} needs a validation split, and the cache's is empty")
    if config.early_stopping_patience is not None and given.get("eval_strategy") == "no":
        raise UsageError(
            "--early-stopping-patience needs measurements, and --eval-strategy no makes none; leave one out"
        )
    if given.get("gradient_accumulation_steps", 1) > len(run.train):
        raise UsageError(
            f"--gradient-accumulation-steps {given['gradient_accumulation_steps']}: a step would have more parts than there are "
            f"samples ({len(run.train)})"
        )
    for name in ("metric_for_best_model", "greater_is_better"):
        if given.get(name, True) is None:  # as if it had not been given: transformers would choose another default
            del given[name]
    eval_steps = given.pop("eval_steps", max(1, round(run.steps_per_epoch / config.evals_per_epoch)))
    metric = given.get("metric_for_best_model", "eval_kl" if config.method == "kd" else "eval_ce") if measures else None
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": run.samples_per_device,
        "per_device_eval_batch_size": run.samples_per_device,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, run.max_steps // 100),
        "eval_strategy": "steps" if measures else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        "save_steps": eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": measures and "no" not in (given.get("eval_strategy"), given.get("save_strategy")),
        "metric_for_best_model": metric,
        "greater_is_better": metric is not None and metric.endswith("agreement"),
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would log a loss that is not finite as one that is
        "use_cpu": machine.torch_device() == "cpu",
    }
    options = defaults | given
    if options["report_to"] is None:  # `none` on the command line
        options["report_to"] = "none"
    if config.early_stopping_patience is not None:
        options["restore_callback_states_from_checkpoint"] = True  # else its count would start again at 0
    options |= {
        "output_dir": str(config.output_dir),
        "max_steps": run.max_steps,
        "ignore_data_skip": True,  # our stream starts at the right step by itself
        "remove_unused_columns": False,
    }
    arguments: TrainingArguments = build(TrainingArguments, options, run.max_steps)
    if arguments.n_gpu > 1:  # DataParallel would cut packed rows; torchrun gives each GPU a process of its own
        arguments._n_gpu = 1
    return arguments


def _intervals(arguments: TrainingArguments) -> Intervals:
    """Return the intervals of a run in steps. An option below 1 is a share of all steps, rounded up as Trainer does."""

    def steps(value: float) -> int:
        return math.ceil(arguments.max_steps * value) if value < 1 else int(value)

    return Intervals(
        warmup=arguments.get_warmup_steps(arguments.max_steps),
        log=steps(arguments.logging_steps),
        measure=None if arguments.eval_strategy == "no" else steps(arguments.eval_steps or arguments.logging_steps),
        save=None if arguments.save_strategy == "no" else steps(arguments.save_steps),
    )
