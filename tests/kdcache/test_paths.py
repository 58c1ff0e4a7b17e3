"""KDCACHE_* variables: each has a function with a default, and is read nowhere else."""

import re
from pathlib import Path

import pytest

from helpers import ROOT
from kdcache import paths
from kdcache.errors import UsageError


def test_a_variable_changes_what_its_function_returns(monkeypatch):
    monkeypatch.setenv("KDCACHE_HOME", "~/kd")
    assert paths.home() == Path.home() / "kd" and paths.disk_cache_folder() == Path.home() / "kd/remote"
    monkeypatch.setenv("KDCACHE_DISK_CACHE", "/scratch")
    monkeypatch.setenv("KDCACHE_DISK_CACHE_GB", "0.5")
    monkeypatch.setenv("KDCACHE_REMOTE_TIMEOUT", "3")
    assert paths.disk_cache_folder() == Path("/scratch")
    assert (paths.disk_cache_limit_bytes(), paths.remote_timeout_seconds()) == (500_000_000, 3.0)


def test_a_variable_that_is_no_number_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("KDCACHE_REMOTE_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="KDCACHE_REMOTE_TIMEOUT=soon: expected a number"):
        paths.remote_timeout_seconds()


def test_only_paths_reads_the_variables():
    reads = re.compile(r"(environ|getenv)[^\n]*KDCACHE_")
    files = [ROOT / "cli.py", *(ROOT / "kdcache").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]
    assert [file for file in files if reads.search(file.read_text()) and file.name != "paths.py"] == []
