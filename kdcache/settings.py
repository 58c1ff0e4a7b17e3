"""Configuration fields that are command-line options too: default, limits and help text in one place, without click.

    @dataclass(frozen=True)
    class Config:
        out: Path = option(Path("data/x"), "Folder of the result.")

``kdcache.commands.options`` makes the click options from these fields. Modules that declare them are imported by
``kd --help`` and must stay light: a type that is slow to import is imported under ``TYPE_CHECKING`` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: The default of an option that has none.
REQUIRED = dataclasses.MISSING

#: A name (of a model, of a data set) or a path. The command line expands ~ in it.
NameOrPath = str


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line."""

    help: str
    flag: str | None = None  # None: the field's name, with dashes
    low: float | None = None  # least allowed number
    below: float | None = None  # numbers must be below this
    choices: tuple[str, ...] = ()  # allowed texts; empty: all
    metavar: str | None = None  # how --help names the value
    parse: Callable[[str], Any] | None = None  # text to value, for types of our own; raises UsageError

    def name(self, field: dataclasses.Field[Any]) -> str:
        """Return the name under which ``--config`` and click know the option: the flag, with underscores."""
        return self.flag.removeprefix("--").replace("-", "_") if self.flag else field.name


def option(
    default: Any,
    text: str,
    *,
    flag: str | None = None,
    low: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Return a dataclass field that is an option: its default, its help text, and the other fields of ``Option``."""
    return dataclasses.field(
        default=default, metadata={"option": Option(text, flag, low, below, choices, metavar, parse)}
    )


def option_of(field: dataclasses.Field[Any]) -> Option | None:
    """Return how a field appears on the command line; None for a field that does not."""
    return field.metadata.get("option")


# --- help texts that several configurations share ---------------------------------------------------------------------

FROM_CACHE_HELP = "A cache: a folder, or s3://bucket/folder. Repeat it for several caches of one tokenizer."
WHERE_HELP = "SQL condition on the samples, as in \"origin = 'sampled' AND language = 'es'\"."
MAX_LENGTH_HELP = "Drop and count samples with more tokens than this, prompt and completion together."
UNSAFE_EXEC_HELP = (
    "Run the programs in answers without a sandbox, where bubblewrap is not available. They can do whatever you can."
)

#: How weights are loaded for training and evaluation.
DTYPES = ("float32", "bfloat16", "float16")
