"""The codebook, the encodings in real footers, splits and fingerprints."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cache.format import CODEBOOK, differing_fields, round_logprobs, split_of
from kdcache.hashing import request_seed


def test_the_codebook_has_256_values_even_in_the_square_root():
    roots = np.sqrt(-CODEBOOK.astype(np.float64))
    assert len(np.unique(CODEBOOK)) == 256
    assert CODEBOOK[0] == 0 and CODEBOOK[-1] == pytest.approx(-24)
    assert np.diff(roots) == pytest.approx(np.sqrt(24) / 255, rel=1e-4)


@given(st.lists(st.floats(-24, 0, width=32), min_size=1, max_size=50))
def test_a_rounded_probability_is_within_two_percent_of_the_root(values):
    logprobs = np.array(values, dtype=np.float32)
    error = np.abs(np.exp(round_logprobs(logprobs) - logprobs) - 1)
    assert (error <= 0.02 * np.sqrt(-logprobs) + 1e-4).all()


def test_rounding_twice_changes_nothing():
    assert np.array_equal(round_logprobs(CODEBOOK), CODEBOOK)


def test_log_probabilities_below_the_codebook_become_its_last_value():
    assert (round_logprobs(np.array([-np.inf, -80.0], dtype=np.float32)) == CODEBOOK[-1]).all()


def test_the_footers_name_the_encodings(tiny_cache):
    footer = pq.ParquetFile(next((tiny_cache / "data").glob("train-*"))).metadata
    columns = {
        footer.row_group(0).column(i).path_in_schema: footer.row_group(0).column(i) for i in range(footer.num_columns)
    }
    ids = columns["candidate_ids.list.element.list.element"]
    logprobs = columns["candidate_logprobs.list.element.list.element"]
    assert "BYTE_STREAM_SPLIT" in ids.encodings and not ids.has_dictionary_page
    assert "RLE_DICTIONARY" in logprobs.encodings and logprobs.has_dictionary_page
    for name in ("token_logprobs", "tail_logprobs", "entropies"):
        assert "BYTE_STREAM_SPLIT" in columns[f"{name}.list.element"].encodings
    assert {c.compression for c in columns.values()} == {"ZSTD"}


def test_splits_follow_the_ratios_and_the_group_alone():
    ratios = (0.8, 0.15, 0.05)
    splits = [split_of(f"problem {i}", ratios, 7) for i in range(4000)]
    assert splits == [split_of(f"problem {i}", ratios, 7) for i in range(4000)]
    assert np.mean([s == "train" for s in splits]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([s == "test" for s in splits]) == pytest.approx(0.05, abs=0.02)


def test_a_share_of_zero_gets_nothing():
    assert {split_of(str(i), (0.5, 0.0, 0.5), 0) for i in range(200)} == {"train", "test"}
    assert {split_of(str(i), (1.0, 0.0, 0.0), 0) for i in range(200)} == {"train"}


def test_differing_fields_are_named_with_both_values():
    assert differing_fields({"a": 1, "b": [2]}, {"a": 1, "b": [3], "c": "x"}) == [
        "b: [2] -> [3]",
        'c: null -> "x"',
    ]


def test_request_seeds_differ_by_sample_and_fit_every_engine():
    seeds = {request_seed(0, f"s:{i}", 0) for i in range(1000)}
    assert len(seeds) == 1000 and max(seeds) < 2**31
