"""Warnings of libraries reach the user, except those that are listed by name."""

import logging
import subprocess
import sys
import warnings

import pytest

from helpers import ROOT
from kdcache import quiet


def stderr_of(code: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", f"from kdcache import quiet; quiet.libraries()\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return process.stderr


def test_a_warning_that_is_not_listed_is_shown():
    code = (
        "import warnings, logging; warnings.warn_explicit('The NVIDIA driver on your system is too old', UserWarning, "
        "'torch/cuda/__init__.py', 1, 'torch.cuda'); warnings.warn('soon gone', FutureWarning); "
        "logging.getLogger('transformers.trainer').warning('something new')"
    )
    stderr = stderr_of(code)
    assert "driver on your system is too old" in stderr and "soon gone" in stderr and "something new" in stderr


@pytest.mark.parametrize("category, beginning, reason", quiet.WARNINGS, ids=lambda x: str(x)[:30])
def test_a_listed_warning_is_hidden(category, beginning, reason):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet.libraries()
        warnings.warn(f"{beginning} and so on", category, stacklevel=1)
        warnings.warn(f"other: {beginning}", category, stacklevel=1)
    assert [str(w.message) for w in shown] == [f"other: {beginning}"] and reason


@pytest.mark.parametrize("logger, beginning, reason", quiet.LOGGED, ids=lambda x: str(x)[:30])
def test_a_listed_line_of_a_log_is_hidden(logger, beginning, reason):
    quiet.libraries()
    hides = [
        not logging.getLogger(logger).filter(logging.LogRecord(logger, 30, "", 1, text, None, None))
        for text in (f"{beginning} and so on", f"other: {beginning}")
    ]
    assert hides == [True, False] and reason
