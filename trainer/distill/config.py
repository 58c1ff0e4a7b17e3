"""What `kd train` can be told, with defaults and help texts."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.settings import option
from trainer.student.config import StudentConfig


@dataclass(frozen=True)
class TrainConfig(StudentConfig):
    """The options of ``kd train``; ``arguments`` are those of transformers.TrainingArguments."""

    method: str = option(
        "kd", "Distillation (kd), or plain fine-tuning on the same completions (sft).", choices=("kd", "sft")
    )
    alpha: float = option(0.5, "Loss = (1 - alpha) x cross-entropy + alpha x divergence from the teacher.")
    divergence: str = option(
        "forward_kl", "forward_kl (any cache); on topk caches also reverse_kl, jsd, skewed_kl[:SKEW], tvd."
    )
    max_length: int = option(2048, "Most tokens of a sample, prompt and completion together.")
    too_long: str = option(
        "drop",
        "What happens to longer samples: drop and count them, or cut their completions at --max-length (without an end of turn).",
        choices=("drop", "cut"),
    )
    evals_per_epoch: int = option(
        4, "How often per epoch the validation split is measured and a checkpoint is saved.", low=1
    )
    early_stopping_patience: int | None = option(None, "Stop after N measurements without a better one.", low=1)
