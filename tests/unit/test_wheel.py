"""The wheel carries sql/, recipes/ and pages, and works from an empty place."""

import os
import subprocess
import sys
import zipfile

from conftest import ROOT

from kdcache import recipe


def test_the_wheel_installed_elsewhere_runs_kd_sql(tmp_path, tiny_cache):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True)
    (built,) = (tmp_path / "dist").glob("kdcache-*.whl")
    names = zipfile.ZipFile(built).namelist()
    carried = {"cli.py", "kdcache/sql/samples.sql", "kdcache/recipes/demo.yaml", "kdcache/examples/builtin.jsonl"}
    carried |= {
        f"trainer/pages/{page}"
        for page in ("base.css", "view.html", "view.css", "view.js", "report.html", "report.css")
    }
    assert carried <= set(names)
    assert not any(name.startswith(("tests/", "data/", "sql/")) for name in names)
    install = [*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(built)]
    subprocess.run(install, check=True, capture_output=True)
    program = "import cli, kdcache, sys; assert kdcache.__file__.startswith(sys.argv.pop(1)); cli.main()"
    query = ["sql", str(tiny_cache), "SELECT count(*) AS n FROM samples", "--csv"]
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site"), *query],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "n\n78\n", done.stderr


def test_every_recipe_is_made_of_kd_commands():
    demo = recipe.load("demo")
    assert all(step["run"].startswith("kd ") for step in demo["steps"]) and "{out}" in demo["end"]
