"""What docs/installation.md tells people to install can be installed."""

import re
import runpy
import subprocess
import sys

import pytest

from helpers import ROOT
from kdcache.extras import EXTRAS

resolve = runpy.run_path(str(ROOT / "requirements" / "resolve.py"))


@pytest.fixture(scope="module")
def lines():
    return resolve["install_lines"](resolve["PAGE"].read_text(encoding="utf-8"))


def test_the_install_lines_name_extras_that_there_are_and_the_clone(lines):
    named = {extra for line in lines for extras in re.findall(r"\[(.*?)\]", line) for extra in extras.split(",")}
    assert {"teacher", "teacher-cpu", "train", "report"} <= named <= set(EXTRAS) | {"all"}
    assert not any("kdcache" in line for line in lines)  # which is not on PyPI


def test_a_line_becomes_what_a_resolver_is_asked(lines):
    (line,) = (line for line in lines if "--torch-backend" in line)
    (wanted,), options = resolve["requirements"](line)
    assert wanted == f"kdcache[teacher-cpu,train,report] @ {ROOT.as_uri()}" and options == ["--torch-backend", "cpu"]


@pytest.mark.slow
def test_every_install_line_resolves_where_its_index_can_be_reached():
    script = [sys.executable, str(ROOT / "requirements" / "resolve.py")]
    said = subprocess.run(script, capture_output=True, text=True).stdout
    failed = re.findall(r"^NOT RESOLVED.*\n *(.*)", said, re.MULTILINE)
    assert "\nresolved" in f"\n{said}"
    assert [why for why in failed if not re.match(r"PyTorch's index could not be reached.*: \d+ packages", why)] == []
