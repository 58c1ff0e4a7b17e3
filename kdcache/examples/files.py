"""Reads rows as dicts from .jsonl, .jsonl.gz, .json and .parquet files, folders of them, and the Hub.

Invariant: no other module opens files of examples.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kdcache.errors import KDError, UsageError, first_line
from kdcache.prompts.messages import without_nulls

Row = dict[str, Any]

#: Levels of lists and objects in a row. JSON and chat templates walk through them recursively, which costs stack.
MAX_DEPTH = 100


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as lines:
        yield from _lines(lines, path)


def _jsonl_gz(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as lines:
            yield from _lines(lines, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise KDError(f"{path}: not a gzip file that can be read to its end ({error})") from None


def _json(path: Path) -> Iterator[Row]:
    """Read a list of objects, or one object per line."""
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(64).lstrip()[:1]
        file.seek(0)
        if start != "[":
            yield from _lines(file, path)
            return
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise KDError(f"{path}: not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
        except RecursionError:
            raise _too_deep(str(path)) from None
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}, row {number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from map(_without_fill, batch.to_pylist())
    except pa.ArrowException as error:
        raise KDError(f"{path}: not a Parquet file that can be read ({error})") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".json": _json,
    ".ndjson": _jsonl,
    ".parquet": _parquet,
}


def _lines(lines: IO[str] | Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KDError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); one JSON object per line is expected"
            ) from None
        except RecursionError:
            raise _too_deep(f"{path}, line {number}") from None
        yield _object(row, f"{path}, line {number}")


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise KDError(f"{where}: expected a JSON object, found {type(row).__name__}")
    level: list[Any] = [row]
    for _ in range(MAX_DEPTH):
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return row
    raise _too_deep(where)


def _too_deep(where: str) -> KDError:
    return KDError(f"{where}: lists and objects are nested more than {MAX_DEPTH} levels deep; expected fewer")


def reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    """Return the function that reads a file of this name; None if there is none."""
    name = path.name.lower()
    return next((read for suffix, read in READERS.items() if name.endswith(suffix)), None)


def read(path: Path, within: str = "*") -> Iterator[Row]:
    """Yield the rows of a file, or of a folder's files in the order of their names.

    In a folder, only files that match ``within`` are read, if any file does.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and reader(file)]
        files = [file for file in files if file.match(within)] or files
    if not files or any(reader(file) is None for file in files):
        raise UsageError(f"{path}: expected a file ending in {', '.join(READERS)}, or a folder of such files")
    for file in files:
        take = reader(file)
        assert take is not None
        try:
            yield from take(file)
        except UnicodeDecodeError as error:
            raise KDError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def hub(name: str, config: str | None = None, split: str | None = None) -> Iterator[Row]:
    """Yield the rows of a Hub data set (or of a folder in its layout): of one split, or of all in their order."""
    from datasets import load_dataset

    what = " ".join(filter(None, [name, config]))
    try:
        loaded = load_dataset(name, config, split=split)
    except Exception as error:
        raise KDError(
            f"{what}: no such file here, and as a Hub data set {f'its split {split!r}' if split else 'it'} could not be "
            f"loaded: {first_line(error)}"
        ) from None
    for rows in [loaded] if split else loaded.values():
        yield from map(_without_fill, rows)


def _without_fill(row: Row) -> Row:
    """Return a row of an Arrow table without the null fields inside its columns, which only other rows have."""
    return {column: without_nulls(value) for column, value in row.items()}


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id, OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
