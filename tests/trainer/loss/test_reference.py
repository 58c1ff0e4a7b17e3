"""The sparse losses against dense float64 computations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.loss import reference as losses
from trainer.loss.divergences import DIVERGENCES


def sparse_teacher(generator: torch.Generator, positions: int, vocabulary: int, k: int, scale: float = 3.0):
    """Return the top k of random teachers, float64: ids (N, K), logprobs (N, K), tails (N,), and the full log-softmax."""
    full = torch.log_softmax(scale * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64), -1)
    best = full.topk(k, dim=-1)
    rest = full.scatter(1, best.indices, float("-inf")).logsumexp(-1)
    return best.indices, best.values, rest, full


def dense_forward_kl(logits, ids, logprobs, tails):
    """Return forward KL by its definition, from the probabilities of the K + 1 cells in float64."""
    q = torch.softmax(logits.double(), -1)
    inside = torch.zeros_like(q).scatter(1, ids, 1.0)
    s = (q * (1 - inside)).sum(-1)
    p, r = logprobs.double().exp(), tails.double().exp()
    head = torch.where(p > 0, p * (p.clamp_min(1e-300).log() - q.gather(1, ids).log()), 0).sum(-1)
    return head + torch.where(r > 0, r * (r.clamp_min(1e-300).log() - s.clamp_min(1e-300).log()), 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 60), st.integers(1, 59), st.floats(0.3, 5))
def test_value_and_gradient_equal_the_dense_definition(seed, positions, vocabulary, k, scale):
    generator = torch.Generator().manual_seed(seed)
    ids, logprobs, tails, _ = sparse_teacher(generator, positions, vocabulary, min(k, vocabulary), scale)
    logits = torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses.divergence("forward_kl", ours, ids, logprobs, tails).sum().backward()
    dense_forward_kl(theirs, ids, logprobs, tails).sum().backward()
    torch.testing.assert_close(
        losses.divergence("forward_kl", logits, ids, logprobs, tails), dense_forward_kl(logits, ids, logprobs, tails)
    )
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)


def test_gradcheck():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(1), 3, 12, 4)
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.divergence("forward_kl", x, ids, logprobs, tails), (logits,))


def test_the_gradient_is_q_minus_p_and_q_times_one_minus_r_over_s():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(2), 4, 30, 5)
    logits = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    losses.divergence("forward_kl", logits, ids, logprobs, tails).sum().backward()
    q = torch.softmax(logits.detach(), -1)
    s = q.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    expected = (q * (1 - tails.exp()[:, None] / s)).scatter(1, ids, q.gather(1, ids) - logprobs.exp())
    torch.testing.assert_close(logits.grad, expected)


def test_it_is_zero_with_zero_gradient_at_a_perfect_student():
    ids, logprobs, tails, full = sparse_teacher(torch.Generator().manual_seed(3), 6, 50, 8)
    logits = full.float().requires_grad_()
    loss = losses.divergence("forward_kl", logits, ids, logprobs, tails)
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 and logits.grad.abs().max() < 1e-5


def test_it_is_a_lower_bound_of_the_full_kl_that_k_equal_v_reaches():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    *_, full = sparse_teacher(generator, 5, 40, 40)
    whole = (full.exp() * (full - torch.log_softmax(logits, -1))).sum(-1)
    before = torch.zeros(5, dtype=torch.float64)
    for k in (1, 5, 20, 40):
        best = full.topk(k, dim=-1)
        tails = full.scatter(1, best.indices, float("-inf")).logsumexp(-1)
        value = losses.divergence("forward_kl", logits, best.indices, best.values, tails)
        assert (value >= before - 1e-12).all() and (value <= whole + 1e-9).all()
        before = value
    torch.testing.assert_close(before, whole)


def test_padding_that_repeats_a_candidate_changes_nothing():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(5), 3, 20, 4)
    padded_ids = torch.cat([ids, ids[:, :1]], dim=1)
    padded = torch.cat([logprobs, torch.full((3, 1), float("-inf"), dtype=torch.float64)], dim=1)
    logits = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(losses.divergence("forward_kl", logits, ids, logprobs, tails).sum(), logits)[0]
    with_padding = torch.autograd.grad(
        losses.divergence("forward_kl", logits, padded_ids, padded, tails).sum(), logits
    )[0]
    torch.testing.assert_close(plain, with_padding)


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-6])
def test_a_tiny_tail_stays_finite_in_float32_with_a_student_that_is_sure(tail):
    log_r = torch.tensor([tail]).log()
    logprobs = torch.log1p(-torch.tensor([[tail]]))
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 60.0
    logits.requires_grad_()
    loss = losses.divergence("forward_kl", logits, torch.tensor([[0]]), logprobs, log_r)
    loss.sum().backward()
    reference = dense_forward_kl(logits.detach().double(), torch.tensor([[0]]), logprobs, log_r)
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(loss.detach().double(), reference, rtol=1e-4, atol=1e-9)


# --- the other divergences ---------------------------------------------------------------------------------------------


def dense_cells(logits, ids, logprobs, tails):
    """Return p and q of the K + 1 cells by their definition."""
    q = torch.softmax(logits, -1)
    s = q.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([logprobs, tails[:, None]], -1).exp(), torch.cat([q.gather(1, ids), s], -1)


DEFINITIONS = {
    "forward_kl": lambda p, q: p * (p / q).log(),
    "reverse_kl": lambda p, q: q * (q / p).log(),
    "jsd": lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()) / 2,
    "skewed_kl": lambda p, q: p * (p / (0.1 * p + 0.9 * q)).log(),
    "tvd": lambda p, q: (p - q).abs() / 2,
}

#: The factors of the gradient on the logits, as the docstrings give them: the gradient is q_k times the factor of cell k at
#: candidate k, and q_v times the factor of the bucket at each other token v.
GRADIENTS = {
    "forward_kl": lambda p, q: 1 - p / q,
    "reverse_kl": lambda p, q: (q / p).log() - (q * (q / p).log()).sum(-1, keepdim=True),
    "jsd": lambda p, q: (2 * q / (p + q)).log() / 2 - (q * (2 * q / (p + q)).log()).sum(-1, keepdim=True) / 2,
    "skewed_kl": lambda p, q: (p * w(p, q)).sum(-1, keepdim=True) - w(p, q) * p / q,
    "tvd": lambda p, q: (q - p).sign() / 2 - (q * (q - p).sign()).sum(-1, keepdim=True) / 2,
}


def w(p, q):
    return 0.9 * q / (0.1 * p + 0.9 * q)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_and_its_gradient_are_what_the_docstring_says(name):
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(6), 5, 30, 4)
    logits = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    value = losses.divergence(name, logits, ids, logprobs, tails)
    value.sum().backward()
    p, q = dense_cells(logits.detach(), ids, logprobs, tails)
    torch.testing.assert_close(value.detach(), DEFINITIONS[name](p, q).sum(-1))
    factor = GRADIENTS[name](p, q)
    everywhere = factor[:, -1:].expand(-1, 30).scatter(1, ids, factor[:, :-1])
    torch.testing.assert_close(logits.grad, torch.softmax(logits.detach(), -1) * everywhere)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_zero_at_a_perfect_student_and_a_lower_bound_that_k_equal_v_reaches(name):
    generator = torch.Generator().manual_seed(7)
    *_, full = sparse_teacher(generator, 5, 40, 40)
    logits = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    whole = DEFINITIONS[name](full.exp(), torch.softmax(logits, -1)).sum(-1)
    before = torch.zeros(5, dtype=torch.float64)
    for k in (1, 5, 20, 40):
        best = full.topk(k, dim=-1)
        teacher = best.indices, best.values, full.scatter(1, best.indices, float("-inf")).logsumexp(-1)
        value = losses.divergence(name, logits, *teacher)
        assert (value >= before - 1e-12).all() and (value <= whole + 1e-9).all()
        assert losses.divergence(name, full, *teacher).abs().max() < 1e-9
        before = value
    torch.testing.assert_close(before, whole)


def test_with_every_token_a_candidate_the_gradient_is_that_of_the_dense_kl():
    generator = torch.Generator().manual_seed(8)
    ids, logprobs, tails, full = sparse_teacher(generator, 6, 25, 25)
    logits = torch.randn(6, 25, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses.divergence("forward_kl", ours, ids, logprobs, tails).sum().backward()
    torch.nn.functional.kl_div(torch.log_softmax(theirs, -1), full, log_target=True, reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_and_positions_without_candidates_or_tail_are_finite_and_right(name):
    ids, logprobs, _, _ = sparse_teacher(torch.Generator().manual_seed(9), 3, 20, 4)
    logprobs = torch.log_softmax(logprobs, -1)  # no tail
    tails = torch.tensor([float("-inf"), float("-inf"), 0.0], dtype=torch.float64)
    logprobs[2] = float("-inf")  # no candidates
    logits = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    plain = losses.divergence(name, logits, ids, logprobs, tails)
    gradient = torch.autograd.grad(plain.sum(), logits)[0]
    assert torch.isfinite(plain).all() and (plain[:2] > 0).all() and torch.isfinite(gradient).all()
    assert plain[2].abs() < 1e-15 and gradient[2].abs().max() < 1e-15
    padding = torch.full((3, 2), float("-inf"), dtype=torch.float64)
    padded = losses.divergence(name, logits, torch.cat([ids, ids[:, 1:3]], 1), torch.cat([logprobs, padding], 1), tails)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(torch.autograd.grad(padded.sum(), logits)[0], gradient)
