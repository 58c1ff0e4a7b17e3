"""How long work reports its progress: one type for all commands, which ``kdcache.commands.console`` shows as a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How much of a piece of work is finished."""

    done: int
    total: int
    unit: str  # what is counted, in the plural: samples, shards, answers
    note: str = ""  # what else the user should see, such as the speed
    seconds_left: float | None = None  # None where nobody has estimated it


ShowProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Show nothing: the default of everything that takes a ``ShowProgress``."""
