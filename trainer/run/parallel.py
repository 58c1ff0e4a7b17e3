"""How a training is spread over the processes that torchrun started: one process, DDP, or FSDP2.

    torchrun --nproc-per-node 2 $(which kd) train ... --bf16 --fsdp

A mode that is asked for is on, or the run ends with an error: accelerate falls back to DDP without a word where its own
conditions for FSDP are not met, as on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from kdcache.errors import KDError, UsageError


def processes() -> int:
    """How many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wanted(arguments: Mapping[str, Any]) -> bool:
    """Whether FSDP2 was asked for."""
    return bool(arguments.get("fsdp"))


def mode(arguments: Mapping[str, Any]) -> str | None:
    """What a run says of itself: ``FSDP2, 2 processes``. None where there is one process. UsageError where it cannot be."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not wanted(arguments):
        raise UsageError("the launcher's environment asks for FSDP (ACCELERATE_USE_FSDP): ask for it with --fsdp alone")
    if wanted(arguments) and processes() == 1:
        raise UsageError(
            "--fsdp shards a student over several processes, and this is one: start it with torchrun --nproc-per-node N, "
            "or leave --fsdp out"
        )
    return None if processes() == 1 else f"{'FSDP2' if wanted(arguments) else 'DDP'}, {processes()} processes"


def prepare(arguments: TrainingArguments) -> None:
    """Before there is an accelerator: let it use FSDP2 where that was asked for, with parameters gathered in bfloat16 under --bf16.

    Nothing else is rounded. By default FSDP2 would also round what goes into the student, which is the teacher's
    log-probabilities, what comes out of it, which is the loss, and the sums of gradients.
    """
    if not arguments.fsdp:
        return
    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if arguments.bf16 else None,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )
    state = PartialState()
    if state.distributed_type is DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # accelerate turns FSDP on for this one, and not for CPUs


def check(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """KDError if FSDP2 was asked for and is not on, or the other way round."""
    if bool(arguments.fsdp) != accelerator.is_fsdp2:
        raise KDError(
            f"FSDP2 was {'' if arguments.fsdp else 'not '}asked for, and accelerate chose {accelerator.distributed_type.value}: "
            "this machine or its launcher's environment cannot be used so"
        )


def without_tied(student: Any, weights: Any) -> Any:
    """What is saved of ``weights``, which FSDP2 gathers by name: a matrix that is tied to another is saved once, under one name."""
    if weights is None:
        return None
    tied = getattr(student, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
