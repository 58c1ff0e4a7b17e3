"""What something was made or measured on: the processor's name, versions of what decides its numbers, peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

PACKAGES = (
    *("kdcache", "torch", "transformers", "trl", "peft", "accelerate"),
    *("bitsandbytes", "compressed-tensors", "auto-round", "pyarrow", "duckdb"),
)


def cpu() -> str:
    """``2 cores, AMD EPYC``."""
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{os.cpu_count()} cores, {name}"


def device() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def versions(*packages: str) -> dict[str, str]:
    """Python's, and those of ``packages`` (default: PACKAGES) that are installed."""
    found = {"python": platform.python_version()}
    for package in packages or PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_resident_bytes() -> int:
    """Of this process, Python and libraries included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's peak would be the parent's, where that was larger as it started this process
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource  # POSIX alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
