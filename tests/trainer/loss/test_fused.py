"""The fused loss against the readable reference: equal values and gradients, without the logits of the batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdcache.errors import KDError
from trainer.loss import fused
from trainer.loss import reference as losses
from trainer.loss.divergences import DIVERGENCES as KINDS
from trainer.loss.head import head_of

INF = float("inf")
DIVERGENCES = [*KINDS, "skewed_kl:0.4"]


@dataclasses.dataclass
class Case:
    """Everything that distillation_loss takes, float64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    tails: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def leaves(self, dtype=torch.float64):
        leaves = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {
            name: None if x is None else x.detach().to(dtype).clone().requires_grad_() for name, x in leaves.items()
        }

    def fused(self, alpha=0.5, divergence="forward_kl", chunk_rows=None, dtype=torch.float64):
        """Return the losses, and the gradients of hidden, weight and bias (where there is one)."""
        leaves = self.leaves(dtype)
        result = fused.distillation_loss(
            leaves["hidden"], leaves["weight"], self.targets, self.ids, self.logprobs.to(dtype), self.tails.to(dtype),
            alpha, divergence, leaves["bias"], self.scale, self.softcap, chunk_rows,
        )  # fmt: skip
        result.loss.mul(1 / 7).backward()
        return result, {name: x.grad for name, x in leaves.items() if x is not None}

    def reference(self, alpha=0.5, divergence="forward_kl", dtype=torch.float64):
        leaves = self.leaves(dtype)
        logits = self.scale * torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves["bias"])
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        ce = losses.cross_entropy(logits, self.targets)
        d = losses.divergence(divergence, logits, self.ids, self.logprobs.to(dtype), self.tails.to(dtype))
        loss = (1 - alpha) * ce.sum() + alpha * d.sum()
        loss.mul(1 / 7).backward()
        result = fused.Losses(loss, ce, d, logits.argmax(-1))
        return result, {name: x.grad for name, x in leaves.items() if x is not None}


def make(seed=0, n=6, v=30, d=4, k=5, ragged=False, bias=False, scale=1.0, softcap=None) -> Case:
    """Return a student and a random teacher's top k, or with ``ragged`` 0 to k candidates, padded as ``pack`` pads them."""
    random = torch.Generator().manual_seed(seed)
    full = torch.log_softmax(3 * torch.randn(n, v, generator=random, dtype=torch.float64), -1)
    logprobs, ids = full.topk(k, dim=-1)
    counts = torch.randint(0, k + 1, (n,), generator=random) if ragged else torch.full((n,), k)
    kept = torch.arange(k) < counts[:, None]
    ids = torch.where(kept, ids, ids[:, :1])
    logprobs = logprobs.masked_fill(~kept, -INF)
    tails = torch.where(counts > 0, full.scatter(1, ids, -INF).logsumexp(-1), 0.0)
    draw = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))]
    targets = torch.randint(0, v, (n,), generator=random)
    return Case(draw[0], draw[1], targets, ids, logprobs, tails, draw[2] if bias else None, scale, softcap)


def assert_same(case: Case, alpha=0.5, divergence="forward_kl", chunk_rows=None):
    (ours, our_gradients), (theirs, their_gradients) = (
        case.fused(alpha, divergence, chunk_rows),
        case.reference(alpha, divergence),
    )
    same = {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(ours.loss, theirs.loss, **same)
    torch.testing.assert_close(ours.ce, theirs.ce.detach(), **same)
    if alpha:
        torch.testing.assert_close(ours.divergence, theirs.divergence.detach(), **same)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, **same)


# --- fused = reference -------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    v=st.integers(2, 40),
    d=st.integers(1, 6),
    k=st.integers(1, 40),
    ragged=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    alpha=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    divergence=st.sampled_from(DIVERGENCES),
    chunk_rows=st.sampled_from([None, 1, 2, 5]),
)
def test_values_and_gradients_equal_the_reference(
    seed, n, v, d, k, ragged, bias, scale, softcap, alpha, divergence, chunk_rows
):
    case = make(seed, n, v, d, min(k, v), ragged, bias, scale, softcap)
    assert_same(case, alpha, divergence, chunk_rows)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [1, 29, 30])
def test_one_candidate_all_but_one_and_all_tokens(divergence, k):
    assert_same(make(1, k=k), divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tail(divergence):
    case = make(2)
    case.logprobs, case.tails = torch.log_softmax(case.logprobs, -1), torch.full((6,), -INF, dtype=torch.float64)
    assert_same(case, divergence=divergence)


def test_total_mass_off_one_as_threshold_sampling_leaves_it():
    case = make(3)
    case.logprobs = case.logprobs + torch.linspace(-0.2, 0.2, 6, dtype=torch.float64)[:, None]
    case.tails[::2] = -INF
    assert_same(case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_position_without_candidates_has_no_divergence_and_no_gradient_of_it(divergence):
    case = make(4)
    case.logprobs[2], case.tails[2] = -INF, 0.0
    assert_same(case, divergence=divergence)
    result, gradients = case.fused(1.0, divergence)
    assert result.divergence[2].abs() < 1e-15 and gradients["hidden"][2].abs().max() < 1e-15


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(divergence, softcap):
    case = make(5, n=3, v=9, d=2, k=3, softcap=softcap)

    def loss(hidden, weight, bias):
        return fused.distillation_loss(
            hidden, weight, case.targets, case.ids, case.logprobs, case.tails, 0.7, divergence, bias, 0.5, softcap, 2
        ).loss

    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)
    # Checkpointed, because gradcheck runs the backward pass twice and ours runs once: so the loss is formed again.
    assert torch.autograd.gradcheck(
        lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False),
        (case.hidden.requires_grad_(), case.weight.requires_grad_(), bias),
    )


def test_with_every_token_a_candidate_it_is_ordinary_full_vocabulary_distillation():
    case = make(6, k=30)
    leaves = case.leaves()
    logits = leaves["hidden"] @ leaves["weight"].T
    teacher = torch.empty_like(logits).scatter_(1, case.ids, case.logprobs)
    dense = torch.nn.functional.kl_div(torch.log_softmax(logits, -1), teacher, log_target=True, reduction="sum")
    dense.mul(1 / 7).backward()
    result, gradients = case.fused(alpha=1.0)
    torch.testing.assert_close(result.loss, dense)
    torch.testing.assert_close(gradients["hidden"], leaves["hidden"].grad)
    torch.testing.assert_close(gradients["weight"], leaves["weight"].grad)


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [1e-2, 1e-4, 1e-6])
def test_a_small_tail_keeps_its_digits_where_one_minus_the_sum_loses_them(tail):
    random = torch.Generator().manual_seed(7)
    n, v, k = 16, 400, 8

    def draw(tail):  # with a mass of about ``tail`` outside the candidates, which are the first k tokens
        logits = torch.randn(n, v, generator=random, dtype=torch.float64)
        logits[:, k:] += logits[:, :k].logsumexp(-1, keepdim=True) - logits[:, k:].logsumexp(-1, keepdim=True)
        logits[:, k:] += torch.tensor(tail).log()
        return logits.float()

    logits, teacher = draw(2 * tail), torch.log_softmax(draw(tail).double(), -1)
    ids, logprobs = torch.arange(k).expand(n, k), teacher[:, :k].float()
    tails = teacher[:, k:].logsumexp(-1).float()

    exact = logits.double().requires_grad_()
    value = losses.divergence("forward_kl", exact, ids, logprobs.double(), tails.double())
    value.sum().backward()
    outside = exact.grad[:, k:]

    hidden = logits.clone().requires_grad_()  # the head is the identity matrix, so these are the logits
    result = fused.distillation_loss(hidden, torch.eye(v), torch.zeros(n, dtype=int), ids, logprobs, tails, 1.0)
    result.loss.backward()
    q = torch.softmax(logits, -1)
    naive = q[:, k:] * (1 - tails.exp()[:, None] / (1 - q[:, :k].sum(-1, keepdim=True)))

    error = (hidden.grad[:, k:] - outside).norm() / outside.norm()
    assert error < 5e-6
    assert (naive - outside).norm() / outside.norm() > 10 * error
    torch.testing.assert_close(result.divergence.double(), value.detach(), rtol=1e-4, atol=1e-6)


def test_a_student_so_sure_that_float32_has_no_number_for_the_rest_stays_finite_and_right():
    logits = torch.zeros(1, 50)
    logits[0, 3] = 200.0  # s = 49 exp(-200)
    hidden = logits.requires_grad_()
    teacher = torch.tensor([[3]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]).log()
    result = fused.distillation_loss(hidden, torch.eye(50), torch.tensor([3]), *teacher, 1.0)
    result.loss.backward()
    exact = logits.detach().double().requires_grad_()
    losses.divergence("forward_kl", exact, teacher[0], teacher[1].double(), teacher[2].double()).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_no_worse_than_those_of_the_reference(dtype):
    case = make(8, n=96, v=1500, d=48, k=16)
    case.hidden, case.weight = case.hidden.to(dtype).double(), (0.3 * case.weight).to(dtype).double()
    exact = case.reference()[1]
    ours, theirs = case.fused(chunk_rows=40, dtype=dtype)[1], case.reference(dtype=dtype)[1]
    for name in exact:
        assert ours[name].dtype == dtype
        assert (ours[name] - exact[name]).norm() <= 1.1 * (theirs[name] - exact[name]).norm()


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    case = make(9, n=32, v=300, d=16, k=8, bias=True)
    exact = case.fused()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = Recorder()
        with products:
            result, gradients = case.fused(dtype=torch.float32)
    assert products.dtypes["mm"] == {torch.bfloat16} and result.loss.dtype == torch.float32
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.02 * exact[name].norm()


# --- what is formed, and what is held ----------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the largest result of any operation, in elements, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.dtypes = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                if "mm" in func.__name__:
                    self.products += 1
                    self.dtypes.setdefault("mm", set()).add(x.dtype)
        return result


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_larger_than_a_chunk_is_held_however_many_positions_and_three_products_are_made(divergence, softcap):
    for n in (8, 64):
        case = make(10, n=n, v=1000, d=2, softcap=softcap)
        with Recorder() as recorded:
            case.fused(divergence=divergence, chunk_rows=4)
        assert recorded.largest == 4 * 1000
        assert recorded.products == 3 * (n // 4)


@pytest.mark.parametrize(
    ("dtype", "softcap", "rows"),
    [(torch.float32, None, 10), (torch.float64, None, 5), (torch.bfloat16, None, 6), (torch.float32, 5.0, 5)],
)
def test_the_default_chunk_keeps_to_its_budget(monkeypatch, dtype, softcap, rows):
    monkeypatch.setattr(fused, "CHUNK_BYTES", 10 * 1000 * 4)
    case = make(10, n=60, v=1000, d=2, softcap=softcap)
    with Recorder() as recorded:
        case.fused(dtype=dtype)
    assert recorded.largest == rows * 1000


def test_under_no_grad_no_gradients_are_formed_and_the_best_token_is_returned():
    case = make(11, n=20, ragged=True)
    expected = case.reference(0.0)[0]
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    with torch.no_grad(), Recorder() as recorded:
        result = fused.distillation_loss(
            case.hidden, case.weight, case.targets, case.ids, case.logprobs, case.tails, 0.0, chunk_rows=5
        )
    assert recorded.products == 4 and not result.loss.requires_grad
    for ours, theirs in zip(result, expected):
        torch.testing.assert_close(ours, theirs.detach(), atol=1e-10, rtol=1e-10)


def test_cross_entropy_alone_does_not_look_at_the_candidates():
    result, _ = make(12).fused(alpha=0.0)
    assert result.divergence is None and result.best is None


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    case = make(13)
    leaves = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
    other = leaves["weight" if frozen == "hidden" else "hidden"].requires_grad_()
    with Recorder() as recorded:
        result = fused.distillation_loss(
            **leaves, targets=case.targets, candidate_ids=case.ids, candidate_logprobs=case.logprobs,
            tail_logprobs=case.tails, alpha=0.5,
        )  # fmt: skip
        result.loss.mul(1 / 7).backward()
    assert recorded.products == 2 and leaves[frozen].grad is None
    torch.testing.assert_close(other.grad, case.reference()[1]["weight" if frozen == "hidden" else "hidden"])


def test_without_positions_the_loss_and_all_gradients_are_zero():
    result, gradients = make(14, n=0, bias=True).fused()
    assert result.loss == 0 and len(result.ce) == len(result.divergence) == 0
    assert all((gradient == 0).all() for gradient in gradients.values()) and gradients["weight"].shape == (30, 4)


def test_a_tied_head_gets_both_gradients():
    case = make(15)
    gradients = []
    for use_fused in (True, False):
        embedding = case.weight.clone().requires_grad_()
        hidden = torch.tanh(embedding[case.targets])
        tied = dataclasses.replace(case, hidden=hidden, weight=embedding)
        arguments = (tied.targets, tied.ids, tied.logprobs, tied.tails)
        if use_fused:
            loss = fused.distillation_loss(hidden, embedding, *arguments, 0.5).loss
        else:
            logits = hidden @ embedding.T
            loss = (
                0.5
                * (
                    losses.cross_entropy(logits, case.targets) + losses.divergence("forward_kl", logits, *arguments[1:])
                ).sum()
            )
        loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients)


def test_a_second_backward_pass_is_refused():
    case = make(16)
    hidden = case.hidden.requires_grad_()
    loss = fused.distillation_loss(hidden, case.weight, case.targets, case.ids, case.logprobs, case.tails, 0.5).loss
    loss.mul(2.0).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_gradient_checkpointing_the_loss_is_formed_twice_not_thrice():
    case = make(18)
    with Recorder() as recorded:
        loss = checkpoint(
            lambda hidden: (
                fused.distillation_loss(
                    hidden, case.weight, case.targets, case.ids, case.logprobs, case.tails, 0.5
                ).loss
            ),
            case.hidden.requires_grad_(),
            use_reentrant=False,
        )
        loss.backward()
    assert recorded.products == 2 * 2  # the weight is frozen, so the loss takes two products


# --- heads -------------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


def model_of(family: str, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | {"initializer_range": 0.5} | changes)
    name = {"Gemma3Text": "Gemma3"}.get(family, family)
    return getattr(transformers, f"{name}ForCausalLM")(config).double().train()


@pytest.mark.parametrize(
    ("family", "changes", "scale", "softcap"),
    [
        ("Llama", {}, 1.0, None),
        ("Gemma2", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("Gemma3Text", {"final_logit_softcapping": 3.0}, 1.0, 3.0),
        ("Gemma3Text", {}, 1.0, None),
        ("Granite", {"logits_scaling": 4.0}, 0.25, None),
        ("Cohere", {"logit_scale": 0.25}, 0.25, None),
        ("Cohere2", {"logit_scale": 0.25}, 0.25, None),
        ("HyperCLOVAX", {}, 1.0, None),
    ],
)
def test_the_head_of_a_family_gives_the_logits_of_its_models_and_their_gradients(family, changes, scale, softcap):
    student, case = model_of(family, **changes), make(17, n=7, v=60)
    head = head_of(student)
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap) and student.training
    input_ids = torch.randint(1, 60, (1, 7))

    logits = student(input_ids=input_ids, use_cache=False).logits[0]
    teacher = (case.ids, case.logprobs, case.tails)
    loss = 0.5 * (losses.cross_entropy(logits, case.targets) + losses.divergence("forward_kl", logits, *teacher)).sum()
    theirs = torch.autograd.grad(loss, list(student.parameters()))

    hidden = student.base_model(input_ids=input_ids, use_cache=False)[0][0]
    torch.testing.assert_close(head(hidden), logits)
    ours = fused.distillation_loss(
        hidden, head.weight, case.targets, *teacher, 0.5, bias=head.bias, scale=head.scale, softcap=head.softcap
    ).loss
    torch.testing.assert_close(ours, loss)
    torch.testing.assert_close(torch.autograd.grad(ours, list(student.parameters())), theirs)


def test_a_head_that_kd_does_not_know_is_refused_by_name():
    import peft

    with pytest.raises(KDError, match=r"HyperCLOVAXForCausalLM .* scale 0\.25"):  # multiplies where Granite divides
        head_of(model_of("HyperCLOVAX", logits_scaling=4.0))
    student = model_of("Llama")
    student.add_adapter(peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(KDError, match=r"peft\.tuners\.lora\.layer\.Linear"):
        head_of(student)
    student = model_of("Llama")
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert not head_of(student).weight.requires_grad
