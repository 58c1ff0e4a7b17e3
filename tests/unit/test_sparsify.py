"""Policies keep the mass; entropies and tails are what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache import sparsify
from kdcache.errors import UsageError


def teacher_rows(seed: int, positions: int, vocabulary: int, k: int, scale: float):
    """The K best of random distributions, as an engine returns them: ids and logprobs [T, K]; and the full softmax."""
    logits = np.random.default_rng(seed).normal(0, scale, (positions, vocabulary))
    full = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = np.argsort(-full, axis=1)[:, :k].astype(np.int32)
    return ids, np.take_along_axis(full, ids, axis=1).astype(np.float32), full


shapes = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 300), st.integers(1, 40), st.floats(0.1, 8)
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 50))
def test_topk_keeps_the_best_in_order_and_all_of_the_mass(shape, kept):
    seed, positions, vocabulary, k, scale = shape
    k = min(k, vocabulary)
    ids, logprobs, _ = teacher_rows(seed, positions, vocabulary, k, scale)
    found = sparsify.topk(ids, logprobs, kept)
    width = min(kept, k)
    assert found.counts.tolist() == [width] * positions
    rows = found.logprobs.reshape(positions, width)
    assert (np.diff(rows, axis=1) <= 0).all()
    assert all(len(set(row)) == width for row in found.ids.reshape(positions, width).tolist())
    total = np.exp(rows.astype(np.float64)).sum(axis=1) + np.exp(found.tail.astype(np.float64))
    assert total == pytest.approx(np.ones(positions), abs=3e-6)


def test_a_tail_below_float32_is_stored_as_none():
    _, logprobs, _ = teacher_rows(0, 4, 20, 20, 3.0)
    assert np.isneginf(sparsify.log_tail(logprobs)).all()


def test_the_entropy_is_that_of_the_candidates_and_one_cell_and_a_lower_bound():
    _, logprobs, full = teacher_rows(1, 5, 100, 10, 2.0)
    head = np.exp(logprobs.astype(np.float64))
    cells = np.concatenate([head, 1 - head.sum(axis=1, keepdims=True)], axis=1)
    assert sparsify.entropies(logprobs) == pytest.approx(-(cells * np.log(cells)).sum(axis=1), abs=1e-5)
    assert (sparsify.entropies(logprobs) < -(np.exp(full) * full).sum(axis=1)).all()


def test_entropy_of_a_certain_teacher_is_zero():
    assert sparsify.entropies(np.array([[0.0, -np.inf]], dtype=np.float32)).tolist() == [0.0]


def test_parse():
    assert str(sparsify.parse("topk:64")) == "topk:64" and sparsify.parse("topk:64").capture_k == 64
    assert sparsify.parse("topk:8", 32).capture_k == 32


@pytest.mark.parametrize(
    "spec, k", [("best:3", None), ("topk", None), ("topk:0", None), ("topk:x", None), ("topk:8", 4)]
)
def test_wrong_specs_are_refused(spec, k):
    with pytest.raises(UsageError):
        sparsify.parse(spec, k)
