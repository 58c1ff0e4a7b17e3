"""trl.GRPOConfig of a run: our defaults, and which options cannot be combined with each other, the prompts or the student.

Importing this module does not import TRL, which imports vLLM where it is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from kdcache import machine, models
from kdcache.errors import KDError, UsageError
from kdcache.models.identity import model_folder
from trainer.grpo.config import GrpoConfig
from trainer.grpo.rewards import FORMAT_WEIGHT
from trainer.run.arguments import build
from trainer.run.refused import REFUSED_BY_GRPO
from trainer.run.values import check_values, requested_steps

#: Packages that an option needs, and the sentence for the one that is missing.
_NEEDED = {
    "use_vllm": ("vllm", "--use-vllm: vllm is not installed; install it, or leave the option out"),
    "log_completions": (
        "rich",
        "--log-completions: rich is not installed; pip install rich, or leave the option out",
    ),
    "use_liger_kernel": (
        "liger_kernel",
        "--use-liger-kernel: liger-kernel is not installed; pip install liger-kernel, or leave the option out",
    ),
}


def argument_names() -> list[str]:
    """Return the names of the options that are passed on to TRL."""
    from trl import GRPOConfig

    return [f.name for f in dataclasses.fields(GRPOConfig)]


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as trl.GRPOConfig takes them; UsageError for one that is refused or has a wrong value."""
    from trl import GRPOConfig

    return check_values(given, REFUSED_BY_GRPO, GRPOConfig)


def grpo_arguments(config: GrpoConfig, given: Mapping[str, Any], prompts: int) -> Any:
    """Return the trl.GRPOConfig of a run of ``prompts`` prompts. UsageError for what cannot be combined.

    ``given``: checked options. On several processes this starts their process group.
    """
    from trl import GRPOConfig

    options: dict[str, Any] = {
        "logging_steps": 1,
        "save_steps": 20,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": machine.torch_device() == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "reward_weights": [1.0, FORMAT_WEIGHT],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **given,
        "trust_remote_code": models.code_is_trusted(),
        "output_dir": str(config.output_dir),
    }
    if options["report_to"] is None:  # `none` on the command line
        options["report_to"] = "none"
    # Without --max-steps TRL counts the steps itself, later; 1,000 is only for trying the schedule.
    arguments = build(GRPOConfig, options, requested_steps(given) or 1000)
    _check_groups(arguments, prompts, config.guide)
    _check_student(arguments, config)
    for name, (package, sentence) in _NEEDED.items():
        if getattr(arguments, name) and find_spec(package) is None:
            raise KDError(sentence)
    return arguments


def _check_groups(arguments: Any, prompts: int, guide: str | None) -> None:
    """Raise UsageError if a generation has more groups than there are prompts, or a guided group would be cut."""
    groups = arguments.generation_batch_size // arguments.num_generations
    if groups > prompts:
        raise UsageError(
            f"a generation answers {groups} prompts (its {arguments.generation_batch_size} answers over --num-generations "
            f"{arguments.num_generations}), and there are {prompts}; use a smaller --per-device-train-batch-size"
        )
    answers = arguments.per_device_train_batch_size * arguments.steps_per_generation
    if guide is not None and answers % arguments.num_generations:
        raise UsageError(
            f"--guide needs whole groups on a process: {answers} answers per generation are no multiple of --num-generations "
            f"{arguments.num_generations}"
        )


def _check_student(arguments: Any, config: GrpoConfig) -> None:
    """Raise UsageError for options that this student's architecture or its LoRA cannot have."""
    shape = models.config(model_folder(config.student))
    if arguments.router_aux_loss_coef is not None and not hasattr(shape, "output_router_logits"):
        raise UsageError(
            "--router-aux-loss-coef weighs the loss of a mixture of experts, and the student is none; leave it out"
        )
    longest = getattr(shape, "max_position_embeddings", None)
    if longest is not None and arguments.max_completion_length > longest:
        raise UsageError(
            f"--max-completion-length {arguments.max_completion_length}: the student knows {longest} positions, prompt and answer "
            "together"
        )
    if arguments.sync_ref_model and (arguments.beta == 0 or config.lora_r is not None):
        raise UsageError(
            "--sync-ref-model needs a reference student, which exists only with --beta and without --lora-r"
        )
