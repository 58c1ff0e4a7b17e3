"""The one place that loads models, tokenizers and configurations. Their own code runs only with --trust-remote-code.

A folder has code of its own if config.json or tokenizer_config.json holds an ``auto_map``. transformers would ask on
stdin whether to run it, and a script's input may well hold a "y"; so here it never asks.
tests/kdcache/models/test_models.py checks that nothing is loaded elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache import extras
from kdcache.errors import KDError, first_line
from kdcache.paths import TRUST, code_is_trusted


def trust_remote_code() -> None:
    """Let a model's own code run, in this process and in those that it starts."""
    os.environ[TRUST] = "1"


def config(folder: str | Path) -> Any:
    """Return the configuration of a model folder. KDError if it cannot be read."""
    from transformers import AutoConfig

    return _load(folder, "not a model that transformers can read", AutoConfig.from_pretrained)


def tokenizer(folder: str | Path, **options: Any) -> Any:
    """Return the tokenizer of a model folder. KDError if it cannot be loaded."""
    from transformers import AutoTokenizer

    return _load(folder, "its tokenizer could not be loaded", AutoTokenizer.from_pretrained, **options)


def causal_lm(folder: str | Path, **options: Any) -> Any:
    """Return the model of a folder, with its weights; ``options`` are transformers'. KDError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    return _load(folder, "the model could not be loaded", AutoModelForCausalLM.from_pretrained, **options)


def untrained(shape: Any, **options: Any) -> Any:
    """Return a model of this configuration with random weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(shape, trust_remote_code=code_is_trusted(), **options)


def with_adapter(student: Any, adapter: Path) -> Any:
    """Return the student with the LoRA adapter of a folder."""
    import peft

    return peft.PeftModel.from_pretrained(student, str(adapter))


def _load(folder: str | Path, failed: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(folder, trust_remote_code=code_is_trusted(), **options)
    except Exception as error:
        if isinstance(error, ImportError) and (package := extras.missing_package(error)):
            raise extras.missing(package) from None
        reason = first_line(error)
        if not code_is_trusted() and "trust_remote_code" in str(error):
            reason = (
                "it comes with Python code of its own, which runs with your rights and only under --trust-remote-code; "
                "read that code first"
            )
        raise KDError(f"{_name(str(folder))}: {failed}: {reason}") from None


def _name(folder: str) -> str:
    """Return the Hub id of a folder in the Hub's cache, or else the folder."""
    repository = re.search(r"models--([^/]+)/snapshots/", folder)
    return repository[1].replace("--", "/") if repository else folder
