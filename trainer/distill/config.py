"""The options of ``kd train``."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.student.config import StudentConfig


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
