"""One order for any number of ranks; packed samples cannot see each other; the state is the step."""

import itertools
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.cache.candidates import Candidates
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError
from trainer.data.stream import IGNORE, Stream, divide, in_order, open_caches, pack, read_ahead, select
from trainer.distill.trainer import attach_loss

HEAD = 49152


@pytest.fixture(scope="module")
def units(tiny_cache):
    return select([Cache(tiny_cache)], "train")


def sample_keys(batch):
    """The packed samples of a batch, as tuples of their token ids."""
    if not len(batch["tail_logprobs"]):
        return []
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ids = batch["input_ids"][0].tolist()
    return [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])]


def step_of(stream_parts):
    return sorted(key for batch in stream_parts for key in sample_keys(batch))


def endless(stream):
    """As Trainer draws it: exactly an epoch's batches, then a new iterator."""
    while True:
        yield from itertools.islice(iter(stream), len(stream))


def steps(units, count, parts=1, ranks=1, **options):
    """The first steps' samples, gathered over ranks."""
    streams = [endless(Stream(units, HEAD, 6, parts=parts, ranks=ranks, rank=r, **options)) for r in range(ranks)]
    return [step_of([next(s) for _ in range(parts // ranks) for s in streams]) for _ in range(count)]


def test_an_epoch_has_every_sample_once_and_the_next_another_order(units):
    stream = Stream(units, HEAD, 6)
    first, second = list(stream), list(stream)
    assert len(first) == len(stream) == stream.steps_per_epoch == -(-len(units) // 6)
    keys = [key for batch in first for key in sample_keys(batch)]
    assert len(keys) == len(units) and sorted(keys) == sorted(k for b in second for k in sample_keys(b))
    assert keys != [key for batch in second for key in sample_keys(batch)]


def test_the_order_is_the_seeds(units):
    assert steps(units, 4, seed=3) == steps(units, 4, seed=3) != steps(units, 4, seed=4)


@pytest.mark.parametrize("parts, ranks", [(2, 1), (3, 3), (4, 2), (6, 2)])
def test_accumulation_and_ranks_do_not_change_a_step(units, parts, ranks):
    count = Stream(units, HEAD, 6).steps_per_epoch + 2
    assert steps(units, count, parts=parts, ranks=ranks) == steps(units, count)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_that_share_row_groups_out_make_the_same_steps(units, ranks, monkeypatch):
    """As they do where row groups come over a network; three ranks and four row groups cannot be even, and all read all."""
    wanted = steps(units, Stream(units, HEAD, 6).steps_per_epoch + 2)
    monkeypatch.setattr(type(units), "remote", True)
    assert steps(units, len(wanted), parts=2 * ranks, ranks=ranks) == wanted
    stream = Stream(units, HEAD, 6, parts=ranks, ranks=ranks)
    for window in stream.order(0):
        shared, groups = stream.allowed(window), len(np.unique(units.group[window]))
        even = groups % ranks == 0 or ranks % groups == 0
        assert shared.sum(1).tolist() == [max(ranks // groups, 1) if even else ranks] * len(window)
    assert steps(units, len(wanted), parts=ranks, ranks=ranks, ranks_a_node=2) == wanted
    one_node = Stream(units, HEAD, 6, parts=ranks, ranks=ranks, ranks_a_node=ranks)
    assert all(one_node.allowed(window).all() for window in one_node.order(0))


@pytest.mark.parametrize("size", [6, 30, 10_000])
def test_a_rank_reads_its_own_samples_and_little_else_each_once(units, size, monkeypatch):
    """What else: of the row groups it reads, the samples of a step to come, of which no more than a step's wait."""
    reads, load = [], type(units).load
    monkeypatch.setattr(type(units), "load", lambda self, picked: reads.append(picked) or load(self, picked))
    for rank in range(3):
        reads.clear()
        batches = list(Stream(units, HEAD, size, parts=3, ranks=3, rank=rank)._batches())
        trained = sum(len(sample_keys(batch)) for batch in batches)
        read = np.concatenate(reads)
        assert len(read) == len(np.unique(read)), "nothing is read twice"
        windows = len(reads)
        assert trained <= len(read) <= trained + (windows - 1) * min(size, len(units)), (rank, trained, len(read))
        if size > len(units):
            assert len(read) == trained and windows == 1


def test_a_step_of_several_windows_is_fetched_while_the_one_before_is_in_use(units, monkeypatch):
    done = []
    monkeypatch.setattr(type(units), "remote", True)
    monkeypatch.setattr(type(units), "prefetch", lambda self, groups: done.append("prefetch"))
    monkeypatch.setattr("trainer.data.stream.WINDOW_ROW_GROUPS", 1)
    load = type(units).load
    monkeypatch.setattr(type(units), "load", lambda self, picked: done.append("load") or load(self, picked))
    steps = -(-len(units) // 20)
    list(Stream(units, HEAD, 20)._batches())
    assert done == ["prefetch", *["prefetch", "load"] * (steps - 1), "load"] and steps > 2


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 11, 23])
def test_it_resumes_with_the_very_next_batch(units, step):
    count = 26
    uninterrupted = steps(units, count)
    assert steps(units, count - step, step=step) == uninterrupted[step:]


def test_a_short_last_step_leaves_parts_without_samples_not_without_batches(units):
    size = next(n for n in (5, 6, 7) if len(units) % n)
    last = list(Stream(units, HEAD, size, parts=size))[-size:]
    assert [len(b["tail_logprobs"]) > 0 for b in last] == [i < len(units) % size for i in range(size)]


def test_labels_are_the_completion_and_shift_labels_the_next_token(units):
    for batch in in_order(units, HEAD, 4):
        ids, shifted = batch["input_ids"][0], batch["shift_labels"][0]
        supervised = shifted != IGNORE
        assert (shifted[supervised] == ids[1:][supervised[:-1]]).all()
        assert (
            (batch["labels"][0] != IGNORE).sum()
            == supervised.sum()
            == len(batch["tail_logprobs"])
            == len(batch["candidate_ids"])
        )
        starts = (batch["position_ids"][0] == 0).nonzero()[1:, 0]
        assert (shifted[starts - 1] == IGNORE).all(), "the last token of a sample predicts nothing"


def test_end_of_turn_is_supervised(units):
    batch = next(in_order(units, HEAD, 8))
    assert (batch["shift_labels"] == 2).sum() >= 1


def test_a_packed_sample_gets_the_loss_it_gets_alone(units, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    attach_loss(model, 0.5)
    samples = units.load(np.arange(8))
    with torch.no_grad():
        together = model(**pack(samples, HEAD))
        alone = [model(**pack([s], HEAD)) for s in samples]
    for name in ("kl", "ce", "agreement", "tokens"):
        torch.testing.assert_close(together[name], sum(a[name] for a in alone), rtol=1e-5, atol=1e-4)


def test_a_neighbour_that_is_seen_would_be_noticed(units, tiny_model):
    """The test above can fail: with positions that run on, the second sample sees the first."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    attach_loss(model, 0.5)
    batch = pack(units.load(np.arange(2)), HEAD)
    with torch.no_grad():
        apart = model(**batch)["ce"]
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        together = model(**batch)["ce"]
    assert abs(apart - together) > 1e-2


def test_completion_mask_leaves_positions_out():
    sample = Sample(
        sample_id="x",
        prompt_ids=np.array([5, 6], np.int32),
        completion_ids=np.array([7, 8, 9], np.int32),
        supervised=np.array([True, False, True]),
        candidates=Candidates(
            ids=np.array([7, 1, 2, 9, 3], np.int32),
            logprobs=np.log(np.array([0.9, 0.5, 0.4, 0.6, 0.2], np.float32)),
            counts=np.array([1, 2, 2], np.int32),
            tails=np.log(np.array([0.1, 0.1, 0.2], np.float32)),
        ),
    )
    batch = pack([sample], 10)
    assert batch["shift_labels"].tolist() == [[IGNORE, 7, IGNORE, 9, IGNORE]]
    assert batch["candidate_ids"].tolist() == [[7, 7], [9, 3]]
    assert batch["candidate_logprobs"].exp().tolist() == [
        [pytest.approx(0.9), 0.0],
        [pytest.approx(0.6), pytest.approx(0.2)],
    ]


def test_candidates_beyond_the_head_move_to_the_tail_and_too_many_are_refused():
    def sample(mass):
        logprobs = np.log(np.array([1 - mass, mass], np.float32))
        candidates = Candidates(np.array([2, 12]), logprobs, np.array([2]), np.array([-np.inf], np.float32))
        return Sample("x", np.array([1]), np.array([2]), np.array([True]), candidates)

    batch = pack([sample(5e-4)], 10)
    assert batch["candidate_ids"].tolist() == [[2, 2]] and batch["tail_logprobs"].exp().item() == pytest.approx(
        5e-4, rel=1e-3
    )
    with pytest.raises(KDError, match="beyond the student's vocabulary"):
        pack([sample(0.1)], 10)


def test_where_and_max_length_select(tiny_cache):
    cache = Cache(tiny_cache)
    everything = select([cache], "train")
    sampled = select([cache], "train", "origin = 'sampled'")
    assert len(sampled) == len(everything) // 2
    short = select([cache], "train", max_length=int(np.median(everything.tokens)))
    assert 0 < len(short) < len(everything) and short.too_long == len(everything) - len(short)
    with pytest.raises(KDError, match="nope"):
        select([cache], "train", "nope = 3")


def test_several_caches_are_one_stream(tiny_cache):
    one = select([Cache(tiny_cache)], "train")
    two = select([Cache(tiny_cache), Cache(tiny_cache)], "train")
    assert len(two) == 2 * len(one) and len(list(Stream(two, HEAD, 6))) == -(-len(two) // 6)


def test_long_samples_are_cut_at_the_completions_end_if_asked_for(tiny_cache):
    caches = open_caches([tiny_cache])
    whole = select(caches, "train")
    limit = int(np.median(whole.tokens))
    cut = select(caches, "train", max_length=limit, cut=True)
    dropped = select(caches, "train", max_length=limit)
    assert cut.too_long == dropped.too_long == int((whole.tokens > limit).sum()) and cut.tokens.max() == limit
    longest = int(np.argmax(whole.tokens))
    key = whole.load(np.array([longest]))[0]
    (same,) = [s for s in cut.load(np.arange(len(cut))) if s.sample_id == key.sample_id]
    assert same.tokens == limit < key.tokens
    batch, full = pack([same], HEAD), pack([key], HEAD)
    count = len(batch["tail_logprobs"])
    for name in ("candidate_ids", "candidate_logprobs", "tail_logprobs"):
        assert torch.equal(batch[name], full[name][:count])


def test_a_step_is_divided_evenly_by_tokens(units):
    tokens = units.tokens[:30]
    parts = divide(tokens, 4, np.ones((30, 2), bool))
    sizes = [tokens[part].sum() for part in parts]
    assert max(sizes) - min(sizes) <= tokens.max()
    assert sorted(np.concatenate(parts)) == list(range(30))


def test_a_sample_goes_to_a_rank_that_may_have_it(units):
    tokens, allowed = units.tokens[:30], np.arange(30)[:, None] % 2 == np.arange(2)[None]
    parts = divide(tokens, 4, allowed)
    assert all((part_of % 2 == number % 2).all() for number, part_of in enumerate(parts))
    for rank in (0, 1):
        sizes = [tokens[part].sum() for part in parts[rank::2]]
        assert max(sizes) - min(sizes) <= tokens.max()


def test_reading_ahead_passes_errors_on_and_stops_when_no_more_is_wanted():
    def numbers():
        yield from range(3)
        raise KDError("broken shard")

    ahead = read_ahead(numbers())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KDError, match="broken shard"):
        next(ahead)
    endless_ahead = read_ahead(itertools.count())
    assert list(itertools.islice(endless_ahead, 10)) == list(range(10))
    endless_ahead.close()
    assert not [t for t in threading.enumerate() if t.name == "kd-batches"]


def test_positions_without_candidates_pack_with_all_mass_in_the_tail():
    ids = np.array([5, 6], dtype=np.int32)
    candidates = Candidates(
        np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(2, np.int32), np.zeros(2, np.float32)
    )
    sample = Sample("x", ids, ids, np.ones(2, bool), candidates)
    batch = pack([sample], HEAD)
    assert batch["candidate_ids"].shape == (2, 1) and (batch["candidate_logprobs"] == -np.inf).all()
    assert (batch["tail_logprobs"] == 0).all()
