"""Policies keep the mass; entropies and tails are what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache import sparsify
from kdcache.cache.format import round_logprobs
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
    sparse = sparsify.parse(f"topk:{kept}")(ids, logprobs)
    width = min(kept, k)
    assert sparse.counts.tolist() == [width] * positions
    rows = sparse.logprobs.reshape(positions, width)
    assert (np.diff(rows, axis=1) <= 0).all()
    assert all(len(set(row)) == width for row in sparse.ids.reshape(positions, width).tolist())
    total = np.exp(rows.astype(np.float64)).sum(axis=1) + np.exp(sparse.tails.astype(np.float64))
    assert total == pytest.approx(np.ones(positions), abs=3e-6)


taus = st.floats(0.001, 0.9)


@settings(max_examples=100, deadline=None)
@given(shapes, taus, st.text(max_size=5))
def test_threshold_keeps_the_large_ones_samples_the_others_and_conserves_the_mass(shape, tau, sample_id):
    seed, positions, vocabulary, k, scale = shape
    ids, logprobs, _ = teacher_rows(seed, positions, vocabulary, min(k, vocabulary), scale)
    sparse = sparsify.parse(f"threshold:{tau}")(ids, logprobs, seed, sample_id)
    snapped = round_logprobs(np.log(np.array([tau], dtype=np.float32)))[0]
    assert len(sparse.counts) == positions and sparse.counts.sum() == len(sparse.ids) == len(sparse.logprobs)
    ends = np.cumsum(sparse.counts)
    for t, end in enumerate(ends):
        row = slice(end - sparse.counts[t], end)
        kept, values = sparse.ids[row].tolist(), sparse.logprobs[row]
        step = min(snapped, logprobs[t, 0])
        assert kept[0] == ids[t, 0], "the teacher's choice comes first"
        assert len(set(kept)) == len(kept) and (np.diff(values) <= 0).all()
        large = ids[t][logprobs[t] >= snapped].tolist()
        assert kept[: len(large)] == large and np.array_equal(values[: len(large)], logprobs[t][: len(large)])
        assert (values[max(len(large), 1) :] <= step).all()
        total = np.exp(values.astype(np.float64)).sum() + np.exp(np.float64(sparse.tails[t]))
        assert total == pytest.approx(1, abs=float(np.exp(np.float64(snapped))) + 3e-6)
        if len(large):
            assert len(kept) <= 1 / np.exp(snapped) + 1


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.3), st.floats(0.5, 3))
def test_threshold_is_unbiased_over_seeds_within_three_sigma(seed, tau, scale):
    draws, positions, k = 1000, 3, 40
    ids, logprobs, _ = teacher_rows(seed, positions, 60, k, scale)
    sparsifier = sparsify.parse(f"threshold:{tau}")
    total = np.zeros((positions, 60))
    for i in range(draws):
        sparse = sparsifier(ids, logprobs, i, "a sample")
        total[np.repeat(np.arange(positions), sparse.counts), sparse.ids] += np.exp(sparse.logprobs.astype(np.float64))
    p = np.exp(logprobs.astype(np.float64))
    step = np.exp(round_logprobs(np.log(np.array([tau], dtype=np.float32))).astype(np.float64))
    drawn = p < np.minimum(step, 0.98 * p[:, :1])  # the others are kept as they are
    error = np.take_along_axis(total, ids, axis=1) / draws - p
    assert np.abs(error[p >= step]).max(initial=0) < 1e-6
    sigmas = error[drawn] / np.sqrt(p[drawn] * np.maximum(step - p[drawn], p[drawn]) / draws)
    # Up to 120 cells at once: all within five sigma, and their mean square that of a normal, where there are enough.
    assert np.abs(sigmas).max(initial=0) < 5
    assert len(sigmas) < 30 or ((sigmas**2).mean() < 2 and (np.abs(sigmas) < 3).mean() > 0.9)


def test_threshold_draws_follow_from_seed_sample_and_position_alone():
    ids, logprobs, _ = teacher_rows(3, 40, 500, 100, 1.5)
    sparsifier = sparsify.parse("threshold:0.02")
    whole, part = sparsifier(ids, logprobs, 7, "a"), sparsifier(ids[:10], logprobs[:10], 7, "a")
    assert np.array_equal(whole.ids[: len(part.ids)], part.ids)
    for other in (sparsifier(ids, logprobs, 8, "a"), sparsifier(ids, logprobs, 7, "b")):
        assert not np.array_equal(other.ids, whole.ids)


def test_threshold_snaps_tau_to_the_codebook_so_that_rounding_leaves_the_sampled_weights_alone():
    ids, logprobs, _ = teacher_rows(4, 50, 500, 256, 1.0)
    sparse = sparsify.parse("threshold:0.01")(ids, logprobs)
    snapped = round_logprobs(np.log(np.array([0.01], dtype=np.float32)))[0]
    weights = sparse.logprobs[sparse.logprobs <= snapped]
    assert len(weights) > 100 and np.array_equal(round_logprobs(weights), weights)


@pytest.mark.parametrize("vocabulary", [1, 151_936, 262_144, 300_000])
def test_any_vocabulary(vocabulary):
    _, logprobs, _ = teacher_rows(5, 3, min(vocabulary, 50), min(vocabulary, 50), 2.0)
    ids = np.arange(vocabulary - logprobs.shape[1], vocabulary, dtype=np.int32)[None].repeat(3, 0)
    for spec in ("topk:8", "threshold:0.05"):
        sparse = sparsify.parse(spec)(ids, logprobs)
        assert sparse.ids.max() < vocabulary and sparse.ids.min() >= vocabulary - logprobs.shape[1]


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
    assert str(sparsify.parse("threshold:0.02")) == "threshold:0.02"
    assert sparsify.parse("threshold:0.02").capture_k == 256 and sparsify.parse("threshold:0.02", 512).capture_k == 512


@pytest.mark.parametrize(
    "spec, k",
    [
        *[("best:3", None), ("topk", None), ("topk:0", None), ("topk:x", None), ("topk:2.5", None), ("topk:8", 4)],
        *[("threshold:0", None), ("threshold:1", None), ("threshold:-1", None), ("threshold:nan", None)],
        *[("threshold:0.02", 0), ("topk:inf", None), ("threshold", None)],
    ],
)
def test_wrong_specs_are_refused(spec, k):
    with pytest.raises(UsageError):
        sparsify.parse(spec, k)
