"""Where prompts come from: one short file per data set, and all of them yield ``Example``.

``load`` picks by name: ``builtin``, a data set, a .jsonl or .parquet file, or a Hub data set id with such columns. To
add a data set, write its file in data_sets/ and add the file's name to ``MODULES``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import KDError, UsageError
from kdcache.examples.types import BadRow, Columns, Example

if TYPE_CHECKING:
    from kdcache.examples.dataset import DataSet


#: The files of data_sets/ in the order in which users see them. Each names its data sets in DATA_SETS.
MODULES = (
    "dolly",
    "dolly_es",
    "bugnet",
    "pytorrent",
    "codeforces_cots",
    "codeforces",
    "self_instruct",
    "arithmetic",
)


def data_sets() -> dict[str, DataSet]:
    """Return the data sets by the name that --examples takes."""
    modules = [importlib.import_module(f"kdcache.examples.data_sets.{name}") for name in MODULES]
    return {name: data_set for module in modules for name, data_set in module.DATA_SETS.items()}


def load(
    name: str,
    columns: Columns,
    limit: int | None = None,
    data_path: str | None = None,
    prompt_format: str = "chat",
) -> list[Example | BadRow]:
    """Return all examples of ``name`` in order, at most ``limit``. KDError if there are none."""
    rows = _rows(name, columns, data_path, prompt_format)
    examples: list[Example | BadRow] = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(examples) >= limit:
            break
        finished = row if isinstance(row, BadRow) else _finish(row, number, prompt_format)
        examples.append(_writable(finished) if isinstance(finished, BadRow) else finished)
    if not examples:
        raise KDError(f"--examples {name}: there are no rows in it")
    return examples


def _rows(name: str, columns: Columns, data_path: str | None, prompt_format: str) -> Iterator[Example | BadRow]:
    from kdcache.examples import dataset, files, table, templates
    from kdcache.examples.data_sets import builtin

    if prompt_format not in templates.PROMPT_FORMATS:
        raise UsageError(f"--prompt-format {prompt_format}: expected one of {', '.join(templates.PROMPT_FORMATS)}")
    if prompt_format == "alpaca" and columns.system is not None:
        raise UsageError("--system has no place in --prompt-format alpaca, which is plain text without roles")
    by_name = data_sets()
    if name in by_name:
        if columns.prompt or columns.completion:
            raise UsageError(f"--prompt-column and --completion-column are for tables; {name} has columns of its own")
        return dataset.examples(by_name[name], name, data_path, prompt_format, columns.system)
    names = f"builtin, {', '.join(by_name)}"
    if data_path is not None:
        raise UsageError(
            f"--data-path goes with the name of a data set ({', '.join(by_name)}), not with --examples {name}"
        )
    if name == "builtin":
        return builtin.read(columns.system)
    if files.reader(Path(name)) or Path(name).exists():
        return table.read_file(Path(name), columns)
    if files.is_hub_id(name):
        return table.read_hub(name, columns)
    raise UsageError(
        f"--examples {name}: no such file or data set; expected {names}, a file ending in {', '.join(files.READERS)}, or a Hub id"
    )


#: What users call the fields of an example, where that is another name.
FIELD_NAMES = {"row_id": "id", "messages": "prompt"}


def _writable(row: BadRow) -> BadRow:
    """Return the row with characters that UTF-8 cannot hold escaped, so that it can be listed."""
    texts = (text.encode("utf-8", "backslashreplace").decode() for text in (row.source, row.row_id, row.reason))
    return BadRow(*texts)


def _finish(example: Example, number: int, prompt_format: str) -> Example | BadRow:
    """Return an example in the prompt format, or why it cannot be: not valid Unicode, or a conversation for alpaca."""
    from kdcache.examples import templates

    def bad(reason: str) -> BadRow:
        return BadRow(example.source, example.row_id, f"row {number}: {reason}")

    for name, value in vars(example).items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            return bad(f"its {FIELD_NAMES.get(name, name)} is not valid Unicode (half a surrogate pair)")
    if prompt_format == "chat" or example.prompt is not None:
        return example
    if [m["role"] for m in example.messages] != ["user"] or example.tools or example.answer:
        return bad("--prompt-format alpaca takes one user message and an answer of text, and nothing else")
    return replace(example, prompt=templates.alpaca(example.messages[0]["content"], language=example.language))
