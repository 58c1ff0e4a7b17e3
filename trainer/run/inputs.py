"""Check what a run reads, its caches and its student, before it writes anything and before any weights are loaded."""

from __future__ import annotations

import dataclasses

import torch

from kdcache import models
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError
from kdcache.models.identity import model_folder
from kdcache.storage import folders
from trainer.data.select import open_caches
from trainer.run import parallel
from trainer.run.folder import check_deletable
from trainer.run.values import AT_LEAST_ONE, MOST, in_words, shortened
from trainer.student import lora as adapters
from trainer.student.config import StudentConfig
from trainer.student.load import check_tokenizer, quantized_by


def open_checked(config: StudentConfig) -> list[Cache]:
    """Open the caches, after checking that this student can train on them and that --overwrite would not delete it."""
    if config.load_in_4bit and config.lora_r is None:
        raise UsageError("--load-in-4bit needs --lora-r: 4-bit weights cannot be trained, only what LoRA adds to them")
    if quantized_by(config.student):
        raise KDError(
            f"{config.student} is quantized, and such weights cannot be trained: train the student that it was made from "
            "(--load-in-4bit --lora-r 16 for QLoRA)"
        )
    folders.check_place(config.output_dir, "--output-dir")
    if config.overwrite:
        check_deletable(config)
    caches = open_caches(config.from_cache)
    check_tokenizer(config.student, caches[0])
    return caches


def check_lora(config: StudentConfig) -> None:
    """Raise UsageError for a rank that no matrix can have, for layers that do not exist, and for numbers out of range."""
    if config.lora_r is None:
        return
    if not 0 <= config.lora_dropout < 1:
        raise UsageError(f"--lora-dropout {config.lora_dropout}: expected 0 to less than 1")
    if config.lora_alpha is not None and not 1 <= config.lora_alpha <= MOST:
        raise UsageError(f"--lora-alpha {shortened(config.lora_alpha)}: expected {in_words(*AT_LEAST_ONE)}")
    if config.load_in_4bit and parallel.fsdp_requested(config.arguments):
        raise UsageError(
            "--load-in-4bit cannot be used with --fsdp: 4-bit weights cannot be sharded; leave one of them out"
        )
    # Adding LoRA to a student without weights tells which matrices it adapts, and how large they are.
    with torch.device("meta"):
        student = models.untrained(models.config(model_folder(config.student)))
        adapted = adapters.add(student, dataclasses.replace(config, lora_r=1, load_in_4bit=False))
    shapes = [layer.base_layer.weight.shape for layer in adapted.modules() if hasattr(layer, "base_layer")]
    most = max((min(shape) for shape in shapes), default=0)
    if config.lora_r > most:
        raise UsageError(
            f"--lora-r {shortened(config.lora_r)}: expected at most {most}, the smaller side of the largest matrix that "
            "it adapts"
        )
