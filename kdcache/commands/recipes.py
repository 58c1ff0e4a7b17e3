"""One YAML of recipes/ = one experiment: its steps as `kd` commands, a process each.

    kd run dolly-en-cpu --data-path dolly.jsonl --out data/dolly

So the teacher's memory is gone before the student's is taken, and what a recipe does can be typed by hand. A step
whose ``makes`` file is there is skipped; every command continues where it was interrupted. In a step, {out} is the
folder of the experiment, {data_path} the flag with the data set's place, if one was given; a step with ``for`` is done
for each value of its variable.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache import __main__ as kd
from kdcache.errors import KDError
from kdcache.paths import resource_folder
from kdcache.storage import folders


@dataclass(frozen=True)
class Step:
    name: str
    command: str  # as it would be typed
    makes: Path | None  # that it is done

    @property
    def arguments(self) -> list[str]:
        """What follows `kd`."""
        return shlex.split(self.command)[1:]


def names() -> list[str]:
    return sorted(path.stem for path in resource_folder("recipes").glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    """A recipe by its name in recipes/, or from a .yaml file; KDError if it is none."""
    import yaml

    path = Path(name) if name.endswith(".yaml") else resource_folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise KDError(f"no recipe {name!r}; there are: {', '.join(names())}; or name a .yaml file", 2)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise KDError(f"{path}: not YAML: {' '.join(str(error).split())}", 2) from None
    for number, step in enumerate((isinstance(recipe, dict) and recipe.get("steps")) or [{}], 1):
        if not isinstance(step, dict) or not {"name", "run"} <= step.keys():
            raise KDError(f"{path}: step {number} needs `name` and `run`", 2)
        if step["run"].split()[0] != "kd":
            raise KDError(f"{path}: step {number} ({step['name']}): expected a kd command, found {step['run']!r}", 2)
        if unknown := step.keys() - {"name", "run", "makes", "for"}:
            raise KDError(f"{path}: step {number} ({step['name']}): unknown key {sorted(unknown)[0]!r}", 2)
    return recipe


def steps(recipe: dict[str, Any], out: Path, data_path: Path | None = None) -> list[Step]:
    """The commands of a recipe, in order, with everything filled in."""
    found = []
    for step in recipe["steps"]:
        variables: list[dict[str, Any]] = [{}]
        for name, values in step.get("for", {}).items():
            variables = [known | {name: value} for known in variables for value in values]
        for known in variables:

            def filled(text: str, folder: str, known: dict[str, Any] = known) -> str:
                for name, value in known.items():
                    text = text.replace(f"{{{name}}}", str(value))
                flag = f"--data-path {shlex.quote(str(data_path))}" if data_path is not None else ""
                return " ".join(text.replace("{out}", folder).replace("{data_path}", flag).split())

            makes = step.get("makes")
            found.append(
                Step(
                    filled(step["name"], str(out)),
                    filled(step["run"], shlex.quote(str(out))),
                    Path(os.path.expanduser(filled(makes, str(out)))) if makes else None,
                )
            )
    return found


def run(name: str, out: Path, note: Callable[[str], None], data_path: Path | None = None) -> None:
    """Run a recipe's steps in order, into ``out``; KDError names the step that failed."""
    recipe = load(name)
    folders.check_place(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    todo = steps(recipe, out, data_path)
    for number, step in enumerate(todo, 1):
        note(f"\n[{number}/{len(todo)}] {step.name}\n$ {step.command}")
        if step.makes is not None and step.makes.exists():
            note("(done before)")
            continue
        begun = time.monotonic()
        # By its path, so that a recipe runs from a checkout, from a wheel and from a folder that holds a cli.py of its own.
        code = subprocess.run([sys.executable, "-P", kd.__file__, *step.arguments]).returncode
        if code == 130 or code == -2:
            raise KeyboardInterrupt
        if code:
            raise KDError(
                f"step {number} of {len(todo)} ({step.name}) failed with exit code {code}; see above. The same command "
                "continues there",
                1,
            )
        note(f"({time.monotonic() - begun:.0f} s)")
    end = recipe.get("end", "").replace("{out}", str(out)).strip()
    note(f"\n{end}\n\n({(time.monotonic() - started) / 60:.1f} minutes)".replace("\n\n\n", "\n"))
