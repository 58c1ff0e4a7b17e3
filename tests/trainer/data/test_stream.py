"""There is one order for any number of ranks, and the state of the stream is the step."""

import itertools

import numpy as np
import pytest

from kdcache.cache.reader import Cache
from trainer.data.select import select
from trainer.data.stream import Stream, divide

HEAD = 49152


@pytest.fixture(scope="module")
def selection(tiny_cache):
    return select([Cache(tiny_cache)], "train")


def sample_keys(batch):
    """Return the packed samples of a batch, as tuples of their token ids."""
    if not len(batch["tail_logprobs"]):
        return []
    ids = batch["input_ids"][0].tolist()
    return [tuple(ids[a:b]) for a, b in itertools.pairwise(batch["offsets"].tolist())]


def step_of(stream_parts):
    """Return the samples of one step, whichever part has them."""
    return sorted(key for batch in stream_parts for key in sample_keys(batch))


def endless(stream):
    """Draw as Trainer does: exactly the batches of an epoch, then from a new iterator."""
    while True:
        yield from itertools.islice(iter(stream), len(stream))


def steps(selection, count, parts=1, ranks=1, **options):
    """Return the samples of the first steps, gathered over all ranks."""
    streams = [endless(Stream(selection, HEAD, 6, parts=parts, ranks=ranks, rank=r, **options)) for r in range(ranks)]
    return [step_of([next(s) for _ in range(parts // ranks) for s in streams]) for _ in range(count)]


def test_an_epoch_has_every_sample_once_and_the_next_another_order(selection):
    stream = Stream(selection, HEAD, 6)
    first, second = list(stream), list(stream)
    assert len(first) == len(stream) == stream.steps_per_epoch == -(-len(selection) // 6)
    keys = [key for batch in first for key in sample_keys(batch)]
    assert len(keys) == len(selection) and sorted(keys) == sorted(k for b in second for k in sample_keys(b))
    assert keys != [key for batch in second for key in sample_keys(batch)]


def test_the_seed_decides_the_order(selection):
    assert steps(selection, 4, seed=3) == steps(selection, 4, seed=3) != steps(selection, 4, seed=4)


@pytest.mark.parametrize("parts, ranks", [(2, 1), (3, 3), (4, 2), (6, 2)])
def test_accumulation_and_ranks_do_not_change_a_step(selection, parts, ranks):
    count = Stream(selection, HEAD, 6).steps_per_epoch + 2
    assert steps(selection, count, parts=parts, ranks=ranks) == steps(selection, count)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_nodes_that_share_the_row_groups_make_the_same_steps(selection, ranks, monkeypatch):
    """Nodes share row groups that come over a network. Three nodes cannot share four evenly, so all read all."""
    expected = steps(selection, Stream(selection, HEAD, 6).steps_per_epoch + 2)
    monkeypatch.setattr(type(selection), "remote", True)
    assert steps(selection, len(expected), parts=2 * ranks, ranks=ranks) == expected
    stream = Stream(selection, HEAD, 6, parts=ranks, ranks=ranks)
    for window in stream.order(0):
        allowed, groups = stream.allowed(window), len(np.unique(selection.row_group[window]))
        even = groups % ranks == 0 or ranks % groups == 0
        assert allowed.sum(1).tolist() == [max(ranks // groups, 1) if even else ranks] * len(window)
    assert steps(selection, len(expected), parts=ranks, ranks=ranks, ranks_per_node=2) == expected
    one_node = Stream(selection, HEAD, 6, parts=ranks, ranks=ranks, ranks_per_node=ranks)
    assert all(one_node.allowed(window).all() for window in one_node.order(0))


@pytest.mark.parametrize("size", [6, 30, 10_000])
def test_a_rank_reads_its_own_samples_and_little_else_each_once(selection, size, monkeypatch):
    """Besides its own samples it reads waiting ones that are in the same row groups, fewer than a step at each reading."""
    reads, load = [], type(selection).load
    monkeypatch.setattr(type(selection), "load", lambda self, indices: reads.append(indices) or load(self, indices))
    for rank in range(3):
        reads.clear()
        batches = list(Stream(selection, HEAD, size, parts=3, ranks=3, rank=rank)._batches())
        trained = sum(len(sample_keys(batch)) for batch in batches)
        read = np.concatenate(reads)
        assert len(read) == len(np.unique(read)), "nothing is read twice"
        readings = len(reads)
        assert trained <= len(read) <= trained + (readings - 1) * min(size, len(selection)), (rank, trained, len(read))
        if size > len(selection):
            assert len(read) == trained and readings == 1


def test_a_step_of_several_windows_is_fetched_while_the_one_before_is_in_use(selection, monkeypatch):
    calls = []
    monkeypatch.setattr(type(selection), "remote", True)
    monkeypatch.setattr(type(selection), "prefetch", lambda self, row_groups: calls.append("prefetch"))
    monkeypatch.setattr("trainer.data.stream.WINDOW_ROW_GROUPS", 1)
    load = type(selection).load
    monkeypatch.setattr(type(selection), "load", lambda self, indices: calls.append("load") or load(self, indices))
    steps = -(-len(selection) // 20)
    list(Stream(selection, HEAD, 20)._batches())
    assert calls == ["prefetch", *["prefetch", "load"] * (steps - 1), "load"] and steps > 2


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 11, 23])
def test_it_resumes_with_the_very_next_batch(selection, step):
    count = 26
    uninterrupted = steps(selection, count)
    assert steps(selection, count - step, step=step) == uninterrupted[step:]


def test_a_short_last_step_leaves_parts_with_empty_batches(selection):
    size = next(n for n in (5, 6, 7) if len(selection) % n)
    last = list(Stream(selection, HEAD, size, parts=size))[-size:]
    assert [len(b["tail_logprobs"]) > 0 for b in last] == [i < len(selection) % size for i in range(size)]


def test_a_step_is_divided_evenly_by_tokens(selection):
    tokens = selection.tokens[:30]
    parts = divide(tokens, 4, np.ones((30, 2), bool))
    sizes = [tokens[part].sum() for part in parts]
    assert max(sizes) - min(sizes) <= tokens.max()
    assert sorted(np.concatenate(parts)) == list(range(30))


def test_a_sample_goes_to_a_rank_that_may_have_it(selection):
    tokens, allowed = selection.tokens[:30], np.arange(30)[:, None] % 2 == np.arange(2)[None]
    parts = divide(tokens, 4, allowed)
    assert all((part % 2 == number % 2).all() for number, part in enumerate(parts))
    for rank in (0, 1):
        sizes = [tokens[part].sum() for part in parts[rank::2]]
        assert max(sizes) - min(sizes) <= tokens.max()
