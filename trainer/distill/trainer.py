"""Train a student from the cache: transformers.Trainer underneath, and never a teacher in memory.

    kd train --from-cache data/cache --student data/student --output-dir data/kd --dry-run      # every derived number
    kd train --from-cache data/cache --student data/student --output-dir data/kd
    torchrun --nproc-per-node 2 $(which kd) train --from-cache data/cache --student data/student --output-dir data/kd

Read it from top to bottom: ``train`` is a run; ``DistillTrainer`` is what we change in Trainer; ``attach_loss`` puts the
loss into the student; ``measure`` is the validation. A step, from the cache to the gradient:

    cache shards -> Stream (trainer/data/stream.py) -> packed row -> student's layers -> head and loss in one
                                                                      (trainer/loss/fused.py)
Invariant: the loss is the mean over the supervised tokens of the global batch, into however many ranks, accumulation
steps and packed rows that batch is cut.

Shapes: L tokens of S samples in a packed row, N of them supervised, K candidates of a position, D hidden size, V vocabulary.
A batch is input_ids, labels, shift_labels (1, L), offsets (S + 1,), candidate_ids, candidate_logprobs (N, K),
tail_logprobs (N,).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed

from kdcache.errors import KDError
from kdcache.machine import is_first_rank
from kdcache.storage import atomic
from trainer.data.pack import IGNORE, Batch, to_device
from trainer.data.stream import Stream, in_order
from trainer.distill import card
from trainer.distill.plan import Run, training_arguments
from trainer.loss.fused import Losses, distillation_loss
from trainer.loss.head import Head, head_of
from trainer.run import parallel
from trainer.run.checkpoints import trainer_state
from trainer.run.folder import DropOldContents, agreed_point, alone, begin, finish
from trainer.run.logs import OnStep, stop_unless_finite
from trainer.run.record import RUN_FILE
from trainer.run.trainer import RunTrainer
from trainer.student import lora as adapters
from trainer.student.attention import ONE_BY_ONE, Layers, layers_of
from trainer.student.load import answer_as_cached, load_student

# --- a run ------------------------------------------------------------------------------------------------------------


def train(run: Run, on_step: OnStep = lambda *_: None, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Train a student and save the best checkpoint, by the validation split, as a Hugging Face folder.

    ``run.facts()`` holds every number that is used here. ``say`` gets a sentence for the user before the first step: how
    samples are packed. KDError if another process writes to the folder.
    """
    with alone(run):
        return _train(run, on_step, say)


def _train(run: Run, on_step: OnStep, say: Callable[[str], None]) -> dict[str, Any]:
    # 1. The processes. TrainingArguments start their process group, so that ranks can agree on where to start.
    config, plan = run.config, run.train.caches[0].plan
    arguments = training_arguments(run)
    rank, ranks = arguments.process_index, arguments.world_size
    point = agreed_point(run)

    # 2. The student, with its loss inside its forward, and LoRA around it where that was asked for.
    set_seed(arguments.seed)  # LoRA draws its matrices before there is a Trainer
    student, tokenizer = load_student(config.student, config.dtype, "nf4" if config.load_in_4bit else None)
    answer_as_cached(student, tokenizer, plan)
    layers = attach_loss(student, run.alpha, config.divergence)
    run = _packed_in(run, layers)
    if is_first_rank():
        say(layers.note)
    head_rows = student.get_output_embeddings().weight.shape[0]  # V, with padding rows
    model = adapters.add(student, config)
    if run.compile is not None:
        student.base_model.compile(dynamic=True, **run.compile)  # the layers alone: the loss is three matrix products

    # 3. The data: this rank's micro-batches from the first step that is left, and the validation split in order.
    saved = None if point.checkpoint is None else trainer_state(point.checkpoint)
    stream = Stream(
        run.train,
        head_rows,
        run.samples_per_step,
        parts=arguments.gradient_accumulation_steps * ranks,
        rank=rank,
        ranks=ranks,
        seed=arguments.data_seed if arguments.data_seed is not None else arguments.seed,
        step=saved.global_step if saved else 0,
        ranks_per_node=parallel.ranks_per_node(ranks),
    )

    def held_out() -> Iterable[Batch]:
        return in_order(run.validation, head_rows, arguments.per_device_eval_batch_size, rank, ranks)

    # 4. Trainer.
    callbacks: list[TrainerCallback] = [DropOldContents(), _Report(on_step)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    measured = run.validation if len(run.validation) else None
    trainer = DistillTrainer(
        stream,
        held_out if measured is not None else None,
        run.record,
        saved.log_history if saved else [],
        model=model,
        args=arguments,
        eval_dataset=measured,  # Trainer wants one to exist; ``evaluate`` below reads ``held_out``
        processing_class=tokenizer,
        callbacks=callbacks,
    )

    # 5. The folder changes only now, when all that can fail before the first step has not. Then every step is trained.
    begin(run)
    trainer.train_from(point)
    stream.close()

    # 6. The best student, its card and its history; the record last.
    history = trainer.state.log_history
    files = {"README.md": card.render(run, history)} if is_first_rank() else {}
    finish(run, trainer, plan, files, entries={"history": history})
    return {
        "output_dir": str(config.output_dir),
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_metric": trainer.state.best_metric,
    }


def _packed_in(run: Run, layers: Layers) -> Run:
    """Return the run, with the way of its packed rows in its record. KDError if its processes cannot go that way."""
    if layers.way == ONE_BY_ONE and parallel.fsdp_requested(run.arguments):
        # Each forward of a sharded layer is a meeting of all ranks, and ranks have different numbers of samples.
        raise KDError(
            f"{type(layers.student).__name__} keeps neither packed nor padded samples apart. Its samples are run one by "
            "one, which FSDP cannot do; leave --fsdp out"
        )
    return dataclasses.replace(run, record={**run.record, "packing": layers.way})


# --- what we change in Trainer ----------------------------------------------------------------------------------------


class DistillTrainer(RunTrainer, Trainer):
    """Trainer with our stream of packed rows, our logged sums and our validation; everything else is its own."""

    def __init__(
        self,
        stream: Stream,
        held_out: Callable[[], Iterable[Batch]] | None,
        record: dict[str, Any],
        history: list[dict[str, float]],
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.stream, self.held_out, self.record = stream, held_out, record
        self._sums: dict[str, Tensor] = {}  # since the last log line, of this rank
        # A resumed run counts tokens and seconds on from the last line of its history.
        last = next((entry for entry in reversed(history) if "tokens" in entry), {"tokens": 0.0, "seconds": 0.0})
        self._tokens, self._started = last["tokens"], time.monotonic() - last["seconds"]
        self.add_callback(_Steps(stream.steps_per_epoch))

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        # With a generator of its own: it would draw from torch's, which dropout continues with after a resume.
        return torch.utils.data.DataLoader(self.stream, batch_size=None, generator=torch.Generator())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ("kl", "divergence", "ce", "tokens"):
            if name in outputs:
                self._sums[name] = self._sums.get(name, 0.0) + outputs[name]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means per token since the last line (nats), and the tokens and seconds since the first step."""
        if "loss" in logs and "tokens" in self._sums:
            # Every rank logs at the same steps, so all of them meet in this sum.
            sums = parallel.sum_over_ranks(self._sums, self.args.device)
            tokens = sums.pop("tokens")
            logs |= {name: round(value / max(tokens, 1.0), 4) for name, value in sums.items()}
            self._tokens += tokens
            self._sums = {}
        stop_unless_finite(logs, self.state.global_step, self.args.fp16)
        logs |= {"tokens": self._tokens, "seconds": round(time.monotonic() - self._started, 2)}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self.held_out is None:
            return {}
        metrics = {f"{metric_key_prefix}_{k}": value for k, value in measure(self.model, self.held_out()).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        atomic.write_json(Path(output_dir or str(self.args.output_dir)) / RUN_FILE, self.record)


class _Steps(TrainerCallback):
    """Keeps the epoch, the log and the validation in step with our stream.

    The stream may start in the middle of an epoch, which Trainer does not see: the epoch follows from the step. The last
    step is always measured, so that the best checkpoint is the best of all that was trained.
    """

    def __init__(self, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / self.steps_per_epoch
        if control.should_save:
            control.should_log = True  # no logged mean spans a checkpoint, so that a resumed run logs the same lines
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class _Report(TrainerCallback):
    """Hands every log line to the caller of ``train``, on the first rank."""

    def __init__(self, on_step: OnStep):
        self.report_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if is_first_rank() and logs:
            self.report_step(state.global_step, state.max_steps, logs)


# --- the loss, inside the student's forward ---------------------------------------------------------------------------


def attach_loss(student: Any, alpha: float, divergence: str = "forward_kl") -> Layers:
    """Make ``student(**batch)`` return the loss of a packed row, and the sums that are logged; return its layers.

        loss = sum over N of (1 - alpha) CE(completion) + alpha D(teacher, student), divided by num_items_in_batch

    Trainer passes ``num_items_in_batch``, the supervised tokens of the global batch; without it N is taken. During
    validation D is the forward KL, whatever is trained. The forward is replaced on the model itself and not by a wrapper:
    save_pretrained stays as it is, and FSDP holds the head's weight whole where the loss uses it.
    """
    head, layers = head_of(student), layers_of(student)

    def forward(
        self: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        losses = losses_of(layers, head, batch, alpha, divergence if self.training else "forward_kl")
        count = len(losses.ce)  # N
        sums = {"ce": losses.ce.sum(), "tokens": losses.ce.new_tensor(float(count))}
        if losses.divergence is not None:
            sums["kl" if divergence == "forward_kl" or not self.training else "divergence"] = losses.divergence.sum()
        if losses.best is not None:  # only without gradients; the teacher's best token is its first candidate
            sums["agreement"] = (losses.best == batch["candidate_ids"][:, 0]).float().sum()
        return {"loss": losses.loss / (max(count, 1) if num_items_in_batch is None else num_items_in_batch), **sums}

    student.forward = MethodType(forward, student)
    return layers


def losses_of(layers: Layers, head: Head, batch: dict[str, Tensor], alpha: float, divergence: str) -> Losses:
    """Return the losses of a packed row's N supervised positions, from the student's layers and its head."""
    hidden = layers(batch["input_ids"], batch["offsets"])  # (L, D)
    labels = batch["shift_labels"][0]  # (L,): the token that each position predicts
    supervised = labels != IGNORE  # (L,), N of them true
    return distillation_loss(
        hidden[supervised],  # (N, D)
        head.weight,  # (V, D)
        labels[supervised],  # (N,)
        batch["candidate_ids"],  # (N, K)
        batch["candidate_logprobs"],  # (N, K)
        batch["tail_logprobs"],  # (N,)
        alpha,
        divergence,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
    )


# --- validation -------------------------------------------------------------------------------------------------------


def measure(student: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Return means over all supervised tokens: kl and ce in nats, agreement with the teacher's best token; and tokens.

    The student must have its loss attached. Every process brings batches of its own, and as many as the others.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    totals = dict.fromkeys(("kl", "ce", "agreement", "tokens"), 0.0)
    with torch.no_grad():
        for batch in batches:
            outputs = student(**to_device(batch, device))
            for name in totals:
                totals[name] += float(outputs[name])
    student.train(was_training)
    totals = parallel.sum_over_ranks(totals, device)
    tokens = totals.pop("tokens")
    return {**{name: value / max(tokens, 1.0) for name, value in totals.items()}, "tokens": tokens}
