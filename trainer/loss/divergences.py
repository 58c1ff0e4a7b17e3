"""The divergences between teacher and student, each defined once, on the K + 1 cells of a position.

The first K cells are the teacher's candidates, and the last cell, the *bucket*, is all other tokens together. Merging
tokens into one cell can only lower a divergence, so every value here is a lower bound of the divergence over the whole
vocabulary. It is 0 for a perfect student.

To add a divergence, write one function here and list it in DIVERGENCES: the reference loss and the fused loss both take
their values from that function, and their gradients from autograd.

Shapes: N positions, K candidates. ``log_p`` and ``log_q`` are the natural log-probabilities of teacher and student,
(N, K + 1), float32 or float64; NOTHING marks an empty cell. Every function returns nats per position, (N,).

In the formulas, p_c and q_c are the probabilities of cell c; sums run over all K + 1 cells. Each docstring also gives
the *factor* f_c of its gradient on the logits: the gradient is q_k f_k on the logit of candidate k, and q_v f_bucket on
the logit of a token v outside the candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kdcache.cache.format import MIN_TAIL_MASS
from kdcache.cache.sparsify import Policy
from kdcache.errors import UsageError

#: The logarithm of an empty cell (padding, or no tail). exp(NOTHING) is 0 and 0 * NOTHING is 0, where -inf gives NaN.
NOTHING = -1e30


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(teacher || student), for every kind of cache:

        sum_c p_c log(p_c / q_c)                                       f_c = 1 - p_c / q_c

    It is linear in p but for a constant, so candidates drawn at random (``threshold``) give an unbiased gradient.
    """
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher), for ``topk`` caches (Gu et al. 2024, MiniLLM, arXiv:2306.08543):

        D = sum_c q_c log(q_c / p_c)                                   f_c = log(q_c / p_c) - D

    It would be infinite for a teacher without a tail. But "no tail" means a mass below MIN_TAIL_MASS, which the cache
    cannot show, so the bucket of the teacher counts as at least that much.
    """
    bucket = log_p[:, -1:].clamp_min(math.log(MIN_TAIL_MASS))
    return (log_q.exp() * (log_q - torch.cat([log_p[:, :-1], bucket], dim=-1))).sum(dim=-1)


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence, for ``topk`` caches (Agarwal et al. 2024, GKD, arXiv:2306.13649; beta = 1/2):

    1/2 KL(p || m) + 1/2 KL(q || m),  m_c = (p_c + q_c) / 2        f_c = 1/2 (log(q_c / m_c) - KL(q || m))
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1)


def skewed_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(teacher || mixture), for ``topk`` caches (Ko et al. 2024, DistiLLM, arXiv:2402.03898; their skew is 0.1):

        sum_c p_c log(p_c / m_c),  m_c = skew p_c + (1 - skew) q_c     f_c = sum_i w_i p_i - w_c p_c / q_c

    Here w_c = (1 - skew) q_c / m_c is the student's share of the mixture. A token that the student thinks impossible
    costs at most log(1 / skew).
    """
    log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
    return (log_p.exp() * (log_p - log_m)).sum(dim=-1)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The total variation distance, for ``topk`` caches, from 0 to 1 (Wen et al. 2023, f-DISTILL, arXiv:2307.15190):

        1/2 sum_c |p_c - q_c|                                          f_c = 1/2 (sign_c - sum_i q_i sign_i)

    Here sign_c is the sign of q_c - p_c.
    """
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)


@dataclass(frozen=True)
class Divergence:
    """A divergence as the losses use it."""

    name: str  # as in --divergence
    on_cells: Callable[[Tensor, Tensor], Tensor]  # log_p, log_q (N, K + 1) -> (N,) nats
    needs_topk: bool  # not linear in p, and therefore biased on a cache whose candidates were drawn at random


DIVERGENCES = {
    divergence.name: divergence
    for divergence in (
        Divergence("forward_kl", forward_kl, needs_topk=False),
        Divergence("reverse_kl", reverse_kl, needs_topk=True),
        Divergence("jsd", jsd, needs_topk=True),
        Divergence("skewed_kl", skewed_kl, needs_topk=True),
        Divergence("tvd", tvd, needs_topk=True),
    )
}


def parse(text: str) -> Divergence:
    """Return the divergence that ``--divergence`` names: ``jsd``, or ``skewed_kl:0.2`` for a skew of 0.2.

    Raises:
        UsageError: there is no such divergence, or it takes no such number.
    """
    name, colon, number = text.partition(":")
    if name not in DIVERGENCES:
        raise UsageError(f"divergence {text}: unknown; known: {', '.join(DIVERGENCES)}")
    if not colon:
        return DIVERGENCES[name]
    try:
        skew = float(number)
    except ValueError:
        skew = math.nan
    if name != "skewed_kl" or not 0 < skew < 1:
        raise UsageError(f"divergence {text}: only skewed_kl:SKEW takes a number, between 0 and 1")
    return dataclasses.replace(DIVERGENCES[name], name=text, on_cells=partial(skewed_kl, skew=skew))


def check(text: str, policy: Policy) -> None:
    """Raise UsageError, with the reason, if this divergence would be biased on a cache made with ``policy``."""
    if parse(text).needs_topk and policy.samples:
        raise UsageError(
            f"divergence {text} on a cache made with {policy}: candidates drawn at random are unbiased only for "
            "a loss that is linear in the teacher's probabilities; use forward_kl, or a cache made with topk"
        )
