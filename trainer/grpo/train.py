"""GRPO on the cache: its prompts, its verifiers, its verified reasoning. trl.GRPOTrainer underneath, and never a teacher.

    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100

Read it from top to bottom; ``trainer.py`` holds what is changed in TRL's trainer, ``rewards.py`` what an answer is worth,
``guards.py`` when a run is stopped.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from kdcache.judge import verifiers
from kdcache.machine import is_first_rank
from trainer.grpo.arguments import grpo_arguments
from trainer.grpo.guards import Collapsed, Guards, StepMeans
from trainer.grpo.plan import GrpoRun
from trainer.grpo.trainer import trainer_class
from trainer.run.arguments import as_usage
from trainer.run.checkpoints import ResumePoint, trainer_state
from trainer.run.folder import DropOldContents, agreed_point, alone, begin, finish
from trainer.run.logs import OnStep, stop_unless_finite
from trainer.student import lora as adapters
from trainer.student.load import answer_as_cached, cached_stop_ids, load_student, stop_ids


def train(run: GrpoRun, on_step: OnStep) -> dict[str, Any]:
    """Train a student and save it as a Hugging Face folder. ``Collapsed`` if a guard stops the run.

    KDError if another process writes to the folder.
    """
    with alone(run):
        return _train(run, on_step)


def _train(run: GrpoRun, on_step: OnStep) -> dict[str, Any]:
    import datasets

    # 1. What judges the answers, and the processes, which agree on where to start.
    config = run.config
    sandbox = verifiers.sandbox_for((v for prompt in run.prompts for v, _ in prompt.judges), config.unsafe_exec)
    arguments = grpo_arguments(config, run.arguments, len(run.prompts))
    point = agreed_point(run)

    # 2. The student, which is prompted and ends its answers as the cache's teacher did.
    student, tokenizer = load_student(config.student, config.dtype, "nf4" if config.load_in_4bit else None)
    answer_as_cached(student, tokenizer, run.plan)
    stops = stop_ids(student, tokenizer, cached_stop_ids(run.plan))
    model = adapters.add(student, config)

    # 3. TRL's trainer on the cache's prompts.
    guards = Guards(config.guard_window) if config.guards else None
    with as_usage("trl.GRPOTrainer"):
        trainer = trainer_class(bool(config.arguments.get("use_vllm")))(
            run,
            sandbox,
            stops,
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt.text} for prompt in run.prompts]),
            processing_class=tokenizer,
            callbacks=[DropOldContents(), _Watch(guards, on_step)],
        )
    trainer.success = _success_at(point)

    # 4. The folder changes only now, when all that can fail before the first step has not.
    begin(run)
    try:
        trainer.train_from(point)
    except Collapsed:
        trainer._save_checkpoint(trainer.model, trial=None)  # --no-guards resumes from it
        raise
    finish(run, trainer, run.plan)
    return {"output_dir": str(config.output_dir), "steps": trainer.state.global_step, "success": trainer.success}


class _Watch(TrainerCallback):
    """Hands what was logged to the guards and to the caller. A resumed run's guards remember its earlier steps."""

    def __init__(self, guards: Guards | None, on_step: OnStep):
        self.guards, self.report_step = guards, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:
            if self.guards is not None and "reward" in logs:
                self.guards.remember(_means(logs))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        numbers = {name: logs[name] for name in ("loss", "grad_norm", "reward") if name in logs}
        stop_unless_finite(numbers, state.global_step, args.fp16)
        if is_first_rank():
            self.report_step(state.global_step, state.max_steps, logs)
        if self.guards is not None:
            self.guards.check(_means(logs))


def _means(logs: dict[str, Any]) -> StepMeans:
    """Return what the guards look at, from a line that TRL logs."""
    return StepMeans(
        correctness=float(logs["rewards/correctness/mean"]),
        form=float(logs["rewards/form/mean"]),
        length_tokens=float(logs["completions/mean_length"]),
        entropy_nats=float(logs.get("entropy", 0.0)),
        varied=1.0 - float(logs.get("frac_reward_zero_std", 0.0)),
    )


def _success_at(point: ResumePoint) -> float:
    """Return the share of unguided answers that were right when an interrupted run was saved."""
    if point.checkpoint is None:
        return 0.0
    history = trainer_state(point.checkpoint).log_history
    return next((float(logs["success"]) for logs in reversed(history) if "success" in logs), 0.0)
