"""One YAML of recipes/ = one experiment: its steps as `kd` commands, a process each.

So the teacher's memory is gone before the student's is taken, and what a recipe does can be typed by hand. A step
whose ``makes`` file is there is skipped; every command continues where it was interrupted.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache import format
from kdcache.errors import KDError


def load(name: str) -> dict[str, Any]:
    import yaml

    path = Path(name) if name.endswith(".yaml") else format.resource_folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        raise KDError(f"no recipe {name!r}; there are: {', '.join(sorted(p.stem for p in path.parent.glob('*.yaml')))}")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def run(name: str, out: Path, note: Callable[[str], None]) -> None:
    """Run the steps of a recipe (a name in recipes/, or a .yaml file) in order, into ``out``; KDError names the step that failed."""
    recipe = load(name)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, step in enumerate(recipe["steps"], 1):
        text = step["run"].replace("{out}", shlex.quote(str(out)))
        command = shlex.split(text)
        note(f"\n[{number}/{len(recipe['steps'])}] {step['name']}\n$ {text}")
        makes = step.get("makes")
        if makes and Path(makes.replace("{out}", str(out))).exists():
            note("(done before)")
            continue
        if command[0] != "kd":
            raise KDError(f"recipe {name}, step {number}: expected a kd command, found {command[0]!r}")
        begun = time.monotonic()
        # cli.py by its path, so that a recipe runs from a checkout, from a wheel and from any folder.
        code = subprocess.run([sys.executable, "-m", "cli", *command[1:]], env=_environment()).returncode
        if code == 130 or code == -2:
            raise KeyboardInterrupt
        if code:
            raise KDError(
                f"step {number} of {len(recipe['steps'])} ({step['name']}) failed with exit code {code}; see above", 1
            )
        note(f"({time.monotonic() - begun:.0f} s)")
    note(f"\n{recipe['end'].replace('{out}', str(out)).strip()}\n\n({(time.monotonic() - started) / 60:.1f} minutes)")


def _environment() -> dict[str, str]:
    import cli  # where it is, the child must find it too

    folder = str(Path(cli.__file__).resolve().parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
