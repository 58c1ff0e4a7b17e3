"""LoRA and QLoRA through peft: low-rank matrices are trained beside frozen (or 4-bit) weights, and merged at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache import models
from kdcache.errors import UsageError, first_line
from trainer.student.config import StudentConfig
from trainer.student.load import answer_as_cached, load_student

FOLDER = "adapter"  # of a run: the low-rank matrices by themselves


def add(student: Any, config: StudentConfig) -> Any:
    """The student as peft wraps it, with its head left as it is; the student itself without ``lora_r``."""
    if config.lora_r is None:
        return student
    import peft

    if config.load_in_4bit:
        student = peft.prepare_model_for_kbit_training(student, use_gradient_checkpointing=False)
        _keep_trainable(student)
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


def _keep_trainable(student: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when the student is measured between two steps.

    On a CPU with bfloat16 instructions it does, for inference, and what is packed has no gradient: the layers below would
    be trained no further, without an error.
    """
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def merge(config: StudentConfig, adapter: Path, out: Path, plan: dict[str, Any]) -> None:
    """Save the whole student with ``adapter`` added to its weights. They are read anew: 4-bit ones would lose by it.

    ``plan`` is the cache's: the folder answers as it says.
    """
    student, tokenizer = load_student(config.student, config.dtype)
    answer_as_cached(student, tokenizer, plan)
    models.with_adapter(student, adapter).merge_and_unload().save_pretrained(out)
    tokenizer.save_pretrained(out)
