"""The processes that torchrun started, and how a training is spread over them: one process, DDP, or FSDP2.

    torchrun --nproc-per-node 2 $(which kd) train ... --bf16 --fsdp

A mode that the user asked for is on, or the run ends with an error: accelerate falls back to DDP silently where its own
conditions for FSDP are not met, as on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from kdcache.errors import KDError, UsageError

# --- processes --------------------------------------------------------------------------------------------------------


def processes() -> int:
    """Return how many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_per_node(ranks: int) -> int:
    """Return how many ranks each node has, as torchrun says; 1 on every rank if the nodes differ in it.

    All ranks must agree, as they divide the samples of a step by this number.
    """
    on_this_node, nodes = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    return on_this_node if on_this_node * nodes == ranks else 1


def from_first_rank(value: Any) -> Any:
    """Return the first rank's ``value`` on every rank."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    broadcast_object_list(values)
    return values[0]


def sum_over_ranks(sums: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Return the sums of all processes together. Every process must bring the same names."""
    if not torch.distributed.is_initialized():
        return {name: float(value) for name, value in sums.items()}
    values = torch.tensor([float(sums[name]) for name in sorted(sums)], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values)
    return dict(zip(sorted(sums), values.tolist()))


def leave() -> None:
    """Leave the process group, at the end of a command: its threads must not outlive the interpreter."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


def fsdp_requested(arguments: Mapping[str, Any]) -> bool:
    """Return whether the options ask for FSDP2."""
    return bool(arguments.get("fsdp"))


def mode(arguments: Mapping[str, Any]) -> str | None:
    """Return how a run is spread over processes, as in ``FSDP2, 2 processes``; None for one process.

    UsageError if the options ask for what these processes cannot do.
    """
    fsdp = fsdp_requested(arguments)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not fsdp:
        raise UsageError("the launcher's environment asks for FSDP (ACCELERATE_USE_FSDP): ask for it with --fsdp alone")
    if fsdp and processes() == 1:
        raise UsageError(
            "--fsdp shards a student over several processes, and this is one: start it with torchrun --nproc-per-node N, "
            "or leave --fsdp out"
        )
    return None if processes() == 1 else f"{'FSDP2' if fsdp else 'DDP'}, {processes()} processes"


def prepare(arguments: TrainingArguments) -> None:
    """Let accelerate use FSDP2 if that was asked for, with parameters gathered in bfloat16 under --bf16.

    This must run before the accelerator is made. Nothing but parameters is rounded: by default FSDP2 would also round the
    inputs of the student, which hold the teacher's log-probabilities, its output, which is the loss, and the gradient sums.
    """
    if not arguments.fsdp:
        return
    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if arguments.bf16 else None,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )
    accelerate_state = PartialState()
    if accelerate_state.distributed_type is DistributedType.MULTI_CPU:
        # accelerate turns FSDP on for several GPUs, and silently not for several CPUs.
        accelerate_state.distributed_type = DistributedType.MULTI_GPU


def check(arguments: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise KDError if FSDP2 was asked for and is not on, or the other way round."""
    if bool(arguments.fsdp) != accelerator.is_fsdp2:
        raise KDError(
            f"FSDP2 was {'' if arguments.fsdp else 'not '}asked for, and accelerate chose "
            f"{accelerator.distributed_type.value}: this machine or its launcher's environment cannot be used so"
        )


def without_tied(student: Any, weights: Any) -> Any:
    """Return the ``weights`` to save of those that FSDP2 gathers by name: a tied matrix once, under one of its names."""
    if weights is None:
        return None
    tied = getattr(student, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
