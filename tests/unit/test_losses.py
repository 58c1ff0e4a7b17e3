"""The sparse loss against a dense float64 computation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import losses


def sparse_teacher(generator: torch.Generator, positions: int, vocabulary: int, k: int, scale: float = 3.0):
    """Top-k candidates of random teachers, float64: ids (N, K), logprobs (N, K), tails (N,), and the full log-softmax."""
    full = torch.log_softmax(scale * torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64), -1)
    best = full.topk(k, dim=-1)
    rest = full.scatter(1, best.indices, float("-inf")).logsumexp(-1)
    return best.indices, best.values, rest, full


def dense_forward_kl(logits, ids, logprobs, tails):
    """The same by its definition: probabilities of K + 1 cells, in float64, all at once."""
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
    losses.forward_kl(ours, ids, logprobs, tails).sum().backward()
    dense_forward_kl(theirs, ids, logprobs, tails).sum().backward()
    torch.testing.assert_close(
        losses.forward_kl(logits, ids, logprobs, tails), dense_forward_kl(logits, ids, logprobs, tails)
    )
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)


def test_gradcheck():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(1), 3, 12, 4)
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.forward_kl(x, ids, logprobs, tails), (logits,))


def test_the_gradient_is_q_minus_p_and_q_times_one_minus_r_over_s():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(2), 4, 30, 5)
    logits = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
    losses.forward_kl(logits, ids, logprobs, tails).sum().backward()
    q = torch.softmax(logits.detach(), -1)
    s = q.scatter(1, ids, 0.0).sum(-1, keepdim=True)
    expected = (q * (1 - tails.exp()[:, None] / s)).scatter(1, ids, q.gather(1, ids) - logprobs.exp())
    torch.testing.assert_close(logits.grad, expected)


def test_it_is_zero_with_zero_gradient_at_a_perfect_student():
    ids, logprobs, tails, full = sparse_teacher(torch.Generator().manual_seed(3), 6, 50, 8)
    logits = full.float().requires_grad_()
    loss = losses.forward_kl(logits, ids, logprobs, tails)
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
        found = losses.forward_kl(logits, best.indices, best.values, tails)
        assert (found >= before - 1e-12).all() and (found <= whole + 1e-9).all()
        before = found
    torch.testing.assert_close(before, whole)


def test_padding_that_repeats_a_candidate_changes_nothing():
    ids, logprobs, tails, _ = sparse_teacher(torch.Generator().manual_seed(5), 3, 20, 4)
    padded_ids = torch.cat([ids, ids[:, :1]], dim=1)
    padded = torch.cat([logprobs, torch.full((3, 1), float("-inf"), dtype=torch.float64)], dim=1)
    logits = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(losses.forward_kl(logits, ids, logprobs, tails).sum(), logits)[0]
    with_padding = torch.autograd.grad(losses.forward_kl(logits, padded_ids, padded, tails).sum(), logits)[0]
    torch.testing.assert_close(plain, with_padding)


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-6])
def test_a_tiny_tail_stays_finite_in_float32_with_a_student_that_is_sure(tail):
    log_r = torch.tensor([tail]).log()
    logprobs = torch.log1p(-torch.tensor([[tail]]))
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 60.0
    logits.requires_grad_()
    loss = losses.forward_kl(logits, torch.tensor([[0]]), logprobs, log_r)
    loss.sum().backward()
    reference = dense_forward_kl(logits.detach().double(), torch.tensor([[0]]), logprobs, log_r)
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(loss.detach().double(), reference, rtol=1e-4, atol=1e-9)
