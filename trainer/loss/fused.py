"""The distillation loss from the last hidden states, never holding the logits of a batch.

    head = head_of(student)
    found = distillation_loss(hidden, head.weight, targets, ids, logprobs, tails, alpha=0.5)
    found.loss.backward()

Rows go through the head in chunks. A chunk's logits are turned in place into exponentials and then into their own
gradient, which is multiplied into the gradients of the hidden states and of the head at once: three head-sized matrix
products a step, none of them in the backward pass, which only scales (as Liger's fused linear cross-entropy does,
Hsu et al. 2024, arXiv:2410.10989). What is computed is what losses.py says, and tests hold the two together.

Shapes: N supervised positions, n of them in a chunk, V the vocabulary, D the hidden size, K candidates; K + 1 cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdcache.errors import KDError
from trainer.loss.reference import NOTHING, parse, with_tail

#: What a chunk's [n, V] buffers may take together. More rows at once make better use of a GPU.
CHUNK_BYTES = 128 * 2**20

# --- divergences on cells: log_p, log_q (n, K + 1) -> D (n,), and g = dD / d log q of each cell (n, K + 1) -------------


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    terms = log_q.exp() * (log_q - with_tail(log_p))
    return terms.sum(-1), terms + log_q.exp()


def _jsd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    terms = 0.5 * log_q.exp() * (log_q - log_m)
    return (0.5 * log_p.exp() * (log_p - log_m) + terms).sum(-1), terms


def _skewed_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    p, log_student = log_p.exp(), log_q + math.log1p(-skew)
    log_m = torch.logaddexp(log_p + math.log(skew), log_student)
    return (p * (log_p - log_m)).sum(-1), -p * (log_student - log_m).exp()


def _tvd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()


OnCells = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

ON_CELLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skewed_kl": _skewed_kl,
    "tvd": _tvd,
}


# --- the loss ---------------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """``loss`` is a scalar with a gradient, in nats summed over the N positions; the others are (N,) without one."""

    loss: Tensor  # sum of (1 - alpha) ce + alpha divergence
    ce: Tensor  # -log q(target)
    divergence: Tensor | None  # None where alpha is 0 and gradients are formed: it would be for nothing
    best: Tensor | None  # int64, the student's best token; None where gradients are formed
    confidence: Tensor | None  # log q(best); None where gradients are formed


@torch.compiler.disable
def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    candidate_ids: Tensor,
    candidate_logprobs: Tensor,
    tail_logprobs: Tensor,
    alpha: float,
    divergence: str = "forward_kl",
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Losses:
    """Sum over all N positions of (1 - alpha) CE(completion) + alpha D(teacher, student).

    The teacher's mass beyond the candidates is the bucket of ``losses.cells``. Logits are computed in the dtype of the
    inputs (or of autocast), all that follows in float32, and the head's gradient is summed in float32 (float64 stays).
    Gradients are formed in the forward pass, for what requires them, and not under ``torch.no_grad``. The backward
    pass scales them where they are, so it can run only once.

    Args:
        hidden: (N, D) the base model's output at the supervised positions. N may be 0.
        weight, bias, scale, softcap: the head's: (V, D), (V,); see ``Head``.
        targets: (N,) int64, the completion's next tokens.
        candidate_ids, candidate_logprobs, tail_logprobs: (N, K), (N, K), (N,) as in ``losses.cells``.
        divergence: a name in ``losses.DIVERGENCES``, or ``skewed_kl:SKEW``.
        chunk_rows: how many rows go through the head at once, at most. By default what fits into CHUNK_BYTES.
    """
    forms_gradients = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    name, parameters = parse(divergence)
    on_cells: OnCells | None = partial(ON_CELLS[name], **parameters)
    if alpha == 0 and forms_gradients:
        on_cells, candidate_ids, candidate_logprobs = None, candidate_ids[:, :0], candidate_logprobs[:, :0]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    log_p = torch.cat([candidate_logprobs, tail_logprobs[:, None]], dim=-1).to(wide).clamp_min(NOTHING)  # (N, K + 1)
    rows = chunk_rows or rows_of_a_chunk(len(weight), dtype, softcap is not None)
    chunks = max(1, math.ceil(len(hidden) / rows))
    task = _Task(
        targets,
        candidate_ids,
        log_p,
        alpha,
        on_cells,
        scale,
        softcap,
        rows=max(1, math.ceil(len(hidden) / chunks)),  # of equal size
        dtype=dtype,
        wide=wide,
        forms_gradients=forms_gradients,
    )
    return Losses(*_Fused.apply(hidden, weight, bias, task))


def rows_of_a_chunk(vocabulary: int, dtype: torch.dtype, capped: bool = False) -> int:
    """How many rows' buffers fit into CHUNK_BYTES: one in float32, one more in ``dtype``, one more for a cap's slope."""
    wide = torch.promote_types(dtype, torch.float32)
    return max(1, CHUNK_BYTES // (vocabulary * (wide.itemsize * (1 + capped) + dtype.itemsize * (dtype != wide))))


@dataclass(frozen=True)
class _Task:
    """What the loss is computed from besides the head and its input."""

    targets: Tensor  # (N,)
    candidate_ids: Tensor  # (N, K)
    log_p: Tensor  # (N, K + 1)
    alpha: float
    on_cells: OnCells | None  # None: cross-entropy alone, and K is 0
    scale: float
    softcap: float | None
    rows: int
    dtype: torch.dtype  # of the matrix products
    wide: torch.dtype  # of everything else
    forms_gradients: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Any:
        wanted = [task.forms_gradients and needed for needed in ctx.needs_input_grad[:3]]
        ce, divergence, best, confidence, gradients = _in_chunks(hidden, weight, bias, task, wanted)
        loss = (1 - task.alpha) * ce.sum()
        if task.alpha and divergence is not None:
            loss = loss + task.alpha * divergence.sum()
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*(x for x in (ce, divergence, best, confidence) if x is not None))
        return loss, ce, divergence, best, confidence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> Any:
        # In place: the head's gradient is the largest tensor there is. (A second backward pass is refused by autograd.)
        scaled = (None if g is None else g.mul_(loss_gradient) for g in ctx.saved_tensors)
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)), None


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """ce, divergence, best, confidence (N,) each, and the gradients of hidden (N, D), weight (V, D) and bias (V,)."""
    count, vocabulary = len(hidden), len(weight)
    dtype, wide = task.dtype, task.wide
    narrow_weight, narrow_bias = weight.to(dtype), None if bias is None else bias.to(dtype)

    ce = hidden.new_empty(count, dtype=wide)
    divergence = None if task.on_cells is None else torch.empty_like(ce)
    best = None if task.forms_gradients else torch.empty_like(ce, dtype=torch.int64)
    confidence = None if task.forms_gradients else torch.empty_like(ce)
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None

    # [n, V] buffers, used over and over: the products read and write ``narrow``, the rest is done in ``x``.
    narrow_buffer = hidden.new_empty(min(task.rows, count), vocabulary, dtype=dtype)
    wide_buffer = narrow_buffer if dtype == wide else torch.empty_like(narrow_buffer, dtype=wide)

    for first in range(0, count, task.rows):
        part = slice(first, first + task.rows)
        h, ids, targets = hidden[part].to(dtype), task.candidate_ids[part], task.targets[part]
        narrow, x = narrow_buffer[: len(h)], wide_buffer[: len(h)]
        if narrow_bias is None:
            torch.mm(h, narrow_weight.t(), out=narrow)
        else:
            torch.addmm(narrow_bias, h, narrow_weight.t(), out=narrow)
        if x is not narrow:
            x.copy_(narrow)
        slope = _scale_and_cap(x, task.scale, task.softcap)
        if best is not None and confidence is not None:
            top, best[part] = x.max(dim=-1)
            confidence[part] = top - x.gather(1, targets[:, None])[:, 0]  # log q(best) / q(target)

        ce[part], found = _to_gradient(x, targets, ids, task.log_p[part], task)
        if divergence is not None and found is not None:
            divergence[part] = found
        if confidence is not None:
            confidence[part] -= ce[part]
        if not task.forms_gradients:
            continue
        if slope is not None:
            x.mul_(slope)
        if d_bias is not None:
            d_bias += x.sum(dim=0)
        if x is not narrow:
            narrow.copy_(x)
        if d_hidden is not None:
            d_hidden[part] = narrow @ narrow_weight
        if d_weight is not None and dtype == wide:
            d_weight.addmm_(narrow.t(), h)
        elif d_weight is not None:
            d_weight += narrow.t() @ h
    return ce, divergence, best, confidence, (d_hidden, d_weight, d_bias)


def _scale_and_cap(x: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """The logits as the model has them, in place; and the derivative of the cap (n, V), where there is one."""
    if softcap is None:
        if scale != 1:
            x.mul_(scale)
        return None
    x.mul_(scale / softcap).tanh_()
    slope = x.square().neg_().add_(1.0)
    x.mul_(softcap)
    return slope


def _to_gradient(x: Tensor, targets: Tensor, ids: Tensor, log_p: Tensor, task: _Task) -> tuple[Tensor, Tensor | None]:
    """ce and divergence (n,) of logits x (n, V), which become the loss's gradient on them, times ``scale``, in place.

    What is computed per cell is (n, K + 1) and small. Only five passes go over x: maximum, subtract, exp, sum, multiply.
    Outside the candidates the gradient is one factor a row times the softmax over the non-candidates, since
    q_v = s softmax_v. That softmax has its own maximum, so s keeps all its digits however small it is.
    """
    real = log_p[:, :-1] > NOTHING  # (n, K) not padding
    own = x.gather(1, ids)  # (n, K)
    target_logits = x.gather(1, targets[:, None])  # (n, 1)

    # The candidates leave x; but where a position has none, its ids mean nothing and keep their logits.
    x.scatter_(1, ids, own.masked_fill(real.any(dim=-1, keepdim=True), -math.inf))
    top = x.amax(dim=-1, keepdim=True).clamp_min(NOTHING)
    x.sub_(top).exp_()
    total = x.sum(dim=-1, keepdim=True)  # (n, 1) at least 1; 0 where every token is a candidate

    own = own.masked_fill(~real, NOTHING)
    log_rest = top + total.log()
    log_z = torch.logaddexp(log_rest, own.logsumexp(dim=-1, keepdim=True))  # (n, 1) over the whole vocabulary
    ce = (log_z - target_logits)[:, 0]
    log_q = (torch.cat([own, log_rest], dim=-1) - log_z).clamp_min(NOTHING)  # (n, K + 1)
    divergence, g = (None, torch.zeros_like(log_q)) if task.on_cells is None else task.on_cells(log_p, log_q)
    if not task.forms_gradients:
        return ce, divergence

    # a CE + b D: a (q - 1 at the target), and b times what losses.py says: g_k - q_k G, and q_v (g_bucket / s - G).
    a, b = task.scale * (1 - task.alpha), task.scale * task.alpha
    on_q = a - b * g.sum(dim=-1, keepdim=True)  # (n, 1)
    on_cells = log_q.exp() * on_q + b * g  # (n, K + 1)
    x.mul_(on_cells[:, -1:] / total.clamp_min(1.0))
    x.scatter_add_(1, ids, on_cells[:, :-1])  # onto zeros; padding adds 0
    x.scatter_add_(1, targets[:, None], torch.full_like(target_logits, -a))
    return ce, divergence


# --- heads ------------------------------------------------------------------------------------------------------------

#: What configurations call the factor on the logits (Cohere, Falcon-H1; Granite divides by it) and their cap (Gemma).
SCALES = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True)
class Head:
    """A student's last layer: logits = cap(scale (hidden weight^T + bias)), where cap(x) = softcap tanh(x / softcap)."""

    linear: torch.nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V), float32 (float64 stays), by autograd's own means."""
        logits = self.linear(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(student: Any) -> Head:
    """The head of a transformers model. KDError where it is not understood.

    A LoRA or quantized head is refused: its weight is not the matrix it multiplies by. What the configuration says is
    tried on two tokens against the model's own logits, as families use the same words for other things.
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
    if not difference < 0.02:
        raise KDError(
            f"{name} does something to its logits that is not known here: its own are {difference:.0%} off those of its "
            f"last layer with scale {scale:g} and softcap {softcap}; distillation would train it for other logits"
        )
    return head


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What a configuration says of its head: the factor on the logits, and their cap."""
    scale = 1.0
    for key in (*SCALES, *DIVISORS):
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            scale *= 1 / value if key in DIVISORS else value
    return scale, next((getattr(config, key) for key in SOFTCAPS if getattr(config, key, None)), None)


@torch.no_grad()
def _difference(student: Any, head: Head) -> float:
    """How far the head's logits of two tokens are from the model's own, relative to the largest."""
    was_training = student.training
    student.eval()
    ids = torch.tensor([[0, 1]], device=head.weight.device)
    theirs = type(student).forward(student, input_ids=ids, use_cache=False).logits.float()
    ours = head(student.base_model(input_ids=ids, use_cache=False)[0]).float()
    student.train(was_training)
    if ours.shape != theirs.shape:
        return math.inf
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
