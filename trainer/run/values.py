"""The values of options that are passed on to TrainingArguments and GRPOConfig: their types, ranges and choices.

Everything is checked before anything is written. ``check_values`` raises one sentence for a value that is wrong by itself;
``arguments.build`` for values that are wrong together.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from kdcache.errors import UsageError

MOST = 2**31 - 1
AT_LEAST_ONE = (1, MOST)
_SHARE = (0, 1)

#: The least and the most of a number. An option that is not listed may be 0 to 2^31 - 1.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "learning_rate": (0, 1e6),
    "adam_beta1": (0, 1 - 1e-12),
    "adam_beta2": (0, 1 - 1e-12),
    "num_train_epochs": (1e-9, MOST),
    "save_total_limit": AT_LEAST_ONE,
    "warmup_steps": (0, MOST),
    "ddp_bucket_cap_mb": AT_LEAST_ONE,
    "ddp_timeout": AT_LEAST_ONE,
    "torch_empty_cache_steps": AT_LEAST_ONE,
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    # Below 1 they are a share of all steps.
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, MOST)),
    # trl.GRPOConfig's
    "num_generations": (2, MOST),
    "max_completion_length": AT_LEAST_ONE,
    "pad_to_multiple_of": AT_LEAST_ONE,
    "generation_batch_size": AT_LEAST_ONE,
    "steps_per_generation": AT_LEAST_ONE,
    "num_iterations": AT_LEAST_ONE,
    "num_completions_to_print": AT_LEAST_ONE,
    "temperature": (1e-6, 1e6),
    "top_p": (1e-9, 1),
    "min_p": _SHARE,
    "top_entropy_quantile": _SHARE,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": AT_LEAST_ONE,
    "repetition_penalty": (1e-6, 1e6),
    "vllm_gpu_memory_utilization": (1e-6, 1),
    "vllm_tensor_parallel_size": AT_LEAST_ONE,
    "vllm_max_model_length": AT_LEAST_ONE,
    "vllm_server_port": (1, 65535),
    "vllm_group_port": (1, 65535),
    "delta": (1e-9, MOST),
    "sapo_temperature_neg": (1e-9, MOST),
    "sapo_temperature_pos": (1e-9, MOST),
}

#: Names that the libraries check only when they use them, which is long after the start.
CHOICES: dict[str, tuple[str, ...]] = {
    "optim": tuple(kind.value for kind in OptimizerNames),
    "lr_scheduler_type": tuple(kind.value for kind in SchedulerType),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
    "metric_for_best_model": tuple(f"{prefix}{name}" for prefix in ("eval_", "") for name in ("kl", "ce", "agreement")),
    "cache_implementation": ("dynamic", "static"),  # others need a GPU or more libraries
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}

#: transformers' generate takes no whole numbers for these.
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")

#: Types of fields whose annotations say something else.
_TYPES: dict[str, Any] = {
    "fsdp": bool,  # the names that it also takes are deprecated, and some of them are FSDP1
    "scale_rewards": str | bool,
    "num_generations": int,
    "max_completion_length": int,
    "gradient_checkpointing_kwargs": dict | None,
    "lr_scheduler_kwargs": dict | None,
    "report_to": str | list[str] | None,
}


def flag(name: str) -> str:
    """Return an option as it is typed."""
    return "--" + name.replace("_", "-")


def check_values(
    given: Mapping[str, Any], refused: Mapping[str, str], config: type[TrainingArguments] = TrainingArguments
) -> dict[str, Any]:
    """Return options as ``config`` takes them.

    UsageError for one that is ``refused`` (a name and why), of another type, out of range or unknown.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    annotations = typing.get_type_hints(config) | _TYPES
    values = {
        name: _checked(name, value, annotations[name], fields[name].metadata.get("choices"), refused)
        for name, value in given.items()
    }
    _check_compile(values)
    return values


def _checked(name: str, value: Any, annotation: Any, choices: Iterable[str] | None, refused: Mapping[str, str]) -> Any:
    """Return one value as its field takes it: text as JSON where the field is a mapping, whole numbers as floats, ..."""
    if name in refused:
        raise UsageError(f"{flag(name)}: not used here, {refused[name]}")
    if name == "max_steps":
        return _checked_steps(value)
    kinds = _members(annotation)
    if isinstance(value, str) and dict in kinds and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UsageError(f"{flag(name)} {value}: not JSON: {error}") from None
    _check_finite(name, value)
    if name in _FLOATS and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST:
        value = float(value)
    if str in kinds and isinstance(value, int | float) and not {int, float, bool} & kinds:
        value = str(value)  # a name made of digits
    if not _fits(value, annotation):
        raise UsageError(f"{flag(name)} {shortened(value)}: expected {_described(annotation)}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most = RANGES.get(name, (0, MOST))
        if not least <= value <= most:
            raise UsageError(f"{flag(name)} {shortened(value)}: expected {in_words(least, most)}")
    if name in ("eval_strategy", "save_strategy", "logging_strategy") and value == "epoch":
        raise UsageError(f"{flag(name)} epoch: use --{'logging-steps' if name[0] == 'l' else 'evals-per-epoch 1'}")
    if name == "optim_args" and value and not all("=" in part for part in value.split(",")):
        raise UsageError(f"{flag(name)} {shortened(value)}: expected name=value, with commas between several")
    choices = CHOICES.get(name, choices)
    if choices and isinstance(value, str):
        _check_choice(name, value, choices)
    return value


def _checked_steps(steps: Any) -> int:
    """Return --max-steps. -1, the default, is "not given"; transformers takes 0 and -7 for that too, which is refused here."""
    if isinstance(steps, bool) or not isinstance(steps, int) or (steps < 1 and steps != -1) or steps > MOST:
        raise UsageError(
            f"--max-steps {shortened(steps)}: expected a whole number of at least 1; leave it out for --num-train-epochs"
        )
    return steps


def requested_steps(arguments: Mapping[str, Any]) -> int | None:
    """Return --max-steps of checked options, or None if it was not given."""
    steps = arguments.get("max_steps", -1)
    return None if steps == -1 else steps


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError for a name that is none of ``choices``: it lists all of them if they are few, else the nearest."""
    names = list(choices)
    if value in names:
        return
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4) or names[:3]
    expected = f"one of {', '.join(names)}" if len(names) <= 12 else f"a name such as {' or '.join(near)}"
    raise UsageError(f"{flag(name)} {shortened(value)}: expected {expected}")


def _members(annotation: Any) -> set[Any]:
    """Return the alternatives of a type, without the types of their items."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_members(part) for part in typing.get_args(annotation)))
    return {typing.get_origin(annotation) or annotation}


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value has a type, as in ``list[str] | None``. A whole number is a float too, and True no number."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    if annotation is Any:
        return True
    if annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (origin or annotation) is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value if inner)
    if (origin or annotation) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return isinstance(value, origin or annotation)


_DESCRIBED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: 'JSON, as in {"name": 1}',
}


def _described(annotation: Any) -> str:
    words = [
        "a list of texts" if kind is list else _DESCRIBED[kind]
        for kind in (*_DESCRIBED, list)
        if kind in _members(annotation)
    ]
    return " or ".join(words) or "nothing that a command line can say"


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{flag(name)} {value}: expected a finite number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(name, item)


def in_words(least: float, most: float) -> str:
    """Return a range for an error, as in ``1 to 65,535``."""
    upper = "less than 1" if 0.9 < most < 1 else f"{int(most):,}"
    return f"more than 0, and at most {upper}" if 0 < least < 1 else f"{int(least):,} to {upper}"


def shortened(value: Any) -> str:
    """Return a value for an error, at most 60 characters of it."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_compile(arguments: Mapping[str, Any]) -> None:
    """Raise UsageError for a backend or a mode that torch.compile does not have."""
    backend, mode = arguments.get("torch_compile_backend"), arguments.get("torch_compile_mode")
    if backend is not None:
        import torch._dynamo

        _check_choice("torch_compile_backend", backend, torch._dynamo.list_backends())
    if mode is not None:
        import torch._inductor

        if backend not in (None, "inductor"):
            raise UsageError(f"--torch-compile-mode is inductor's, and the backend is {backend}; use one of them")
        _check_choice("torch_compile_mode", mode, torch._inductor.list_mode_options())
