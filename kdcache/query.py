"""A DuckDB connection with the views of sql/ over a cache.

The files of sql/ are plain DuckDB: ``cd CACHE && duckdb`` and ``.read`` them, or set the variable ``cache`` first. A view
may use others; ``VIEWS`` is an order in which they can be created.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from kdcache import format, manifest
from kdcache.errors import KDError, first_line

VIEWS = (
    *("vocab", "samples", "positions", "candidates", "shards"),
    *("sources", "captured_mass", "uncertain_tokens", "token_ranks", "hardest_samples"),
)


def connect(cache: Path, memory_limit: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory database with the views over ``cache``. It can read that folder alone, and write nothing there."""
    manifest.read_plan(cache)
    if not any((cache / "data").glob("*.parquet")):
        raise KDError(f"{cache} has no shard yet; run the same kd cache-teacher command to the end")
    connection = duckdb.connect()
    folder = str(cache.resolve())
    connection.execute("SET VARIABLE cache = ?", [folder])
    connection.execute("SET enable_progress_bar = false")
    if memory_limit:
        connection.execute("SET memory_limit = ?", [memory_limit])
    connection.execute("SET allowed_directories = ?", [[folder + "/"]])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    try:
        for name in VIEWS:
            connection.execute(source(name))
    except duckdb.Error as error:
        raise KDError(f"{cache}: its shards could not be opened: {first_line(error)}", 3) from None
    return connection


def source(view: str) -> str:
    return (format.resource_folder("sql") / f"{view}.sql").read_text(encoding="utf-8")


def run(cache: Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and all rows of one query; KDError with DuckDB's own words if it is wrong."""
    names, rows = stream(cache, sql)
    return names, list(rows)


def stream(cache: Path, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Column names of one query, and its rows as they come: a result may be larger than memory."""
    connection = connect(cache)
    try:
        statements = connection.extract_statements(sql)
        if len(statements) != 1:
            raise KDError(f"expected one SQL statement, found {len(statements)}", 2)
        if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
            raise KDError("only SELECT and EXPLAIN are run: a cache is read, never written", 2)
        result = connection.execute(statements[0])
    except duckdb.Error as error:
        raise _sql_error(error) from None

    def rows() -> Iterator[tuple[Any, ...]]:
        try:
            while some := result.fetchmany(10_000):
                yield from some
        except duckdb.Error as error:
            raise _sql_error(error) from None
        finally:
            connection.close()

    return [column[0] for column in result.description or []], rows()


def described() -> list[tuple[str, str]]:
    """(view, what it answers) for each file of sql/, from its first line."""
    found = []
    for name in VIEWS:
        first = source(name).splitlines()[0]
        found.append((name, first.removeprefix(f"-- {name}: ")))
    return found


def select_samples(cache: Path, where: str | None, split: str) -> tuple[list[str], np.ndarray]:
    """The samples of a split that fulfil ``where``, in file order.

    Returns the files that hold some, and an int64 table [n, 4]: index of the file, row in it, prompt tokens, completion
    tokens. 32 bytes a sample is all that a trainer keeps of a cache.
    """
    connection = connect(cache, memory_limit="512MB")
    chosen = f"FROM samples WHERE split = ? {f'AND ({where})' if where else ''}"
    try:
        files = [
            name for (name,) in connection.execute(f"SELECT DISTINCT file {chosen} ORDER BY file", [split]).fetchall()
        ]
        columns = connection.execute(
            "SELECT dense_rank() OVER (ORDER BY file) - 1 AS file_index, file_row_number, prompt_tokens, completion_tokens "
            f"{chosen} ORDER BY file_index, file_row_number",
            [split],
        ).fetchnumpy()
        return files, np.column_stack([np.asarray(c, dtype=np.int64) for c in columns.values()]).reshape(-1, 4)
    except duckdb.Error as error:
        raise where_error(cache, where, error) from None
    finally:
        connection.close()


_DAMAGE = (duckdb.IOException, duckdb.InvalidInputException)


def _sql_error(error: duckdb.Error) -> KDError:
    """DuckDB's own words."""
    return KDError(str(error).strip(), 3 if isinstance(error, _DAMAGE) else 1)


def where_error(cache: Path, where: str | None, error: duckdb.Error) -> KDError:
    """A query of ours failed: by the user's condition, or because a shard is damaged."""
    if where is None or isinstance(error, _DAMAGE):
        return KDError(f"{cache}: its shards could not be read: {first_line(error)}", 3)
    return KDError(f"--where {where!r}: {first_line(error)}", 2)
