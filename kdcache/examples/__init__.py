"""Where prompts come from: one short file a data set, all yielding ``Example``.

``load`` picks by name: ``builtin``, a .jsonl or .parquet file, or a Hub data set id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import KDError, UsageError


@dataclass(frozen=True)
class Example:
    """A prompt as chat messages, and the answer given to it, if any. Everything phase two may ask for is here."""

    source: str
    row_id: str
    messages: tuple[dict[str, Any], ...]  # all before the last assistant turn
    completion: str | None = None
    group_id: str | None = None  # the problem; default: a hash of the prompt
    reference: str | None = None
    task: str | None = None
    language: str | None = None
    verifier: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot become an example, with the reason; it is counted and listed, never dropped in silence."""

    source: str
    row_id: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """How a table's columns are called, and the system prompt to put in front."""

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None


def load(name: str, columns: Columns, limit: int | None = None) -> list[Example | BadRow]:
    """All examples of ``name`` in order, at most ``limit``. KDError if there are none."""
    from kdcache.examples import builtin, table

    rows: Iterator[Example | BadRow]
    if name == "builtin":
        rows = builtin.read(columns.system)
    elif Path(name).suffix.lower() in table.READERS or Path(name).exists():
        rows = table.read_file(Path(name), columns)
    elif name.count("/") <= 1 and not name.startswith((".", "/")):
        rows = table.read_hub(name, columns)
    else:
        raise UsageError(f"--examples {name}: no such file; expected builtin, a .jsonl or .parquet file, or a Hub id")
    examples: list[Example | BadRow] = []
    for row in rows:
        if limit is not None and len(examples) >= limit:
            break
        examples.append(row)
    if not examples:
        raise KDError(f"--examples {name}: there are no rows in it")
    return examples
