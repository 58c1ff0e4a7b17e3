"""Sparse distillation losses: the readable reference. fused.py computes the same without the logits of a whole batch.

Shapes: N supervised positions, V the student's vocabulary, K candidates. p: the teacher's candidates as the reader gives
them; r: the teacher's mass outside them; q: the student's distribution; s: the student's mass outside the candidates.

Every divergence D is taken on K + 1 cells: the candidates, and all other tokens as one, the *bucket*. That is a lower
bound of D over the full vocabulary (merging cells can only lose), and 0 at a perfect student. Gradients, everywhere:
with g_c = dD / d log q_c for each cell c and G the sum of all g, the gradient on a logit is g_k - q_k G at candidate k,
and q_v (g_bucket / s - G) at a token v outside. No mean is taken here: (N, ...) in, nats at each position (N,) out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdcache.cache.format import MIN_TAIL_MASS
from kdcache.cache.sparsify import Policy
from kdcache.errors import UsageError

#: The logarithm of an empty cell (padding, or no tail): exp(NOTHING) is 0 and 0 * NOTHING is 0, where -inf gives NaN.
NOTHING = -1e30


def cells(
    logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's log-probabilities of the K + 1 cells, the bucket last.

    s comes from its own log-sum-exp over the non-candidates: 1 - sum(q) loses its digits in float32 and gave NaN on
    real text.

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
    log_s = logits.scatter(1, candidate_ids, NOTHING).logsumexp(dim=-1, keepdim=True) - log_z  # (N, 1)
    log_s = torch.where(real.any(dim=-1, keepdim=True), log_s, 0.0)
    log_p = torch.cat([candidate_logprobs, tail_logprobs[:, None]], dim=-1).to(logits.dtype).clamp_min(NOTHING)
    return log_p, torch.cat([log_q, log_s], dim=-1)


def log_mass_beyond(logits: Tensor, candidate_ids: Tensor, others: Tensor) -> Tensor:
    """Log of the student's mass outside the candidates and outside its own ``others`` best tokens besides them.

    Args:
        logits: (N, V), any floating dtype; computed in float32 (float64 stays).
        candidate_ids: (N, K) int64, padded as in ``cells``.
        others: (N,) int64, how many tokens of each position.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rest = logits.scatter(1, candidate_ids, NOTHING)
    best = rest.topk(min(int(others.max()), logits.shape[1]), dim=-1)  # (N, most of them)
    left_out = torch.arange(best.values.shape[1], device=logits.device) < others[:, None]
    rest.scatter_(1, best.indices, best.values.masked_fill(left_out, NOTHING))
    return rest.logsumexp(dim=-1) - logits.logsumexp(dim=-1)


def forward_kl(logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor) -> Tensor:
    """KL(teacher || student), for every kind of cache:

        sum_k p_k log(p_k / q_k)  +  r log(r / s)

    The gradient on the logits is q - p on the candidates and q (1 - r/s) elsewhere (where p and r sum to 1). It is
    linear in p but for a constant, so that candidates drawn by ``threshold`` give it without bias.
    """
    log_p, log_q = cells(logits, candidate_ids, candidate_logprobs, tail_logprobs)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor) -> Tensor:
    """KL(student || teacher), for ``topk`` caches (Gu et al. 2024, MiniLLM, arXiv:2306.08543):

        D  =  sum_k q_k log(q_k / p_k)  +  s log(s / r)

    The gradient is q (log(q/p) - D) on the candidates and q (log(s/r) - D) elsewhere. It would be infinite without a
    tail; but "no tail" is a mass below MIN_TAIL_MASS that the cache cannot show, so r counts as at least that.
    """
    log_p, log_q = cells(logits, candidate_ids, candidate_logprobs, tail_logprobs)
    return (log_q.exp() * (log_q - with_tail(log_p))).sum(dim=-1)


def jsd(logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor) -> Tensor:
    """The Jensen-Shannon divergence, for ``topk`` caches (Agarwal et al. 2024, GKD, arXiv:2306.13649; beta = 1/2):

        1/2 KL(p || m)  +  1/2 KL(q || m),  m = (p + q) / 2 in each cell

    The gradient is q/2 (log(q/m) - KL(q || m)) on the candidates, and elsewhere the same with the bucket's log(s/m).
    """
    log_p, log_q = cells(logits, candidate_ids, candidate_logprobs, tail_logprobs)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1)


def skewed_kl(
    logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor, skew: float = 0.1
) -> Tensor:
    """KL(teacher || mixture), for ``topk`` caches (Ko et al. 2024, DistiLLM, arXiv:2402.03898; their skew is 0.1):

        sum_c p_c log(p_c / m_c),  m = skew p + (1 - skew) q in each cell c

    A token that the student thinks impossible costs at most log(1 / skew). With the share w = (1 - skew) q/m of the
    student in the mixture, the gradient is q E - w p on the candidates and q (E - w r/s) elsewhere, E = sum_c w_c p_c.
    """
    log_p, log_q = cells(logits, candidate_ids, candidate_logprobs, tail_logprobs)
    log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    return (log_p.exp() * (log_p - log_m)).sum(dim=-1)


def tvd(logits: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor, tail_logprobs: Tensor) -> Tensor:
    """The total variation distance, for ``topk`` caches, from 0 to 1 (Wen et al. 2023, f-DISTILL, arXiv:2307.15190):

        1/2 sum_k |p_k - q_k|  +  1/2 |r - s|

    The gradient is q/2 (sign(q - p) - E) on the candidates and q/2 (sign(s - r) - E) elsewhere, E = sum_c q_c sign_c.
    """
    log_p, log_q = cells(logits, candidate_ids, candidate_logprobs, tail_logprobs)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


def with_tail(log_p: Tensor) -> Tensor:
    """The cells with at least MIN_TAIL_MASS in the bucket."""
    return torch.cat([log_p[:, :-1], log_p[:, -1:].clamp_min(math.log(MIN_TAIL_MASS))], dim=-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log q(target) in nats at each position: logits (N, V), targets (N,) -> (N,) float32 (float64 stays)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


# --- which may be asked for -------------------------------------------------------------------------------------------

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_kl": skewed_kl,
    "tvd": tvd,
}


def parse(divergence: str) -> tuple[str, dict[str, float]]:
    """``jsd`` -> its name and no parameters; ``skewed_kl:0.2`` -> its name and {"skew": 0.2}. UsageError for others."""
    name, colon, text = divergence.partition(":")
    if name not in DIVERGENCES:
        raise UsageError(f"divergence {divergence}: unknown; known: {', '.join(DIVERGENCES)}")
    if not colon:
        return name, {}
    try:
        skew = float(text)
    except ValueError:
        skew = math.nan
    if name != "skewed_kl" or not 0 < skew < 1:
        raise UsageError(f"divergence {divergence}: only skewed_kl:SKEW takes a number, between 0 and 1")
    return name, {"skew": skew}


def check(divergence: str, policy: Policy) -> None:
    """Raise UsageError, with the reason, if this divergence of a cache made with ``policy`` would be biased."""
    name, _ = parse(divergence)
    if name != "forward_kl" and policy.samples:
        raise UsageError(
            f"divergence {divergence} on a cache made with {policy}: candidates drawn at random are unbiased only for "
            "a loss that is linear in the teacher's probabilities; use forward_kl, or a cache made with topk"
        )
