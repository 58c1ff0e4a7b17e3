"""LoRA and QLoRA through peft: low-rank matrices are trained beside frozen weights, and merged into them at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache import models
from kdcache.errors import UsageError, first_line
from trainer.student.config import StudentConfig
from trainer.student.load import answer_as_cached, load_student

FOLDER = "adapter"  # in a run's folder: the low-rank matrices alone


def add(student: Any, config: StudentConfig) -> Any:
    """Return the student with low-rank matrices on all target layers but the head; without ``lora_r``, the student itself.

    Raises:
        UsageError: the student has no layer of the name ``lora_target_modules``.
    """
    if config.lora_r is None:
        return student
    import peft

    if config.load_in_4bit:
        student = peft.prepare_model_for_kbit_training(student, use_gradient_checkpointing=False)
    targets = config.lora_target_modules
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(student, settings)
    except ValueError as error:
        raise UsageError(f"--lora-target-modules {targets}: {first_line(error)}") from None


def merge(config: StudentConfig, adapter: Path, out: Path, plan: dict[str, Any]) -> None:
    """Save the whole student to ``out`` with the low-rank matrices of the folder ``adapter`` added to its weights.

    The weights are loaded again in full precision, because adding to 4-bit weights would round the sums. ``plan`` is the
    cache's, for ``answer_as_cached``.
    """
    student, tokenizer = load_student(config.student, config.dtype)
    answer_as_cached(student, tokenizer, plan)
    models.with_adapter(student, adapter).merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
