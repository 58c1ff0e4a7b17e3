"""What the trainers of ``kd train`` and ``kd grpo`` share: whole checkpoints, FSDP2, and a saved model's own settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from kdcache.machine import is_first_rank
from trainer.run import checkpoints, parallel
from trainer.run.saving import enough_disk, size_of

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # this class stands before Trainer, or before TRL's, in a class of both


class RunTrainer(Base):
    """The base of both trainers. Its checkpoints are whole, and it resumes where they say, see ``checkpoints``."""

    def __init__(self, *args: Any, **kwargs: Any):
        # Trainer switches use_cache off for training; what is saved must say what the student's own config said.
        self._use_cache = getattr(getattr(kwargs["model"], "config", None), "use_cache", None)
        super().__init__(*args, **kwargs)
        self._last_saved_step: int | None = None
        self._whole_best: Path | None = None
        self._ended = False  # whether the checkpoint that training resumes from was the last one
        self.add_callback(_ResumeFromCheckpoint(self))
        self.remove_callback(PrinterCallback)  # the caller prints what is logged

    def create_accelerator_and_postprocess(self) -> None:
        parallel.prepare(self.args)
        super().create_accelerator_and_postprocess()
        parallel.check(self.args, self.accelerator)

    def train_from(self, point: checkpoints.ResumePoint) -> None:
        """Train from a checkpoint, or from step 0 if there is none."""
        self._whole_best = point.best
        self.train(resume_from_checkpoint=point.path)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._ended:  # Trainer looks at this flag only after a step, and there is no step left
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint in the order of ``checkpoints``: start, everything that Trainer saves, complete, rotate."""
        if self._last_saved_step == self.state.global_step:
            return  # nothing was trained since
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # Trainer would delete older ones before this one is whole
        try:
            with enough_disk(checkpoint, self._checkpoint_bytes()):
                if is_first_rank():
                    checkpoints.start(checkpoint)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if is_first_rank():
                    checkpoints.complete(checkpoint)
        except BaseException:
            if is_first_rank() and checkpoints.is_half(checkpoint):
                checkpoints.discard(checkpoint)
            raise
        finally:
            self.args.save_total_limit = limit
        self._last_saved_step = self.state.global_step
        if is_first_rank():
            checkpoints.rotate(folder, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        weights = parallel.without_tied(self.model, state_dict)
        config = getattr(self.model, "config", None)
        if config is None or self._use_cache is None:
            super()._save(output_dir, weights)
            return
        config.use_cache, while_training = self._use_cache, config.use_cache
        try:
            super()._save(output_dir, weights)
        finally:
            config.use_cache = while_training

    def _checkpoint_bytes(self) -> int:
        """Return what a checkpoint takes at least: the weights that are saved, and the optimizer's state of them."""
        model: Any = self.model
        optimizer: Any = self.optimizer
        weights = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        moments = [] if self.args.save_only_model else [s for s in optimizer.state.values() if isinstance(s, dict)]
        return size_of(weights) * (2 if self.is_fsdp_enabled else 1) + sum(size_of(s.values()) for s in moments)


class _ResumeFromCheckpoint(TrainerCallback):
    """Sets what Trainer does not read from the checkpoint that training resumes from.

    The best checkpoint is the one in the folder as it is now, which may have been moved since. A run that was
    interrupted after its last step takes no further step: only its student is left to save.
    """

    def __init__(self, trainer: RunTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._last_saved_step = state.global_step
        stopping = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        out_of_patience = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stopping)
        self.trainer._ended = out_of_patience or 0 < state.max_steps <= state.global_step
        if not state.best_global_step:
            return
        if self.trainer._whole_best is not None:
            state.best_model_checkpoint = str(self.trainer._whole_best)
        else:  # ``checkpoints.resume_point`` has told the user
            state.best_global_step = state.best_model_checkpoint = state.best_metric = None
