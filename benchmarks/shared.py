"""What several benchmarks need: the machine's name, versions, a ratio with its interval, a peak. Not one to run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def machine() -> str:
    """``2 cores, AMD EPYC``."""
    model = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    return f"{os.cpu_count()} cores, {model}"


def hardware() -> str:
    """``2-core-epyc``: the machine in a file name."""
    names = re.findall(r"epyc|ryzen|xeon|apple|graviton|core", machine().partition(",")[2].lower())
    return f"{os.cpu_count()}-core-{names[0] if names else platform.machine()}"


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[package] = "checkout"
    return found


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The bootstrap 95% interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def ratio(ratios: list[float]) -> dict[str, Any]:
    """The median over rounds, and its interval."""
    return {"median": round(statistics.median(ratios), 4), "interval": [round(x, 4) for x in interval(ratios)]}


def peak_bytes(command: Sequence[object], **options: Any) -> int:
    """Peak resident memory of a process, by the operating system's account."""
    words = [*map(str, command)]
    process = subprocess.Popen(words, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
