"""The wheel carries sql/, recipes/ and pages, works from an empty place, and its page has links that lead somewhere."""

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes

import pytest

from helpers import ROOT
from kdcache.commands import recipes as recipe

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
REPOSITORY = "https://example.org/kdcache"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"KDCACHE_REPOSITORY": REPOSITORY})
    (built,) = folder.glob("kdcache-*.whl")
    return built


def test_the_wheel_installed_elsewhere_runs_kd_sql(wheel, tmp_path, tiny_cache):
    names = zipfile.ZipFile(wheel).namelist()
    carried = {
        "cli.py",
        "kdcache/sql/samples.sql",
        "kdcache/recipes/demo.yaml",
        "kdcache/examples/data_sets/builtin.jsonl",
    }
    carried |= {f"kdcache/view/page/{page}" for page in ("base.css", "view.html", "view.css", "view.js", "token.js")}
    carried |= {f"trainer/report/page/{page}" for page in ("report.html", "report.css")}
    assert carried <= set(names)
    assert not any(name.startswith(("tests/", "data/", "sql/")) for name in names)
    install = [*PIP, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    program = "import kdcache.__main__ as kd, sys; assert kd.__file__.startswith(sys.argv.pop(1)); kd.main()"
    query = ["sql", str(tiny_cache), "SELECT count(*) AS n FROM samples", "--csv"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site"), *query],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "n\n78\n", done.stderr


@pytest.fixture(scope="module")
def page(wheel):
    """What PyPI would be told."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


def test_every_link_of_the_page_is_absolute_or_on_it(page):
    links = re.findall(r"\]\(([^)]+)\)", page.get_payload(decode=True).decode())
    assert links and all(link.startswith(("https://", "#")) for link in links)


def test_the_page_says_who_made_it_for_what_and_where_it_is(page):
    said = {
        name for name in ("Author", "License-Expression", "Project-URL", "Classifier", "Requires-Python") if page[name]
    }
    assert len(said) == 5 and REPOSITORY in page["Project-URL"]


def test_every_recipe_is_made_of_kd_commands():
    demo = recipe.load("demo")
    assert all(step.run.startswith("kd ") for step in demo.steps) and "{out}" in demo.end
