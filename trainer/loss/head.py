"""A student's last layer, as the loss needs it: one matrix, a bias, a factor on the logits and their cap.

Shapes: D the hidden size, V the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import KDError

#: What configurations call the factor on the logits (Cohere, Falcon-H1; Granite divides by it) and their cap (Gemma).
SCALES = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")

#: The largest difference from the model's own logits, relative to the largest of them, that is rounding.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Head:
    """A student's last layer: logits = cap(scale (hidden weight^T + bias)), where cap(x) = softcap tanh(x / softcap)."""

    linear: torch.nn.Linear
    scale: float = 1.0
    softcap: float | None = None  # None: no cap

    @property
    def weight(self) -> Tensor:
        """(V, D)"""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """(V,)"""
        return self.linear.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., D), float32 (float64 stays), in the plain way of autograd."""
        logits = self.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(student: Any) -> Head:
    """Return the head of a transformers model.

    Families use the same words of a configuration for different things. So the head is tried on two tokens, and its
    logits are compared with the model's own.

    Raises:
        KDError: the head is not a plain torch.nn.Linear (the weight of a LoRA or quantized head is not the matrix that
            it multiplies by), or its logits are not the model's.
    """
    name, linear = type(student).__name__, student.get_output_embeddings()
    if type(linear) is not torch.nn.Linear:
        raise KDError(
            f"{name} has a head of the class {type(linear).__module__}.{type(linear).__name__}; expected torch.nn.Linear. "
            "Leave the head out of the quantization, and out of LoRA's target_modules and modules_to_save"
        )
    scale, softcap = scale_and_cap(student.config.get_text_config())
    head = Head(linear, scale, softcap)
    difference = _difference(student, head)
    if not difference < TOLERANCE:
        raise KDError(
            f"{name} changes its logits in a way that kd does not know: they differ by {difference:.0%} from those of its "
            f"last layer with scale {scale:g} and softcap {softcap}. Distillation would train it for other logits; "
            "use a student of another model family"
        )
    return head


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """Return the factor on the logits and their cap (None: no cap) that a model's configuration names."""
    scale = 1.0
    for key in (*SCALES, *DIVISORS):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            scale *= 1 / value if key in DIVISORS else value
    return scale, next((getattr(config, key) for key in SOFTCAPS if getattr(config, key, None)), None)


@torch.no_grad()
def _difference(student: Any, head: Head) -> float:
    """Return how far the head's logits of two tokens are from the model's own, relative to the largest of these."""
    was_training = student.training
    student.eval()
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    expected = type(student).forward(student, input_ids=ids, use_cache=False).logits.float()
    logits = head(student.base_model(input_ids=ids, use_cache=False)[0]).float()
    student.train(was_training)
    if logits.shape != expected.shape:
        return math.inf
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
