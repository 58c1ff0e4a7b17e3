"""`kd` runs its own program, whatever lies in the folder where it is started or on the path."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from kdcache import __main__ as entry
from kdcache.commands import recipes as recipe

FOREIGN = "print('a stranger ran')\nraise SystemExit(0)\n"


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """A folder with modules of the user's own, under names that this program uses too."""
    for name in ("cli.py", "trainer.py"):
        (tmp_path / name).write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_runs_this_program_beside_a_cli_of_the_users_own(strangers, tiny_cache, capfd):
    (strangers / "mine.yaml").write_text(f"steps: [{{name: look, run: kd cache info {tiny_cache} --json}}]\n")
    recipe.run("mine.yaml", strangers / "out", lambda _: None)
    assert '"samples": 78' in capfd.readouterr().out


@pytest.mark.parametrize("name", ["cli", "trainer"])
def test_another_module_of_that_name_on_the_path_is_named(name, strangers):
    (strangers / ({"cli": "trainer", "trainer": "cli"}[name] + ".py")).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "kdcache", "--version"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # the folder that one is in comes first
        capture_output=True,
        text=True,
    )
    said = f"Error: `import {name}` finds {strangers}/{name}.py instead of kdcache's own"
    assert (done.returncode, done.stdout, done.stderr[: len(said)]) == (1, "", said)


@pytest.mark.parametrize("file", ["cli.py", "trainer/__init__.py"])
def test_a_package_that_was_installed_over_ours_is_named(file, tmp_path, monkeypatch):
    name = file.partition("/")[0].removesuffix(".py")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("from trainer.trainer import *\n")
    monkeypatch.setattr(entry, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert f"{tmp_path / file} was written by another package" in (entry.import_problem(name) or "")


def test_nothing_stands_in_the_way_here():
    assert [entry.import_problem(name) for name in ("cli", "trainer")] == [None, None]
