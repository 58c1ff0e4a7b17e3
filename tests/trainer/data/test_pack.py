"""Packed samples cannot see each other, and a batch says which token each position predicts."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.cache.candidates import Candidates
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError
from trainer.data.pack import IGNORE, pack
from trainer.data.select import select
from trainer.data.stream import in_order
from trainer.distill.trainer import attach_loss

HEAD = 49152


@pytest.fixture(scope="module")
def selection(tiny_cache):
    return select([Cache(tiny_cache)], "train")


def test_labels_are_the_completion_and_shift_labels_the_next_token(selection):
    for batch in in_order(selection, HEAD, 4):
        ids, shifted = batch["input_ids"][0], batch["shift_labels"][0]
        supervised = shifted != IGNORE
        assert (shifted[supervised] == ids[1:][supervised[:-1]]).all()
        assert (
            (batch["labels"][0] != IGNORE).sum()
            == supervised.sum()
            == len(batch["tail_logprobs"])
            == len(batch["candidate_ids"])
        )
        starts = batch["offsets"][1:-1]
        assert (shifted[starts - 1] == IGNORE).all(), "the last token of a sample predicts nothing"


def test_end_of_turn_is_supervised(selection):
    batch = next(in_order(selection, HEAD, 8))
    assert (batch["shift_labels"] == 2).sum() >= 1


def test_a_packed_sample_gets_the_loss_it_gets_alone(selection, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    attach_loss(model, 0.5)
    samples = selection.load(np.arange(8))
    with torch.no_grad():
        together = model(**pack(samples, HEAD))
        alone = [model(**pack([s], HEAD)) for s in samples]
    for name in ("kl", "ce", "agreement", "tokens"):
        torch.testing.assert_close(together[name], sum(a[name] for a in alone), rtol=1e-5, atol=1e-4)


def test_the_test_of_packing_notices_a_sample_that_sees_its_neighbour(selection, tiny_model):
    """Show that the test above can fail: under offsets of one sample, the second sees the first."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    attach_loss(model, 0.5)
    batch = pack(selection.load(np.arange(2)), HEAD)
    with torch.no_grad():
        apart = model(**batch)["ce"]
        batch["offsets"] = batch["offsets"][[0, -1]]
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


def test_positions_without_candidates_pack_with_all_mass_in_the_tail():
    ids = np.array([5, 6], dtype=np.int32)
    candidates = Candidates(
        np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(2, np.int32), np.zeros(2, np.float32)
    )
    sample = Sample("x", ids, ids, np.ones(2, bool), candidates)
    batch = pack([sample], HEAD)
    assert batch["candidate_ids"].shape == (2, 1) and (batch["candidate_logprobs"] == -np.inf).all()
    assert (batch["tail_logprobs"] == 0).all()
