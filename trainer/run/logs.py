"""What both trainers do with a line that Trainer logs: hand it to the caller, and stop where a number is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kdcache.errors import KDError

OnStep = Callable[[int, int, dict[str, float]], None]  # (step, steps, metrics): what a caller of ``train`` is told


def stop_unless_finite(logs: Mapping[Any, Any], step: int, fp16: bool = False) -> None:
    """Raise KDError for a logged number that is not finite: nothing that is trained after it is worth keeping.

    float16 gradients overflow now and then, and Trainer skips such a step by itself.
    """
    for name, value in logs.items():
        if isinstance(value, int | float) and not math.isfinite(value) and not (fp16 and name == "grad_norm"):
            raise KDError(
                f"step {step}: {name} is {value}, so the weights are no longer numbers. The last checkpoint was saved before "
                "that. Lower --learning-rate, or check the cache with: kd cache verify"
            )
