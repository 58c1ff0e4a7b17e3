"""The student trainer: transformers.Trainer underneath, fed from the cache, never from the teacher.

    kd train --from-cache data/cache --student data/student --output-dir data/kd

The head and the loss run inside the student's own forward (bound on the model, so that save_pretrained stays what it
is, and so that FSDP holds the head's weight whole where it is used). The loss is the mean over the supervised tokens
of the global batch, whatever number of ranks and accumulation steps it is cut into.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from kdcache.storage import atomic
from trainer.data.pack import IGNORE, Batch, to_device
from trainer.data.stream import Stream, in_order
from trainer.distill import card
from trainer.distill.plan import RUN_FILE, Begun, Report, Run, alone, begin, stop_unless_finite
from trainer.loss.fused import Losses, distillation_loss
from trainer.loss.head import Head, head_of
from trainer.run import checkpoints, parallel
from trainer.run.arguments import for_training
from trainer.student import lora as adapters
from trainer.student.load import answer_as_cached, load_student

# --- the loss, inside the student's forward ---------------------------------------------------------------------------


def attach_loss(student: Any, alpha: float, divergence: str = "forward_kl") -> None:
    """Make ``student(**batch)`` return the loss of a packed batch and the sums that are reported.

        loss = sum over supervised tokens of (1 - alpha) CE(completion) + alpha D(teacher, student), over their number

    The number is ``num_items_in_batch`` (of the global batch, from Trainer), else the batch's own. In evaluation D is
    the forward KL, whatever is trained.
    """
    head = head_of(student)

    def forward(
        self: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        found = losses_of(self, head, batch, alpha, divergence if self.training else "forward_kl")
        count = len(found.ce)
        sums = {"ce": found.ce.sum(), "tokens": found.ce.new_tensor(float(count))}
        if found.divergence is not None:
            sums["kl" if divergence == "forward_kl" or not self.training else "divergence"] = found.divergence.sum()
        if found.best is not None:
            sums["agreement"] = (found.best == batch["candidate_ids"][:, 0]).float().sum()
        return {"loss": found.loss / (max(count, 1) if num_items_in_batch is None else num_items_in_batch), **sums}

    student.forward = MethodType(forward, student)


def losses_of(student: Any, head: Head, batch: dict[str, Tensor], alpha: float, divergence: str) -> Losses:
    """The losses of a packed batch's supervised positions, from the student's layers and its head.

    No attention mask and no cache: only then do position ids that start again keep packed samples apart.
    """
    hidden = student.base_model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[
        0
    ]  # (1, L, D)
    labels = batch["shift_labels"][0]  # (L,)
    return distillation_loss(
        hidden[0][labels != IGNORE],
        head.weight,
        labels[labels != IGNORE],
        batch["candidate_ids"],
        batch["candidate_logprobs"],
        batch["tail_logprobs"],
        alpha,
        divergence,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
    )


def over_ranks(sums: dict[str, Any], device: torch.device) -> dict[str, float]:
    """The sums of all processes together, where there are several; all must have the same names."""
    if not torch.distributed.is_initialized():
        return {name: float(value) for name, value in sums.items()}
    values = torch.tensor([float(sums[name]) for name in sorted(sums)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(sorted(sums), values.tolist()))


def measure(student: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Held-out metrics over all supervised tokens: kl and ce in nats, agreement with the teacher's choice, tokens.

    The student must have its loss attached. Of several processes each brings its own batches, as many as the others.
    """
    was_training = student.training
    student.eval()
    device = next(student.parameters()).device
    totals = dict.fromkeys(("kl", "ce", "agreement", "tokens"), 0.0)
    with torch.no_grad():
        for batch in batches:
            output = student(**to_device(batch, device))
            for name in totals:
                totals[name] += float(output[name])
    student.train(was_training)
    totals = over_ranks(totals, device)
    tokens = totals.pop("tokens")
    return {**{name: value / max(tokens, 1.0) for name, value in totals.items()}, "tokens": tokens}


# --- the trainer ------------------------------------------------------------------------------------------------------


class DistillTrainer(checkpoints.WholeCheckpoints, Trainer):
    """Trainer with our stream of batches and our held-out metrics; everything else is its own."""

    def __init__(
        self,
        stream: Stream,
        held_out: Callable[[], Iterable[Batch]] | None,
        record: dict[str, Any],
        logged: list[dict[str, float]],
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.stream, self.held_out, self.record = stream, held_out, record
        self._sums: dict[str, Tensor] = {}
        # What a run had trained on and taken when it was interrupted: nothing is logged after a checkpoint but with it.
        before = next((entry for entry in reversed(logged) if "tokens" in entry), {"tokens": 0.0, "seconds": 0.0})
        self._tokens, self._begun = before["tokens"], time.monotonic() - before["seconds"]
        self.add_callback(_Steps(stream.steps_per_epoch))
        self.remove_callback(PrinterCallback)

    def create_accelerator_and_postprocess(self) -> None:
        parallel.prepare(self.args)
        super().create_accelerator_and_postprocess()
        parallel.check(self.args, self.accelerator)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        # A generator of its own: it would draw from the one that dropout goes on with after a resume.
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
        if "loss" in logs and "tokens" in self._sums:
            # Every rank logs at the same steps, so that this is where their sums can meet.
            sums = over_ranks(self._sums, self.args.device)
            tokens = sums.pop("tokens")
            logs |= {name: round(value / max(tokens, 1.0), 4) for name, value in sums.items()}
            self._tokens += tokens
            self._sums = {}
        stop_unless_finite(logs, self.state.global_step, self.args.fp16)
        logs |= {"tokens": self._tokens, "seconds": round(time.monotonic() - self._begun, 2)}  # since the first step
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
        super()._save(output_dir, parallel.without_tied(self.model, state_dict))
        atomic.write_json(Path(output_dir or str(self.args.output_dir)) / RUN_FILE, self.record)


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

    def __init__(self, report: Report):
        self.report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.report(state.global_step, state.max_steps, logs)


# --- a run ------------------------------------------------------------------------------------------------------------


@alone
def train(run: Run, report: Report) -> dict[str, Any]:
    """Train, keep the best checkpoint by the validation split, and save it as a Hugging Face folder."""
    config = run.config
    arguments = for_training(run)  # starts the process group, where there are several
    set_seed(arguments.seed)  # of LoRA's matrices, before there is a Trainer
    student, tokenizer = load_student(config.student, config.dtype, "nf4" if config.load_in_4bit else None)
    answer_as_cached(student, tokenizer, run.train.caches[0].plan)
    attach_loss(student, run.alpha, config.divergence)
    head_rows = student.get_output_embeddings().weight.shape[0]
    model = adapters.add(student, config)
    if run.compile is not None:  # the layers alone: the loss is three matrix products already
        student.base_model.compile(dynamic=True, **run.compile)

    step, logged = 0, []
    if run.checkpoint:
        state = json.loads((Path(run.checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        step, logged = state["global_step"], state["log_history"]
    rank, ranks = arguments.process_index, arguments.world_size
    stream = Stream(
        run.train,
        head_rows,
        run.samples_per_step,
        parts=arguments.gradient_accumulation_steps * ranks,
        rank=rank,
        ranks=ranks,
        seed=arguments.data_seed if arguments.data_seed is not None else arguments.seed,
        step=step,
        ranks_per_node=_ranks_a_node(ranks),
    )
    held_out = None
    if len(run.validation):
        held_out = lambda: in_order(run.validation, head_rows, arguments.per_device_eval_batch_size, rank, ranks)  # noqa: E731
    callbacks: list[TrainerCallback] = [Begun(), _Report(report)]
    if config.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    trainer = DistillTrainer(
        stream,
        held_out,
        run.record,
        logged,
        model=model,
        args=arguments,
        eval_dataset=run.validation if held_out else None,  # Trainer asks that there is one; ``evaluate`` is ours
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if arguments.process_index == 0:
        begin(run)  # last of all: what fails before this has changed nothing
    trainer.train(resume_from_checkpoint=run.checkpoint)
    _leave(run, trainer)
    return {
        "output_dir": str(config.output_dir),
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "best_metric": trainer.state.best_metric,
    }


def _ranks_a_node(ranks: int) -> int:
    """As torchrun says, if all nodes have as many; else 1, on every rank: they must divide a step alike."""
    here, nodes = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    return here if here * nodes == ranks else 1


def _leave(run: Run, trainer: Any) -> None:
    """What a run leaves: a whole student that transformers and vLLM load, its card, its history; the record last."""
    out, first = run.config.output_dir, trainer.args.process_index == 0
    adapted = run.config.lora_r is not None
    with checkpoints.whole_student(out, checkpoints.size_of(trainer.model.parameters()), first) as scratch:
        trainer.save_model(str(scratch / adapters.FOLDER if adapted else scratch))  # by all ranks: shards are gathered
        if first:
            if adapted:
                adapters.merge(run.config, scratch / adapters.FOLDER, scratch, run.train.caches[0].plan)
            trainer.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
            (scratch / "README.md").write_text(card.render(run, trainer.state.log_history), encoding="utf-8")
    if first:
        record = {**run.record, "finished": True, "history": trainer.state.log_history}
        with checkpoints.saving(out, 0):
            atomic.write_json(out / RUN_FILE, record)
    trainer.accelerator.wait_for_everyone()
