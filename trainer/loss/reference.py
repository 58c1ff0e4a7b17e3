"""The readable reference of the losses, on whole logits. fused.py computes the same without the logits of a batch.

Shapes: N supervised positions, V the student's vocabulary, K candidates. The *bucket* is the cell of all tokens outside
the candidates. Nothing here takes a mean: the inputs have N rows, and the results are nats per position, (N,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.loss.divergences import NOTHING, parse


def cells(
    logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the K + 1 cells for teacher and student, the bucket last.

    The student's bucket has a log-sum-exp over the non-candidates of its own: 1 - sum(q) loses its digits in float32
    and gave NaN on real text.

    Args:
        logits: (N, V), any floating dtype; computed in float32 (float64 stays).
        candidate_ids: (N, K) int64. Padding repeats a candidate of the same position, with log-probability -inf. A
            position of nothing but padding has no candidates: its bucket is the whole vocabulary.
        candidate_logprobs: (N, K) natural logs; each position's probabilities sum to 1 - exp(tail).
        tail_logprobs: (N,) natural log of the mass outside the candidates; -inf where there is none.

    Returns:
        log_p, log_q: (N, K + 1) float32, or float64 for float64 logits. Empty cells are NOTHING.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    real = candidate_logprobs > -math.inf  # (N, K) not padding
    log_z = logits.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    log_q = torch.where(real, logits.gather(1, candidate_ids) - log_z, NOTHING)
    log_rest = logits.scatter(1, candidate_ids, NOTHING).logsumexp(dim=-1, keepdim=True) - log_z  # (N, 1)
    log_rest = torch.where(real.any(dim=-1, keepdim=True), log_rest, 0.0)
    log_p = torch.cat([candidate_logprobs, tail_logprobs[:, None]], dim=-1).to(logits.dtype).clamp_min(NOTHING)
    return log_p, torch.cat([log_q, log_rest], dim=-1)


def divergence(
    name: str, logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor
) -> Tensor:
    """Return D(teacher, student) in nats per position, (N,).

    Args:
        name: as in ``divergences.parse``, for example ``forward_kl`` or ``skewed_kl:0.2``.
        logits, candidate_ids, candidate_logprobs, tail_logprobs: as in ``cells``.
    """
    return parse(name).on_cells(*cells(logits, candidate_ids, candidate_logprobs, tail_logprobs))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log q(target) in nats per position: logits (N, V), targets (N,) -> (N,) float32 (float64 stays)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def log_mass_beyond(logits: Tensor, candidate_ids: Tensor, others: Tensor) -> Tensor:
    """Return the log of the student's mass outside the candidates and outside its ``others`` best other tokens, (N,).

    Args:
        logits: (N, V), any floating dtype; computed in float32 (float64 stays).
        candidate_ids: (N, K) int64, padded as in ``cells``.
        others: (N,) int64, how many tokens besides the candidates to leave out at each position.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rest = logits.scatter(1, candidate_ids, NOTHING)
    best = rest.topk(min(int(others.max()), logits.shape[1]), dim=-1)  # (N, the largest of others)
    left_out = torch.arange(best.values.shape[1], device=logits.device) < others[:, None]
    rest.scatter_(1, best.indices, best.values.masked_fill(left_out, NOTHING))
    return rest.logsumexp(dim=-1) - logits.logsumexp(dim=-1)
