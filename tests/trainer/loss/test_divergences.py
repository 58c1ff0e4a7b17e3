"""The divergences on cells: their derivatives, empty cells, and which of them a cache allows."""

import pytest
import torch

from kdcache.cache import sparsify
from kdcache.errors import UsageError
from trainer.loss.divergences import DIVERGENCES, NOTHING, check, parse
from trainer.loss.fused import value_and_gradient


def random_cells() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.log_softmax(torch.randn(2, 5, 4, dtype=torch.float64), -1).unbind()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_on_the_cells_is_the_derivative_of_the_value_where_autograd_is_off_too(name):
    log_p, log_q = random_cells()
    on_cells = DIVERGENCES[name].on_cells
    assert torch.autograd.gradcheck(lambda x: on_cells(log_p, x), (log_q.clone().requires_grad_(),))
    expected = torch.func.grad(lambda x: on_cells(log_p, x).sum())(log_q)
    with torch.no_grad():
        value, gradient = value_and_gradient(on_cells, log_p, log_q)
    torch.testing.assert_close(value, on_cells(log_p, log_q))
    torch.testing.assert_close(gradient, expected)
    assert not value.requires_grad and not gradient.requires_grad


@pytest.mark.parametrize("name", [*DIVERGENCES, "skewed_kl:0.4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_cells_add_nothing_and_have_no_gradient(name, dtype):
    log_p, log_q = (x.to(dtype) for x in random_cells())
    nothing = torch.full((5, 1), NOTHING, dtype=dtype)
    padded_p, padded_q = (torch.cat([nothing, x], -1) for x in (log_p, log_q))
    on_cells = parse(name).on_cells
    plain, padded = value_and_gradient(on_cells, log_p, log_q), value_and_gradient(on_cells, padded_p, padded_q)
    torch.testing.assert_close(padded[0], plain[0])
    torch.testing.assert_close(padded[1][:, 1:], plain[1])
    assert (padded[1][:, 0] == 0).all()


@pytest.mark.parametrize("name", [*DIVERGENCES, "skewed_kl:0.4"])
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_bucket_that_only_one_of_the_two_has_leaves_value_and_gradient_finite(name, side):
    log_p, log_q = (x.float() for x in random_cells())
    (log_p if side == "teacher" else log_q)[:, -1] = NOTHING
    value, gradient = value_and_gradient(parse(name).on_cells, log_p, log_q)
    assert torch.isfinite(value).all() and torch.isfinite(gradient).all()


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_divergence_that_would_be_biased_on_a_cache_is_refused_with_the_reason():
    for divergence in DIVERGENCES:
        check(divergence, sparsify.parse("topk:64"))
    check("forward_kl", sparsify.parse("threshold:0.02"))
    check("skewed_kl:0.3", sparsify.parse("topk:8"))
    for divergence in ("reverse_kl", "jsd", "skewed_kl:0.3", "tvd"):
        with pytest.raises(UsageError, match="linear in the teacher's probabilities"):
            check(divergence, sparsify.parse("threshold:0.02"))


@pytest.mark.parametrize("divergence", ["", "kl", "jsd:0.5", "skewed_kl:", "skewed_kl:1", "skewed_kl:x"])
def test_an_unknown_divergence_is_refused(divergence):
    with pytest.raises(UsageError, match="divergence"):
        parse(divergence)
