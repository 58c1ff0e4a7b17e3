"""Batches that are made ahead in a thread."""

import itertools
import threading

import pytest

from kdcache.errors import KDError
from trainer.data.read_ahead import read_ahead


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
