"""A click group whose commands are imported when they are asked for."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """Commands by name, each as "module:attribute"."""

    def __init__(self, name: str | None = None, *, table: Mapping[str, str], **options: Any):
        super().__init__(name, _Commands(table), **options)


class _Commands(UserDict[str, Any]):
    """As click asks for them: names without an import, and a command with its module's."""

    def __getitem__(self, name: str) -> click.Command:
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, attribute = found.partition(":")
            found = self[name] = getattr(import_module(module), attribute)
        return found
