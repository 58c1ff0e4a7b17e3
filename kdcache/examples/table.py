"""Examples from a .jsonl or .parquet file or a Hub data set with ``prompt``/``completion`` or ``messages`` columns.

These optional columns are read by name: id, group_id, reference, task, language, verifier; tools beside messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.examples import files
from kdcache.examples.types import BadRow, Columns, Example
from kdcache.prompts import messages as chat
from kdcache.prompts.messages import Message


@dataclass(frozen=True)
class TableRow:
    """The content of a table's row: the prompt's messages, and the answer."""

    messages: list[Message]
    completion: str | None = None  # the answer as text
    answer: Message | None = None  # the whole answer, where it is more than text
    tools: tuple[dict[str, Any], ...] = ()


def read_file(path: Path, columns: Columns) -> Iterator[Example | BadRow]:
    """Yield the examples of a file; UsageError if it does not exist or is of no known kind."""
    if not path.exists():
        raise UsageError(f"--examples {path}: no such file")
    if path.is_dir() or files.reader(path) is None:
        raise UsageError(f"--examples {path}: expected a file ending in {', '.join(files.READERS)}")
    source = path.name[: -len(".jsonl.gz")] if path.name.lower().endswith(".jsonl.gz") else path.stem
    yield from _examples(files.read(path), source, str(path), columns)


def read_hub(name: str, columns: Columns, split: str = "train") -> Iterator[Example | BadRow]:
    """Yield the examples of a Hub data set."""
    yield from _examples(files.hub(name, split=split), name, name, columns)


def _examples(rows: Iterable[dict[str, Any]], source: str, where: str, columns: Columns) -> Iterator[Example | BadRow]:
    reader: Callable[[dict[str, Any]], TableRow | str] | None = None
    for number, row in enumerate(rows):
        if reader is None:
            reader = _row_reader(row, where, columns)
        row_id = str(row["id"]) if row.get("id") is not None else str(number)
        content = reader(row)
        if isinstance(content, str):
            yield BadRow(source, row_id, f"row {number + 1}: {content}")
            continue
        system = [] if columns.system is None else [{"role": "system", "content": columns.system}]
        verifier = row.get("verifier")
        yield Example(
            source=source,
            row_id=row_id,
            messages=(*system, *content.messages),
            completion=content.completion,
            answer=content.answer,
            tools=content.tools,
            group_id=_text(row.get("group_id")),
            reference=_text(row.get("reference")) or content.completion,
            task=_text(row.get("task")),
            language=_text(row.get("language")),
            verifier=json.dumps(verifier) if isinstance(verifier, dict | list) else _text(verifier),
        )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _row_reader(first: dict[str, Any], where: str, columns: Columns) -> Callable[[dict[str, Any]], TableRow | str]:
    """Return the function that reads this table's rows as TableRows, or as reasons; the first row decides which."""
    column_names = ", ".join(first) or "none"
    for flag, column in (("--prompt-column", columns.prompt), ("--completion-column", columns.completion)):
        if column is not None and column not in first:
            raise UsageError(f"{flag} {column}: {where} has no such column; found: {column_names}")
    if columns.prompt is None and "messages" in first:
        return _from_messages
    prompt = columns.prompt or "prompt"
    completion = columns.completion or "completion"
    if prompt not in first:
        raise UsageError(
            f"{where}: expected a column `prompt` (and `completion`) or `messages`; found: {column_names}. "
            "Name them with --prompt-column and --completion-column."
        )

    def from_pair(row: dict[str, Any]) -> TableRow | str:
        text, answer = row.get(prompt), row.get(completion)
        if not isinstance(text, str) or not text.strip():
            return f"no prompt (column {prompt!r} is {'missing' if text is None else 'empty or not text'})"
        if answer is not None and not isinstance(answer, str):
            return f"column {completion!r} is {type(answer).__name__}, expected text"
        return TableRow([{"role": "user", "content": text}], answer)

    return from_pair


def _from_messages(row: dict[str, Any]) -> TableRow | str:
    try:
        before, answer = chat.split_answer(chat.read(row.get("messages")))
        tools = chat.tools(row.get("tools"))
    except ValueError as error:
        return str(error)
    if answer is None:
        return TableRow(before, tools=tools)
    more_than_text = answer.keys() - {"role", "content"}
    return TableRow(before, answer["content"] or None, answer if more_than_text else None, tools)
