"""Intervals from resampled problems: how wide they are, and that they are paired."""

import numpy as np
import pytest

from trainer.evaluate import bootstrap


def test_an_interval_narrows_with_more_problems_and_holds_the_mean():
    random = np.random.default_rng(0)
    widths = []
    for groups in (20, 2000):
        hits = random.integers(0, 2, (1, groups)).astype(float)
        sums = {"rougeL": hits, "rougeL_count": np.ones((1, groups))}
        low, high = bootstrap.interval(bootstrap.bootstrap(sums)["rougeL"])
        assert low <= hits.mean() <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5 and bootstrap.interval(np.array([np.nan])) is None


def test_a_handful_of_problems_has_no_interval():
    sums = {"rougeL": np.random.default_rng(0).random((2, 4)), "rougeL_count": np.ones((2, 4))}
    assert bootstrap.interval(bootstrap.bootstrap(sums)["rougeL"]) is None
    more = {name: np.concatenate([values, values], axis=1) for name, values in sums.items()}
    assert bootstrap.interval(bootstrap.bootstrap(more)["rougeL"]) is not None


def test_intervals_are_paired_so_that_equal_models_differ_by_nothing():
    hits = np.random.default_rng(1).random((1, 50))
    sums = {"rougeL": hits, "rougeL_count": np.ones((1, 50))}
    one, other = bootstrap.bootstrap(sums)["rougeL"], bootstrap.bootstrap(sums)["rougeL"]
    assert bootstrap.interval(one - other) == (0, 0) and bootstrap.interval(one / other) == (1, 1)


def test_runs_of_a_kind_widen_the_interval():
    alike = np.full((2, 200), 0.5)
    apart = np.stack([np.full(200, 0.2), np.full(200, 0.8)])
    one, two = (bootstrap.bootstrap({"rougeL": s, "rougeL_count": np.ones_like(s)})["rougeL"] for s in (alike, apart))
    assert np.ptp(bootstrap.interval(one)) == pytest.approx(0) and np.ptp(bootstrap.interval(two)) > 0.3
