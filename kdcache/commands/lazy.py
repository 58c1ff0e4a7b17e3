"""A click group that imports a command when it is used."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click


class LazyGroup(click.Group):
    """A group with commands by name, each as "module:attribute"."""

    def __init__(self, name: str | None = None, *, table: Mapping[str, str], **options: Any):
        super().__init__(name, _Commands(table), **options)


class _Commands(UserDict[str, Any]):
    """The commands as click reads them: names need no import; reading a command imports its module."""

    def __getitem__(self, name: str) -> click.Command:
        command = super().__getitem__(name)
        if isinstance(command, str):
            module, _, attribute = command.partition(":")
            command = self[name] = getattr(import_module(module), attribute)
        return command
