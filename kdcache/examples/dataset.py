"""What the files of data_sets/ share. Each says where its rows are and how a row becomes a ``Draft``; the rest is here.

Every row becomes an example or a BadRow with a reason. Columns are checked once, in the first row: a data set in
another layout ends the run with an error that names the expected and the present columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import KDError, UsageError
from kdcache.examples import files, templates
from kdcache.examples.types import BadRow, Example


class Rejected(ValueError):
    """Why a row cannot become an example."""


@dataclass(frozen=True)
class Draft:
    """A row as a task, before it is written as a prompt."""

    instruction: str
    input: str = ""  # the context of the instruction
    fence: str | None = None  # the language of the input, if it is code
    completion: str | None = None
    reference: str | None = None
    group_id: str | None = None
    task: str | None = None
    verifier: dict[str, Any] | None = None
    content: tuple[str, ...] | None = None  # the row's own words, apart from any template's; default: all of them


@dataclass(frozen=True)
class DataSet:
    """Where a data set is on the Hub, its columns (those of any one layout), and how a row becomes a draft."""

    hub: str
    layouts: tuple[tuple[str, ...], ...]
    take: Callable[[files.Row], Draft]
    config: str | None = None
    split: str | None = None  # None: all, since we split the rows ourselves
    within: str = "*"  # the pattern of the files to read in a folder; all files if none matches
    language: str = "en"  # of the prose, ISO 639-1
    rows: Callable[[str, bool], Iterator[files.Row]] | None = (
        None  # of (path or Hub id, is it local); None: as ``read`` does
    )

    def read(self, path: str | None) -> Iterator[files.Row]:
        """Yield the rows, from a file, folder or Hub id (default: the data set's own); UsageError if it is none."""
        local = path is not None and Path(path).exists()
        if path is not None and not local and not files.is_hub_id(path):
            raise UsageError(f"--data-path {path}: no such file or folder, and no Hub id either")
        if self.rows is not None:
            return self.rows(path or self.hub, local)
        if path is not None and local:
            return files.read(Path(path), self.within)
        return files.hub(path or self.hub, self.config, self.split)


def examples(
    data_set: DataSet, source: str, path: str | None, prompt_format: str, system: str | None
) -> Iterator[Example | BadRow]:
    """Yield the rows of a data set as examples. ``path`` is a file, folder or Hub id; ``source`` names the data set."""
    seen: Counter[str] = Counter()
    for number, row in enumerate(data_set.read(path)):
        if not number:
            check_columns(row, data_set.layouts, f"{source} ({path or data_set.hub})")
        row_id = str(row["id"]) if row.get("id") is not None else str(number)
        seen[row_id] += 1
        if seen[row_id] > 1:  # one of several answers to a problem
            row_id = f"{row_id}#{seen[row_id]}"
        try:
            draft = data_set.take(row)
        except Rejected as reason:
            yield BadRow(source, row_id, f"row {number + 1}: {reason}")
            continue
        user = {"role": "user", "content": templates.chat(draft.instruction, draft.input, draft.fence)}
        plain = prompt_format == "alpaca"
        yield Example(
            source=source,
            row_id=row_id,
            messages=(user,) if system is None else ({"role": "system", "content": system}, user),
            completion=draft.completion,
            group_id=draft.group_id,
            reference=draft.reference,
            task=draft.task,
            language=data_set.language,
            verifier=None if draft.verifier is None else json.dumps(draft.verifier, ensure_ascii=False),
            prompt=templates.alpaca(draft.instruction, draft.input, data_set.language) if plain else None,
            content=draft.content or (draft.instruction, draft.input),
        )


def check_columns(row: files.Row, layouts: tuple[tuple[str, ...], ...], where: str) -> None:
    """Raise KDError, with the missing columns of the most similar layout, unless a row has all columns of a layout."""
    missing = min(([c for c in layout if c not in row] for layout in layouts), key=len)
    if missing:
        expected = ", or ".join(", ".join(layout) for layout in layouts)
        raise KDError(
            f"{where}: no column {', '.join(map(repr, missing))}; expected {expected}; found: {', '.join(row) or 'none'}"
        )


def text(row: files.Row, *columns: str) -> str:
    """Return the first of the columns that holds text; Rejected if none does."""
    for column in columns:
        if isinstance(row.get(column), str) and row[column].strip():
            return row[column]
    raise Rejected(f"no {columns[0]} (column {' or '.join(map(repr, columns))} is empty or not text)")


def optional(row: files.Row, *columns: str) -> str:
    """Return the first of the columns that holds text, or "" if none does; Rejected if one holds something else."""
    for column in columns:
        if row.get(column) is not None and not isinstance(row[column], str):
            raise Rejected(f"column {column!r} is {type(row[column]).__name__}, expected text")
        if row.get(column, "") and row[column].strip():
            return row[column]
    return ""


def stdio(language: str, tests: Any, **more: Any) -> dict[str, Any] | None:
    """Return a verifier that runs a program on inputs; None if no test is complete. Empty settings are left out."""
    complete = [
        {"input": test["input"], "output": test["output"]}
        for test in (tests if isinstance(tests, list) else [])
        if isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
    ]
    settings = {name: value for name, value in more.items() if value not in (None, "")}
    return {"kind": "stdio", "language": language, "tests": complete, **settings} if complete else None
