"""Which extra of pyproject.toml installs which package, so that an error can name the extra that is missing."""

from __future__ import annotations

import importlib.util
import re

from kdcache.errors import KDError

#: Packages by extra, under their import names. tests/kdcache/test_extras.py compares this with pyproject.toml.
EXTRAS = {
    "teacher": ("vllm", "transformers", "datasets", "gguf"),
    "teacher-cpu": ("vllm", "transformers", "datasets", "gguf"),
    "train": (
        *("torch", "transformers", "accelerate", "datasets", "trl", "peft", "bitsandbytes", "auto_round"),
        *("compressed_tensors", "safetensors", "rouge_score", "tensorboard", "gguf"),
    ),
    "ray": ("ray",),
    "report": ("matplotlib", "jinja2"),
    "remote": ("fsspec", "s3fs"),
    "hub": ("huggingface_hub",),
}

_PURPOSE = {"teacher": "phase one", "teacher-cpu": "phase one without a GPU", "train": "phase two"}


def missing(package: str) -> KDError:
    """Return the error for a package that could not be imported, which says what to install."""
    extras = [extra for extra, packages in EXTRAS.items() if package in packages]
    if not extras:
        return KDError(f"{package} is not installed: pip install {package}")
    commands = [
        f"pip install 'kdcache[{extra}]'" + (f" ({_PURPOSE[extra]})" if len(extras) > 1 else "") for extra in extras
    ]
    *most, last = commands
    sentence = f"{', '.join(most)} or {last}" if most else last
    advice = "; docs/installation.md says what to add for PyTorch's CPU build" if "teacher-cpu" in extras else ""
    return KDError(f"{package} is not installed: {sentence}{advice}")


def missing_package(error: ImportError) -> str | None:
    """Return the missing package that an error is about: one that was not found, or one of EXTRAS that it mentions."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return error.name.partition(".")[0]
    if isinstance(error.__cause__, ImportError):  # from a library that imports lazily
        return missing_package(error.__cause__)
    words = re.findall(r"[a-z][a-z0-9_]+", str(error).lower().replace("-", "_"))
    optional = {package for packages in EXTRAS.values() for package in packages}
    return next((word for word in words if word in optional and importlib.util.find_spec(word) is None), None)
