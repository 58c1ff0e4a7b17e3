"""The distillation loss from the last hidden states, without ever holding the logits of a batch.

    head = head_of(student)
    losses = distillation_loss(hidden, head.weight, targets, ids, logprobs, tails, alpha=0.5)
    losses.loss.backward()

The logits of a batch are its largest tensor by far, so positions go through the head in chunks, and a chunk's gradients
are formed at once, in the forward pass: autograd differentiates the divergence on its few cells, and the rest is
written out. The backward pass only scales them (as in Liger's fused linear cross-entropy,
Hsu et al. 2024, arXiv:2410.10989). reference.py computes the same on whole logits, and tests hold the two equal.

Shapes: N supervised positions, n of them in a chunk, V the vocabulary, D the hidden size, K candidates. A position has
K + 1 cells: its candidates, and the bucket of all other tokens (see divergences.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.loss.divergences import NOTHING, parse

#: What a chunk's (n, V) buffers may take together. More rows at once make better use of a GPU.
CHUNK_BYTES = 128 * 2**20

OnCells = Callable[[Tensor, Tensor], Tensor]  # log_p, log_q (n, K + 1) -> divergence (n,)


class Losses(NamedTuple):
    """``loss`` is a scalar with a gradient, in nats summed over the N positions; the others are (N,) without one."""

    loss: Tensor  # sum of (1 - alpha) ce + alpha divergence
    ce: Tensor  # -log q(target), nats
    divergence: Tensor | None  # nats; None where alpha is 0 and gradients are formed, since nothing would use it
    best: Tensor | None  # int64, the student's best token; None where gradients are formed


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
    """Return the sum over all N positions of (1 - alpha) CE(completion) + alpha D(teacher, student), and its parts.

    Logits are computed in the dtype of the inputs (or of autocast). All that follows is computed in float32, and the
    head's gradient is summed in float32 (float64 stays). Gradients are formed in the forward pass, for the inputs that
    require them, and not under ``torch.no_grad``. The backward pass scales them in place, so it can run only once.

    Args:
        hidden: (N, D) the base model's output at the supervised positions. N may be 0.
        weight, bias, scale, softcap: of the head, (V, D) and (V,); see ``Head``.
        targets: (N,) int64, the completion's next tokens.
        candidate_ids, candidate_logprobs, tail_logprobs: (N, K), (N, K), (N,) as in ``reference.cells``.
        divergence: as in ``divergences.parse``, for example ``forward_kl`` or ``skewed_kl:0.2``.
        chunk_rows: the largest number of rows in a chunk. By default as many as fit into CHUNK_BYTES.
    """
    forms_gradients = torch.is_grad_enabled() and (
        hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    on_cells: OnCells | None = parse(divergence).on_cells
    if alpha == 0 and forms_gradients:
        on_cells, candidate_ids, candidate_logprobs = None, candidate_ids[:, :0], candidate_logprobs[:, :0]
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    log_p = torch.cat([candidate_logprobs, tail_logprobs[:, None]], dim=-1).to(wide).clamp_min(NOTHING)  # (N, K + 1)
    chunks = max(1, math.ceil(len(hidden) / (chunk_rows or rows_per_chunk(len(weight), dtype, softcap is not None))))
    task = _Task(
        targets,
        candidate_ids,
        log_p,
        alpha,
        on_cells,
        scale,
        softcap,
        rows=max(1, math.ceil(len(hidden) / chunks)),  # chunks of equal size
        dtype=dtype,
        wide=wide,
        forms_gradients=forms_gradients,
    )
    return Losses(*_Fused.apply(hidden, weight, bias, task))


def rows_per_chunk(vocabulary: int, dtype: torch.dtype, capped: bool = False) -> int:
    """Return how many rows fit into CHUNK_BYTES: a buffer in float32, another in ``dtype``, another for a cap's slope."""
    wide = torch.promote_types(dtype, torch.float32)
    return max(1, CHUNK_BYTES // (vocabulary * (wide.itemsize * (1 + capped) + dtype.itemsize * (dtype != wide))))


@dataclass(frozen=True)
class _Task:
    """What the loss is computed from besides hidden states and head."""

    targets: Tensor  # (N,)
    candidate_ids: Tensor  # (N, K)
    log_p: Tensor  # (N, K + 1)
    alpha: float
    on_cells: OnCells | None  # None: cross-entropy alone, and K is 0
    scale: float
    softcap: float | None
    rows: int  # of a chunk
    dtype: torch.dtype  # of the matrix products
    wide: torch.dtype  # of everything else
    forms_gradients: bool


@dataclass(frozen=True)
class _Results:
    """What the chunks fill in. None: not needed."""

    ce: Tensor  # (N,)
    divergence: Tensor | None  # (N,)
    best: Tensor | None  # (N,)
    d_hidden: Tensor | None  # (N, D) gradient of the loss
    d_weight: Tensor | None  # (V, D)
    d_bias: Tensor | None  # (V,)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> Any:
        needs_gradient = [task.forms_gradients and needed for needed in ctx.needs_input_grad[:3]]
        results = _in_chunks(hidden, weight, bias, task, needs_gradient)
        loss = (1 - task.alpha) * results.ce.sum()
        if task.alpha and results.divergence is not None:
            loss = loss + task.alpha * results.divergence.sum()
        ctx.save_for_backward(results.d_hidden, results.d_weight, results.d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        per_position = results.ce, results.divergence, results.best
        ctx.mark_non_differentiable(*(x for x in per_position if x is not None))
        return loss, *per_position

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Any) -> Any:
        # In place, because the head's gradient is the largest tensor there is. Autograd refuses a second backward pass.
        scaled = (None if g is None else g.mul_(loss_gradient) for g in ctx.saved_tensors)
        return *(None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes)), None


# One chunk of n rows. All of it happens in one (n, V) buffer x, which every step overwrites, so that never more than a
# chunk's logits are held:
#
#     hidden[chunk] (n, D)
#          |
#          |  product 1: hidden weight^T
#          v
#     x = raw logits ---- _scale_and_cap ----> x = logits
#                                                   |
#                                                   |  _to_gradient: ce and divergence of the n rows, from x;
#                                                   v                then x becomes its own gradient
#                                              x = scale * d loss / d logits
#                                                   |
#                                                   |  times the slope of the cap
#                                                   v
#                                              x = d loss / d raw logits
#                                                   |
#                        product 2: x weight        |        product 3: x^T hidden
#                    d_hidden[chunk] (n, D) <-------+-------> added to d_weight (V, D)
#
# In half precision, the products read and write a second buffer of that dtype (``narrow``), and x is float32. A bias is
# added by product 1, and its gradient is the sum of x over its rows.


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, needs_gradient: Sequence[bool]
) -> _Results:
    """Send all rows through the head, chunk by chunk. ``needs_gradient``: of hidden, weight and bias."""
    results = _empty_results(hidden, weight, bias, task, needs_gradient)
    narrow_weight, narrow_bias = weight.to(task.dtype), None if bias is None else bias.to(task.dtype)
    narrow_buffer = hidden.new_empty(min(task.rows, len(hidden)), len(weight), dtype=task.dtype)  # (n, V)
    wide_buffer = narrow_buffer if task.dtype == task.wide else torch.empty_like(narrow_buffer, dtype=task.wide)

    for first in range(0, len(hidden), task.rows):
        chunk = slice(first, first + task.rows)
        h, targets = hidden[chunk].to(task.dtype), task.targets[chunk]  # (n, D), (n,)
        narrow, x = narrow_buffer[: len(h)], wide_buffer[: len(h)]  # the last chunk may be shorter

        if narrow_bias is None:
            torch.mm(h, narrow_weight.t(), out=narrow)
        else:
            torch.addmm(narrow_bias, h, narrow_weight.t(), out=narrow)
        if x is not narrow:
            x.copy_(narrow)
        slope = _scale_and_cap(x, task.scale, task.softcap)

        if results.best is not None:  # read now, because _to_gradient leaves no logits
            results.best[chunk] = x.argmax(dim=-1)
        results.ce[chunk], divergence = _to_gradient(x, targets, task.candidate_ids[chunk], task.log_p[chunk], task)
        if results.divergence is not None and divergence is not None:
            results.divergence[chunk] = divergence

        if task.forms_gradients:
            if slope is not None:
                x.mul_(slope)
            if results.d_bias is not None:
                results.d_bias.add_(x.sum(dim=0))
            if x is not narrow:
                narrow.copy_(x)
            if results.d_hidden is not None:
                results.d_hidden[chunk] = narrow @ narrow_weight
            if results.d_weight is not None and task.dtype == task.wide:
                results.d_weight.addmm_(narrow.t(), h)
            elif results.d_weight is not None:
                results.d_weight.add_(narrow.t() @ h)  # the sum over chunks stays in float32
    return results


def _empty_results(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task, needs_gradient: Sequence[bool]
) -> _Results:
    ce = hidden.new_empty(len(hidden), dtype=task.wide)
    return _Results(
        ce,
        divergence=None if task.on_cells is None else torch.empty_like(ce),
        best=None if task.forms_gradients else torch.empty_like(ce, dtype=torch.int64),
        d_hidden=torch.empty_like(hidden) if needs_gradient[0] else None,
        d_weight=torch.zeros_like(weight, dtype=task.wide) if needs_gradient[1] else None,
        d_bias=torch.zeros_like(bias, dtype=task.wide) if bias is not None and needs_gradient[2] else None,
    )


def _scale_and_cap(x: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Turn raw logits x (n, V) into the model's logits, in place. Return the slope of the cap (n, V), if there is one."""
    if softcap is None:
        if scale != 1:
            x.mul_(scale)
        return None
    x.mul_(scale / softcap).tanh_()
    slope = x.square().neg_().add_(1.0)
    x.mul_(softcap)
    return slope


def _to_gradient(x: Tensor, targets: Tensor, ids: Tensor, log_p: Tensor, task: _Task) -> tuple[Tensor, Tensor | None]:
    """Return ce and divergence (n,) of logits x (n, V), and turn x into ``scale`` times the loss's gradient on it.

    Only five passes go over x: maximum, subtract, exp, sum, multiply. Everything else is per cell, (n, K + 1), and small.

    With g_c = dD / d log q_c for each cell and G the sum of all g, the gradient of D on the logit of candidate k is
    g_k - q_k G, and on the logit of any other token v it is q_v (g_bucket / s - G), where s is the bucket's mass. Here
    q_v / s is the softmax over the non-candidates alone. It is computed with a maximum of its own, so s keeps all its
    digits however small it is.
    """
    real = log_p[:, :-1] > NOTHING  # (n, K) not padding
    candidate_logits = x.gather(1, ids)  # (n, K)
    target_logits = x.gather(1, targets[:, None])  # (n, 1)

    # Take the candidates out of x. A position without candidates has padding alone, whose ids stand for no token: x keeps
    # their logits. (Elsewhere padding repeats the id of a candidate, see ``reference.cells``.)
    x.scatter_(1, ids, candidate_logits.masked_fill(real.any(dim=-1, keepdim=True), -math.inf))
    top = x.amax(dim=-1, keepdim=True).clamp_min(NOTHING)
    x.sub_(top).exp_()
    total = x.sum(dim=-1, keepdim=True)  # (n, 1) at least 1, but 0 where every token is a candidate

    candidate_logits = candidate_logits.masked_fill(~real, NOTHING)
    log_rest = top + total.log()  # (n, 1)
    log_z = torch.logaddexp(log_rest, candidate_logits.logsumexp(dim=-1, keepdim=True))  # (n, 1) over all tokens
    ce = (log_z - target_logits)[:, 0]
    log_q = (torch.cat([candidate_logits, log_rest], dim=-1) - log_z).clamp_min(NOTHING)  # (n, K + 1)
    if not task.forms_gradients:
        return ce, None if task.on_cells is None else task.on_cells(log_p, log_q)
    divergence, g = None, torch.zeros_like(log_q)
    if task.on_cells is not None:
        divergence, g = value_and_gradient(task.on_cells, log_p, log_q)

    # The gradient of a CE + b D: each cell has a q_c + b (g_c - q_c G), and the target has -a besides. The bucket's
    # gradient is spread over its tokens by their softmax, which is x / total.
    a, b = task.scale * (1 - task.alpha), task.scale * task.alpha
    cell_gradients = log_q.exp() * (a - b * g.sum(dim=-1, keepdim=True)) + b * g  # (n, K + 1)
    x.mul_(cell_gradients[:, -1:] / total.clamp_min(1.0))
    x.scatter_add_(1, ids, cell_gradients[:, :-1])  # onto zeros; padding adds 0
    x.scatter_add_(1, targets[:, None], torch.full_like(target_logits, -a))
    return ce, divergence


def value_and_gradient(on_cells: OnCells, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a divergence (n,) and its derivative by ``log_q`` (n, K + 1), also where autograd is switched off."""
    leaf = log_q.detach().requires_grad_()
    # Gradient checkpointing watches what autograd saves, by hooks. Hooks that do nothing hide this small graph from them;
    # otherwise the student's forward would run once more.
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        divergence = on_cells(log_p, leaf)
        (gradient,) = torch.autograd.grad(divergence.sum(), leaf)
    return divergence.detach(), gradient
