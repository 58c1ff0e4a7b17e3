"""Sparse distillation losses: the readable reference.

Shapes: N supervised positions, V the student's vocabulary, K candidates. p: the teacher's candidates as the reader gives
them; r: the teacher's mass outside them; q: the student's distribution; s: the student's mass outside the candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor) -> Tensor:
    """KL(teacher || student) in nats at each position, with everything outside the candidates as one cell, the bucket:

        sum_k p_k log(p_k / q_k)  +  r log(r / s)

    It is 0 at a perfect student and a lower bound of the full-vocabulary KL (the bucket merges cells). The gradient on
    the logits is q - p on the candidates and q (1 - r/s) elsewhere. s comes from its own log-sum-exp over the
    non-candidates: 1 - sum(q) loses its digits in float32 and gave NaN on real text. No mean is taken here.

    Args:
        logits: (N, V), any floating dtype; computed in float32 (float64 stays).
        candidate_ids: (N, K) int64. Padding repeats a candidate of the same position, with log-probability -inf.
        candidate_logprobs: (N, K) natural logs; each position's probabilities sum to 1 - exp(tail).
        tail_logprobs: (N,) natural log of the mass outside the candidates; -inf where there is none.

    Returns:
        (N,) float32, or float64 for float64 logits.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p, log_r = candidate_logprobs.to(logits.dtype), tail_logprobs.to(logits.dtype)
    log_z = torch.logsumexp(logits, dim=-1)  # (N,)
    log_q = logits.gather(1, candidate_ids) - log_z[:, None]  # (N, K)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p.clamp_min(-1e4) - log_q), 0).sum(dim=-1)  # (N,)

    # Only where there is a tail: with every token a candidate, the log-sum-exp over none has no gradient.
    rows = torch.isfinite(log_r).nonzero()[:, 0]
    if len(rows):
        rest = logits[rows].scatter(1, candidate_ids[rows], float("-inf"))
        log_s = torch.logsumexp(rest, dim=-1) - log_z[rows]
        kl = kl.index_add(0, rows, log_r[rows].exp() * (log_r[rows] - log_s))
    return kl


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q(target) in nats at each position: logits (N, V), targets (N,) -> (N,) float32 (float64 stays)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
