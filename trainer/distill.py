"""The student trainer: transformers.Trainer underneath, fed from the cache, never from the teacher.

    kd train --from-cache data/cache --student data/student --output-dir data/kd

The head and the loss run inside the student's own forward (bound on the model, so that save_pretrained stays what it
is, and so that FSDP holds the head's weight whole where it is used). The loss is the mean over the supervised tokens
of the global batch, whatever number of ranks and accumulation steps it is cut into.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from kdcache import writer
from kdcache.errors import KDError, UsageError, first_line
from kdcache.format import FORMAT_VERSION, differing_fields
from trainer import losses
from trainer.batches import IGNORE, Batch, Stream, in_order, open_caches, select
from trainer.student import check_tokenizer, load_student

RUN_FILE = "kdcache.json"
METHODS = ("kd", "sft")


@dataclass(frozen=True)
class TrainConfig:
    """What ``kd train`` was asked for; ``arguments`` are TrainingArguments by their own names."""

    from_cache: tuple[Path, ...]
    student: str
    output_dir: Path
    method: str = "kd"
    alpha: float = 0.5
    where: str | None = None
    max_length: int = 2048
    dtype: str = "float32"
    evals_per_epoch: int = 4
    early_stopping_patience: int | None = None
    overwrite: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "method": self.method,
            "alpha": self.alpha if self.method == "kd" else 0.0,
            "where": self.where,
            "max_length": self.max_length,
            "dtype": self.dtype,
            "evals_per_epoch": self.evals_per_epoch,
            "early_stopping_patience": self.early_stopping_patience,
            "arguments": self.arguments,
        }


# --- the loss, inside the student's forward ---------------------------------------------------------------------------


def attach_loss(student: Any, alpha: float) -> None:
    """Make ``student(**batch)`` return the loss of a packed batch and the sums that are reported.

        loss = sum over supervised tokens of (1 - alpha) CE(completion) + alpha KL(teacher || student), over their number

    The number is ``num_items_in_batch`` (of the global batch, from Trainer), else the batch's own.
    """
    refuse_unusual_head(student)

    def forward(
        self: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        shift_labels: Tensor,
        candidate_ids: Tensor,
        candidate_logprobs: Tensor,
        tail_logprobs: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        # No attention mask and no cache: only then do position ids that start again keep packed samples apart.
        hidden = self.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]  # (1, L, D)
        supervised = shift_labels[0] != IGNORE  # (L,)
        targets = shift_labels[0][supervised]  # (N,)
        logits = self.get_output_embeddings()(hidden[0][supervised])  # (N, V)
        if not len(targets):
            zero = (hidden.sum() + logits.sum()) * 0.0  # of every parameter, so that ranks stay in step
            return {"loss": zero, **{name: zero.detach() for name in ("kl", "ce", "agreement", "tokens")}}
        ce = losses.cross_entropy(logits, targets)
        loss = (1.0 - alpha) * ce.sum()
        sums = {"ce": ce.detach().sum(), "tokens": torch.tensor(float(len(targets)), device=ce.device)}
        if alpha > 0 or not self.training:
            kl = losses.forward_kl(logits, candidate_ids, candidate_logprobs, tail_logprobs)
            loss = loss + alpha * kl.sum()
            sums["kl"] = kl.detach().sum()
        if not self.training:
            sums["agreement"] = (logits.argmax(dim=-1) == candidate_ids[:, 0]).float().sum()
        return {"loss": loss / (len(targets) if num_items_in_batch is None else num_items_in_batch), **sums}

    student.forward = MethodType(forward, student)


def detach_loss(student: Any) -> None:
    """The student's own forward again."""
    student.__dict__.pop("forward", None)


def refuse_unusual_head(student: Any) -> None:
    """Heads that scale or cap their logits would be trained on other logits than they are used with."""
    config = student.config.get_text_config()
    for name, usual in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        value = getattr(config, name, usual)
        if value is not None and value != usual:
            raise KDError(
                f"{type(student).__name__} has a head with {name} = {value}, which distillation here does not support yet"
            )


def measure(student: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Held-out metrics over all supervised tokens: kl and ce in nats, agreement with the teacher's choice, tokens.

    The student must have its loss attached.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    totals = dict.fromkeys(("kl", "ce", "agreement", "tokens"), 0.0)
    with torch.no_grad():
        for batch in batches:
            output = student(**{name: value.to(device) for name, value in batch.items()})
            for name in totals:
                totals[name] += float(output[name])
    student.train(was_training)
    tokens = totals.pop("tokens")
    return {**{name: value / max(tokens, 1.0) for name, value in totals.items()}, "tokens": tokens}


# --- the trainer ------------------------------------------------------------------------------------------------------


class DistillTrainer(Trainer):
    """Trainer with our stream of batches and our held-out metrics; everything else is its own."""

    def __init__(
        self, stream: Stream, held_out: Callable[[], Iterable[Batch]] | None, record: dict[str, Any], **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.stream, self.held_out, self.record = stream, held_out, record
        self._sums: dict[str, Tensor] = {}
        self.add_callback(_Steps(stream.steps_per_epoch))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.stream, batch_size=None)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("kl", "ce", "tokens"):
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0.0) + outputs[name]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and "tokens" in self._sums:
            tokens = self._sums.pop("tokens")
            logs |= {name: round(float(value / tokens), 4) for name, value in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.held_out is None:
            return {}
        found = measure(self.model, self.held_out())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        writer.write_json(Path(output_dir or str(self.args.output_dir)) / RUN_FILE, self.record)


class _Steps(TrainerCallback):
    """Our stream goes on in the middle of an epoch, which Trainer does not see: the epoch follows from the step.

    The last step is always measured, so that what is kept is the best of all that was trained.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.steps_per_epoch
        if control.should_save:
            control.should_log = True  # so that no logged mean spans a checkpoint, and a resumed run logs the same
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class _Report(TrainerCallback):
    """Hands every log line of Trainer's to the caller."""

    def __init__(self, report: Callable[[int, int, dict[str, float]], None]):
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.report(state.global_step, state.max_steps, logs)


@dataclass(frozen=True)
class Run:
    """A training run resolved: every derived number, before the first step."""

    config: TrainConfig
    train: Any  # Units
    validation: Any  # Units
    steps_per_epoch: int
    max_steps: int
    samples_per_step: int
    record: dict[str, Any]
    checkpoint: str | None

    def facts(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.config.output_dir),
            "method": self.config.method,
            "alpha": self.record["config"]["alpha"],
            "train_samples": len(self.train),
            "train_completion_tokens": int(self.train.completion_tokens.sum()),
            "train_tokens": int(self.train.tokens.sum()),
            "longer_than_max_length": self.train.dropped,
            "validation_samples": len(self.validation),
            "samples_per_step": self.samples_per_step,
            "steps_per_epoch": self.steps_per_epoch,
            "max_steps": self.max_steps,
            "resume_from": self.checkpoint,
        }


def prepare(config: TrainConfig) -> Run:
    """Check caches, tokenizer and folder, and work out the steps. Nothing is written, no weights are loaded."""
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: expected one of {', '.join(METHODS)}")
    if not 0.0 <= config.alpha <= 1.0:
        raise UsageError(f"--alpha {config.alpha}: expected 0 (only cross-entropy) to 1 (only the teacher)")
    caches = open_caches(config.from_cache)
    check_tokenizer(config.student, caches[0])
    student = Path(config.student).resolve()
    if config.overwrite and config.output_dir.resolve() in (student, *student.parents):
        raise UsageError(
            f"--overwrite would delete the student {student}: it is inside --output-dir {config.output_dir}"
        )
    train = select(caches, "train", config.where, config.max_length)
    if not len(train):
        condition = f"--where {config.where!r} and " if config.where else ""
        raise KDError(
            f"no sample to train on: the train split is empty, or {condition}--max-length {config.max_length} leave nothing of it"
        )
    validation = select(caches, "validation", config.where, config.max_length)
    arguments = config.arguments
    _check_arguments(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    per_device = arguments.get("per_device_train_batch_size", 8)
    samples_per_step = per_device * arguments.get("gradient_accumulation_steps", 1) * ranks
    steps_per_epoch = math.ceil(len(train) / samples_per_step)
    max_steps = arguments.get("max_steps", -1)
    if max_steps <= 0:
        max_steps = math.ceil(arguments.get("num_train_epochs", 3) * steps_per_epoch)
    record = {
        "format_version": FORMAT_VERSION,
        "config": config.as_json(),
        "samples_per_step": samples_per_step,
        "caches": [{"path": str(c.path), "fingerprint": c.fingerprint} for c in caches],
        "finished": False,
    }
    checkpoint = _resume_point(config, record)
    return Run(config, train, validation, steps_per_epoch, max_steps, samples_per_step, record, checkpoint)


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


def _resume_point(config: TrainConfig, record: dict[str, Any]) -> str | None:
    """The checkpoint to go on from. KDError if the folder holds something else."""
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
                f"--output-dir {folder} is not empty and holds no run of kd train; use another, or --overwrite"
            )
        return None
    old = json.loads(found.read_text(encoding="utf-8"))
    if old.get("finished"):
        raise KDError(f"--output-dir {folder} holds a finished run; use another, or --overwrite")
    differing = differing_fields(_settings(old), _settings(record))
    if differing:
        raise KDError(
            f"--output-dir {folder} holds an interrupted run with other settings (old -> new):\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings to continue it, another folder, or --overwrite."
        )
    return checkpoint


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    fingerprints = [cache["fingerprint"] for cache in record["caches"]]
    return {**record["config"], "samples_per_step": record["samples_per_step"], "caches": fingerprints}


def train(run: Run, report: Callable[[int, int, dict[str, float]], None]) -> dict[str, Any]:
    """Train, keep the best checkpoint by the validation split, and save it as a Hugging Face folder."""
    config = run.config
    student, tokenizer = load_student(config.student, config.dtype)
    arguments = _training_arguments(run)
    if config.overwrite and config.output_dir.is_dir():
        _clear(config.output_dir)
    attach_loss(student, run.record["config"]["alpha"])
    config.output_dir.mkdir(parents=True, exist_ok=True)
    writer.write_json(config.output_dir / RUN_FILE, run.record)

    step = 0
    if run.checkpoint:
        state = json.loads((Path(run.checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"]
    head_rows = student.get_output_embeddings().weight.shape[0]
    stream = Stream(
        run.train,
        head_rows,
        run.samples_per_step,
        parts=arguments.gradient_accumulation_steps * arguments.world_size,
        rank=arguments.process_index,
        ranks=arguments.world_size,
        seed=arguments.data_seed if arguments.data_seed is not None else arguments.seed,
        step=step,
    )
    held_out = None
    if len(run.validation):
        held_out = lambda: in_order(run.validation, head_rows, arguments.per_device_eval_batch_size)  # noqa: E731
    callbacks: list[TrainerCallback] = [_Report(report)]
    if config.early_stopping_patience is not None:
        if held_out is None:
            raise UsageError("--early-stopping-patience needs a validation split, and the cache's is empty")
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    trainer = DistillTrainer(
        stream,
        held_out,
        run.record,
        model=student,
        args=arguments,
        eval_dataset=run.validation if held_out else None,  # Trainer asks that there is one; ``evaluate`` is ours
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    _quiet(trainer)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    detach_loss(student)
    trainer.record = {**run.record, "finished": True, "history": trainer.state.log_history}
    trainer.save_model()
    trainer.save_state()
    return {
        "output_dir": str(config.output_dir),
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_metric": trainer.state.best_metric,
    }


def _training_arguments(run: Run) -> TrainingArguments:
    config, given = run.config, dict(run.config.arguments)
    every = max(1, round(run.steps_per_epoch / config.evals_per_epoch))
    evaluates = len(run.validation) > 0
    eval_steps = given.pop("eval_steps", every)
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": given.get("per_device_train_batch_size", 8),
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, run.max_steps // 100),
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": eval_steps,
        "save_strategy": "steps",
        "save_steps": eval_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": evaluates,
        "metric_for_best_model": ("eval_kl" if config.method == "kd" else "eval_ce") if evaluates else None,
        "greater_is_better": False,
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments = defaults | given
    if arguments["report_to"] is None:  # `none` on the command line
        arguments["report_to"] = "none"
    if config.early_stopping_patience is not None:
        arguments["restore_callback_states_from_checkpoint"] = True  # else its count starts again at 0
    arguments |= {
        "output_dir": str(config.output_dir),
        "max_steps": run.max_steps,
        "ignore_data_skip": True,  # our stream starts at the step itself
        "remove_unused_columns": False,
    }
    arguments.setdefault("per_device_train_batch_size", 8)
    try:
        made = TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"TrainingArguments refused these options: {first_line(error)}") from None
    if made.n_gpu > 1:  # DataParallel would cut packed rows; torchrun gives each GPU a process
        made._n_gpu = 1
    return made


def _quiet(trainer: Trainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _clear(folder: Path) -> None:
    """Delete what a run left; refuse a folder that holds no run."""
    import shutil

    if not (folder / RUN_FILE).is_file() and get_last_checkpoint(str(folder)) is None and any(folder.iterdir()):
        raise KDError(f"--overwrite: {folder} holds no run of kd train; delete it yourself if that is meant")
    shutil.rmtree(folder)


def training_argument_names() -> Sequence[str]:
    return [f.name for f in dataclasses.fields(TrainingArguments)]
