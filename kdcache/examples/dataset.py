"""What the data sets' own files share: each says where its rows are and what it makes of one; the rest is here.

A row becomes an example or a reason, never nothing. Columns are looked at once, in the first row: a data set in another
layout ends the run with what was expected and what was found.
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
    """Why a row cannot be taken."""


@dataclass(frozen=True)
class Draft:
    """A row as a task, before it has the form of a prompt."""

    instruction: str
    input: str = ""  # what the instruction is about
    fence: str | None = None  # the input is code of this language
    completion: str | None = None
    reference: str | None = None
    group_id: str | None = None
    task: str | None = None
    verifier: dict[str, Any] | None = None
    content: tuple[str, ...] | None = None  # the row's own words, apart from any template's; default: all of them


@dataclass(frozen=True)
class DataSet:
    """A data set's place on the Hub, its columns (any one of the layouts), and what becomes of a row."""

    hub: str
    layouts: tuple[tuple[str, ...], ...]
    take: Callable[[files.Row], Draft]
    config: str | None = None
    split: str | None = None  # None: all, for the splits are ours
    within: str = "*"  # which files of a folder, if some are like it
    language: str = "en"  # of the prose, ISO 639-1
    rows: Callable[[str, bool], Iterator[files.Row]] | None = None  # (path or Hub id, is it local), if not as below

    def read(self, path: str | None) -> Iterator[files.Row]:
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
    seen: Counter[str] = Counter()
    for number, row in enumerate(data_set.read(path)):
        if not number:
            check_columns(row, data_set.layouts, f"{source} ({path or data_set.hub})")
        row_id = str(row["id"]) if row.get("id") is not None else str(number)
        seen[row_id] += 1
        if seen[row_id] > 1:  # several answers to one problem
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
    """KDError that names the columns a row has not, of the layout that it comes nearest to."""
    lacking = min(([c for c in layout if c not in row] for layout in layouts), key=len)
    if lacking:
        expected = ", or ".join(", ".join(layout) for layout in layouts)
        raise KDError(
            f"{where}: no column {', '.join(map(repr, lacking))}; expected {expected}; found: {', '.join(row) or 'none'}"
        )


def text(row: files.Row, *columns: str) -> str:
    """The first of the columns that holds text; Rejected if none does."""
    for column in columns:
        if isinstance(row.get(column), str) and row[column].strip():
            return row[column]
    raise Rejected(f"no {columns[0]} (column {' or '.join(map(repr, columns))} is empty or not text)")


def optional(row: files.Row, *columns: str) -> str:
    """The same, and "" where the columns are missing or empty; Rejected if one holds something else."""
    for column in columns:
        if row.get(column) is not None and not isinstance(row[column], str):
            raise Rejected(f"column {column!r} is {type(row[column]).__name__}, expected text")
        if row.get(column, "") and row[column].strip():
            return row[column]
    return ""


def stdio(language: str, tests: Any, **more: Any) -> dict[str, Any] | None:
    """A verifier that runs a program on inputs; None if there is no whole test. Empty settings are left out."""
    whole = [
        {"input": test["input"], "output": test["output"]}
        for test in (tests if isinstance(tests, list) else [])
        if isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
    ]
    settings = {name: value for name, value in more.items() if value not in (None, "")}
    return {"kind": "stdio", "language": language, "tests": whole, **settings} if whole else None
