"""Renew cpu.lock and test.lock from the .in files: every version, with the hashes of its files.

    make lock

Locked versions stay unless an .in file requires others. To renew all versions, delete the locks first.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

#: torch and its dependencies come from the index of the user's choice, because a CPU build needs no CUDA libraries.
FROM_TORCHS_INDEX = re.compile(r"(torch|nvidia-.*|cuda-.*|triton|kdcache)$")


def main() -> None:
    cpu = compile_lock("cpu", [])
    write("cpu", cpu)
    test = compile_lock("test", ["--constraints", "cpu.lock"])
    write("test", {name: lines for name, lines in test.items() if cpu.get(name) != lines})


def compile_lock(name: str, more: list[str]) -> dict[str, list[str]]:
    """Compile an .in file with ``uv``; return the lines of each package, which may have one entry per Python version."""
    settings = ["--quiet", "--no-config", "--universal", "--python-version", "3.11", "--generate-hashes"]
    plain = ["--no-annotate", "--no-header", "--override", "override.txt", "--excludes", "excludes.txt"]
    output = HERE / f"{name}.lock.new"
    if (HERE / f"{name}.lock").is_file():  # its versions are preferred
        output.write_bytes((HERE / f"{name}.lock").read_bytes())
    command = [sys.executable, "-m", "uv", "pip", "compile", *settings, *plain, *more, f"{name}.in", "-o", output.name]
    subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.DEVNULL)
    packages: dict[str, list[str]] = {}
    package = ""
    for line in output.read_text(encoding="utf-8").splitlines():
        if not line.startswith((" ", "-e ")):
            package = re.split(r"[=\s;@\[]", line)[0]
        if line.startswith("-e ") or FROM_TORCHS_INDEX.match(package):
            continue
        packages.setdefault(package, []).append(line)
    output.unlink()
    return packages


def write(name: str, packages: dict[str, list[str]]) -> None:
    text = "".join(f"{line}\n" for package in sorted(packages) for line in packages[package])
    (HERE / f"{name}.lock").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
