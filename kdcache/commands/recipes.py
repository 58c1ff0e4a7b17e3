"""One YAML of recipes/ is one experiment: its steps are `kd` commands, and each runs in a process of its own.

    kd run dolly-en --size cpu --data-path dolly.jsonl --out data/dolly

So the teacher's memory is free before the student needs any, and every step of a recipe can be typed by hand. A step
whose ``makes`` file exists is skipped; every command resumes where it was interrupted.

What is replaced in the texts of a step:

* {out}: the folder of the experiment; {data_path}: the option with the place of the data set, if one was given;
* {NAME}: a variable of the chosen size. ``sizes`` in a recipe hold the same variables for each size; the first size is
  the default. A step with ``only`` belongs to one size;
* {NAME}: a variable of the step's ``for``, which repeats the step for each value. The values are a list, or the name of
  a variable of the size that holds one.
"""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache import __main__ as kd
from kdcache.errors import KDError, UsageError
from kdcache.paths import resource_folder
from kdcache.storage import folders


@dataclass(frozen=True)
class StepTemplate:
    """A step as the YAML file has it, with variables in braces."""

    name: str
    run: str
    makes: str | None = None
    loops: dict[str, Any] = field(default_factory=dict)  # variable -> its values, or a size's variable that holds them
    only: str | None = None  # the size that the step belongs to; None: all


@dataclass(frozen=True)
class Recipe:
    """An experiment as its YAML file has it."""

    name: str
    steps: list[StepTemplate]
    sizes: dict[str, dict[str, Any]]  # size -> its variables; empty if the recipe has one size only
    end: str = ""  # shown when all steps have run


@dataclass(frozen=True)
class RecipeStep:
    """A step to run."""

    name: str
    command: str  # as it would be typed
    makes: Path | None  # exists once the step has run

    @property
    def arguments(self) -> list[str]:
        """What follows `kd`."""
        return shlex.split(self.command)[1:]


def names() -> list[str]:
    """Return the names of the recipes that come with this program."""
    return sorted(path.stem for path in resource_folder("recipes").glob("*.yaml"))


def load(name: str) -> Recipe:
    """Read a recipe by its name in recipes/, or from a .yaml file; UsageError if there is none or it is not valid."""
    import yaml

    path = Path(name) if name.endswith(".yaml") else resource_folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(f"no recipe {name!r}; {_way_out(name)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    content = content if isinstance(content, dict) else {}
    sizes = _sizes(content.get("sizes") or {}, path)
    steps = [_step(step, number, sizes, path) for number, step in enumerate(content.get("steps") or [{}], 1)]
    return Recipe(path.stem, steps, sizes, content.get("end", ""))


def _way_out(name: str) -> str:
    """What to type instead of the name of a recipe that does not exist."""
    base, _, size = name.rpartition("-")
    if base in names():
        return f"type: kd run {base} --size {size}" if size in load(base).sizes else f"type: kd run {base}"
    return f"there are: {', '.join(names())}; or name a .yaml file"


def _sizes(sizes: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(sizes, dict) or not all(isinstance(variables, dict) for variables in sizes.values()):
        raise UsageError(f"{path}: `sizes` needs the variables of each size")
    if len({frozenset(variables) for variables in sizes.values()}) > 1:
        raise UsageError(f"{path}: the sizes {', '.join(sizes)} do not have the same variables")
    return sizes


def _step(step: Any, number: int, sizes: dict[str, dict[str, Any]], path: Path) -> StepTemplate:
    if not isinstance(step, dict) or not {"name", "run"} <= step.keys():
        raise UsageError(f"{path}: step {number} needs `name` and `run`")
    where = f"{path}: step {number} ({step['name']})"
    if step["run"].split()[0] != "kd":
        raise UsageError(f"{where}: expected a kd command, found {step['run']!r}")
    if unknown := step.keys() - {"name", "run", "makes", "for", "only"}:
        raise UsageError(f"{where}: unknown key {sorted(unknown)[0]!r}")
    if step.get("only") is not None and step["only"] not in sizes:
        raise UsageError(f"{where}: there is no size {step['only']!r}; the sizes are: {', '.join(sizes) or 'none'}")
    for variable, values in step.get("for", {}).items():
        if isinstance(values, str) and any(
            not isinstance(of_size.get(values), list) for of_size in sizes.values() or [{}]
        ):
            raise UsageError(f"{where}: the values of {variable!r} are {values!r}, which is no list of each size")
    return StepTemplate(step["name"], step["run"], step.get("makes"), step.get("for", {}), step.get("only"))


def size_of(recipe: Recipe, size: str | None) -> str | None:
    """Return the size to run: the one that was asked for, or the recipe's first; None if the recipe has no sizes."""
    if size is not None and size not in recipe.sizes:
        raise UsageError(f"--size {size}: the sizes of {recipe.name} are: {', '.join(recipe.sizes) or 'none'}")
    return size or next(iter(recipe.sizes), None)


def default_folder(recipe: Recipe, size: str | None) -> Path:
    """Return data/RECIPE, or data/RECIPE-SIZE for a size that is not the recipe's first."""
    chosen = size_of(recipe, size)
    return Path("data") / (recipe.name if chosen == size_of(recipe, None) else f"{recipe.name}-{chosen}")


def steps(recipe: Recipe, out: Path, data_path: Path | None = None, size: str | None = None) -> list[RecipeStep]:
    """Return the steps of a recipe in one of its sizes (default: the first), in order, with all variables replaced."""
    chosen = size_of(recipe, size)
    of_size = recipe.sizes[chosen] if chosen is not None else {}
    data_option = f"--data-path {shlex.quote(str(data_path))}" if data_path is not None else ""

    def fill(text: str, variables: dict[str, Any], folder: str) -> str:
        for name, value in (of_size | variables).items():  # first, for their texts may hold {out}
            text = text.replace(f"{{{name}}}", str(value))
        return " ".join(text.replace("{out}", folder).replace("{data_path}", data_option).split())

    result = []
    for step in recipe.steps:
        if step.only not in (None, chosen):
            continue
        lists = [of_size[values] if isinstance(values, str) else values for values in step.loops.values()]
        for combination in itertools.product(*lists):
            variables = dict(zip(step.loops, combination))
            name, command = fill(step.name, variables, str(out)), fill(step.run, variables, shlex.quote(str(out)))
            makes = Path(os.path.expanduser(fill(step.makes, variables, str(out)))) if step.makes else None
            result.append(RecipeStep(name, command, makes))
    return result


def run(
    name: str, out: Path | None, note: Callable[[str], None], data_path: Path | None = None, size: str | None = None
) -> None:
    """Run a recipe's steps in order, into ``out`` (default: ``default_folder``); KDError names the step that failed."""
    recipe = load(name)
    out = out or default_folder(recipe, size)
    all_steps = steps(recipe, out, data_path, size)
    folders.check_place(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    start_seconds = time.monotonic()
    for number, step in enumerate(all_steps, 1):
        note(f"\n[{number}/{len(all_steps)}] {step.name}\n$ {step.command}")
        if step.makes is not None and step.makes.exists():
            note("(done before)")
            continue
        step_start_seconds = time.monotonic()
        # By its path, so that a recipe runs from a checkout, from a wheel and from a folder that holds another cli.py.
        code = subprocess.run([sys.executable, "-P", kd.__file__, *step.arguments]).returncode
        if code == 130 or code == -2:
            raise KeyboardInterrupt
        if code:
            raise KDError(
                f"step {number} of {len(all_steps)} ({step.name}) failed with exit code {code}; see above. The same "
                "command resumes there",
                1,
            )
        note(f"({time.monotonic() - step_start_seconds:.0f} s)")
    end = recipe.end.replace("{out}", str(out)).strip()
    note(f"\n{end}\n\n({(time.monotonic() - start_seconds) / 60:.1f} minutes)".replace("\n\n\n", "\n"))
