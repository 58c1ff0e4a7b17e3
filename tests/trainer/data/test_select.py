"""Samples are selected by split, SQL condition and length, from one cache or several."""

import numpy as np
import pytest
import torch

from kdcache.cache.reader import Cache
from kdcache.errors import KDError
from trainer.data.pack import pack
from trainer.data.select import open_caches, select
from trainer.data.stream import Stream

HEAD = 49152


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
    single = select([Cache(tiny_cache)], "train")
    double = select([Cache(tiny_cache), Cache(tiny_cache)], "train")
    assert len(double) == 2 * len(single) and len(list(Stream(double, HEAD, 6))) == -(-len(double) // 6)


def test_long_samples_are_cut_at_the_end_of_the_completion_with_cut(tiny_cache):
    caches = open_caches([tiny_cache])
    everything = select(caches, "train")
    limit = int(np.median(everything.tokens))
    cut = select(caches, "train", max_length=limit, cut=True)
    dropped = select(caches, "train", max_length=limit)
    assert cut.too_long == dropped.too_long == int((everything.tokens > limit).sum()) and cut.tokens.max() == limit
    longest = int(np.argmax(everything.tokens))
    long_sample = everything.load(np.array([longest]))[0]
    (cut_sample,) = [s for s in cut.load(np.arange(len(cut))) if s.sample_id == long_sample.sample_id]
    assert cut_sample.tokens == limit < long_sample.tokens
    batch, full = pack([cut_sample], HEAD), pack([long_sample], HEAD)
    count = len(batch["tail_logprobs"])
    for name in ("candidate_ids", "candidate_logprobs", "tail_logprobs"):
        assert torch.equal(batch[name], full[name][:count])
