"""Build TrainingArguments or GRPOConfig from checked options, and find out early which of them do not work together.

The optimizer, the schedule and the reporters are made once, for a single parameter, so that a wrong option is one sentence
before anything is written and not an error of a library in the middle of a run.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from kdcache.errors import UsageError, first_line


def build(config: type[TrainingArguments], arguments: dict[str, Any], steps: int) -> Any:
    """Return options as a ``config`` for a run of ``steps`` steps. UsageError for those that do not work together.

    On several processes this starts their process group.
    """
    with as_usage(config.__name__):
        together: Any = config(**arguments)
    if together.fp16 and together.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU, and this trains on the CPU; leave it out, or use --bf16")
    if together.fsdp and together.fp16:
        raise UsageError("--fsdp with --fp16 was never tried here; use --bf16")
    _check_checkpointing(together)
    _try_optimizer(together, steps)
    _try_reports(together)
    return together


@contextlib.contextmanager
def as_usage(whose: str) -> Iterator[None]:
    """Turn what a trainer raises while it is made into a UsageError: a library may refuse what passed all checks here."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"{whose} refused these options: {first_line(error)}") from error


def _check_checkpointing(arguments: Any) -> None:
    """Raise UsageError for options of gradient checkpointing that torch does not have."""
    for name, value in (arguments.gradient_checkpointing_kwargs or {}).items():
        if name not in ("use_reentrant", "preserve_rng_state") or not isinstance(value, bool):
            raise UsageError(
                f"--gradient-checkpointing-kwargs {name}: expected use_reentrant or preserve_rng_state, each true or false"
            )


def _try_optimizer(arguments: Any, steps: int) -> None:
    """Make the optimizer and the schedule for one parameter, and look at the schedule at four steps."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    except Exception as error:  # forty optimizers of ten libraries raise what they like
        raise UsageError(f"--optim {name}, or an option of it, cannot be used: {first_line(error)}") from None
    if arguments.fsdp and not optimizer_class.__module__.startswith("torch.optim"):
        raise UsageError(
            f"--optim {name} cannot be used with --fsdp: it does not know sharded parameters; use adamw_torch"
        )
    try:
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [function(step) for function in scheduler.lr_lambdas for step in (0, 1, steps // 2, steps)]
            if not all(isinstance(rate, int | float) and math.isfinite(rate) for rate in rates):
                raise ValueError("its rates are not finite numbers")
    except Exception as error:  # --lr-scheduler-kwargs is handed to functions of all kinds
        schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise UsageError(
            f"--lr-scheduler-type {schedule}, or its options, cannot be used: {first_line(error)}"
        ) from None


def _try_reports(arguments: Any) -> None:
    """Make what --report-to names."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except Exception as error:  # it is not installed, or not set up
        reporters = ", ".join(map(str, arguments.report_to))
        reason = re.sub(r"\s*Run `.*", "", first_line(error))
        raise UsageError(f"--report-to {reporters} cannot be used: {reason}") from None
