"""A view of the tiny cache, for the tests of lists, samples and the server."""

from __future__ import annotations

import contextlib

import pytest

from kdcache.view.samples import View


@pytest.fixture
def viewed(tiny_cache):
    with contextlib.closing(View(tiny_cache)) as view:
        yield view
