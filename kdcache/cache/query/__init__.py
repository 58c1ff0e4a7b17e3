"""SQL over a cache, in DuckDB: it reads that cache alone and writes nothing.

names, rows = query.run(cache, "SELECT count(*) FROM samples")
table = query.select(cache, "sample_id, reward", where="origin = 'sampled'", split="train")

views.py        the views of sql/, and their headers      document.py   docs/sql.md
connection.py   a connection that reaches one cache       safety.py     what a query may do
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from kdcache import storage
from kdcache.cache import integrity
from kdcache.cache.documents import read_plan
from kdcache.cache.format import SPLITS
from kdcache.cache.layout import SHARD_NAME, split_of_shard, stored_files
from kdcache.cache.query.connection import closing, connect, interruptible, is_damage, sql_error
from kdcache.cache.query.safety import condition, explained, is_complete, reading_statement
from kdcache.cache.query.views import VIEWS, described
from kdcache.errors import KDError, UsageError, first_line
from kdcache.storage import Location

__all__ = [
    "VIEWS",
    "connect",
    "described",
    "is_complete",
    "missing_shards",
    "run",
    "select",
    "select_samples",
    "sources",
    "splits",
    "stream",
    "unplanned_files",
]

# --- whole queries ----------------------------------------------------------------------------------------------------


def run(cache: Location, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the column names and all rows of one query; KDError with DuckDB's own words if it is wrong."""
    connection = connect(cache)
    with closing(connection):
        names, rows = stream(connection, sql)
        return names, list(rows)


def stream(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Return the column names of one query, and an iterator over its rows: a result may be larger than memory.

    No name occurs twice: a second ``a`` is ``a_1``, as in a table made of the query. The connection takes another query
    once the iterator is exhausted or closed.
    """
    try:
        result = interruptible(connection, connection.execute, reading_statement(connection, sql))
    except duckdb.Error as error:
        raise sql_error(error) from None

    def rows() -> Iterator[tuple[Any, ...]]:
        try:
            while batch := interruptible(connection, result.fetchmany, 10_000):
                yield from batch
        except duckdb.Error as error:
            raise sql_error(error) from None
        finally:
            with contextlib.suppress(duckdb.ResourceInUseException):  # by this query, where it does not end
                connection.abort()

    return _distinct([column[0] for column in result.description or []]), rows()


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names of columns, each repeated one with a number."""
    distinct: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        unused = name if name not in distinct else next(n for n in numbered if n not in distinct and n not in names)
        distinct[unused] = None
    return list(distinct)


# --- rows of a split that fulfil a condition --------------------------------------------------------------------------


def select(
    cache: Location,
    columns: str,
    where: str | None,
    split: str,
    rest: str = "",
    view: str = "samples",
    parameters: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Return ``columns`` of the rows of a split that fulfil a user's condition, ``where``.

    ``rest`` is the program's own SQL: further conditions (``AND ...``), grouping and order, with ``parameters``.
    """
    views = VIEWS if where is not None else tuple(dict.fromkeys(("rewards", "samples", view)))
    connection = connect(cache, memory_limit="512MB", views=views, split=split if where is None else None)
    with closing(connection):
        try:
            rows = connection.view(view)
            chosen = rows.filter(duckdb.ColumnExpression("split") == duckdb.ConstantExpression(split))
            if where is not None:
                chosen = chosen.filter(condition(connection, where))
            chosen.create_view("chosen", replace=False)
            sql = f"SELECT {columns} FROM chosen WHERE true {rest}"
            return interruptible(connection, lambda: connection.sql(sql, params=parameters).to_arrow_table())
        except duckdb.Error as error:
            storage.raise_remote_error(error)
            if where is None or is_damage(error):
                raise KDError(f"{cache}: its shards could not be read: {first_line(error)}", 3) from None
            raise UsageError(f"--where {where!r}: {explained(error, view, rows.columns)}") from None


def select_samples(cache: Location, where: str | None, split: str) -> tuple[list[str], np.ndarray]:
    """Return the samples of a split that fulfil ``where``, in file order.

    Returns the files that hold any, and an int64 table [samples, 4]: index of the file, row in it, prompt tokens,
    completion tokens. These 32 bytes per sample are all that a trainer keeps of a cache in memory.
    """
    columns = "file, file_row_number, prompt_tokens, completion_tokens"
    table = select(cache, columns, where, split, "ORDER BY file, file_row_number")
    files = table["file"].combine_chunks().dictionary_encode()
    numbers = [files.indices, *table.columns[1:]]
    return files.dictionary.to_pylist(), np.column_stack([np.asarray(column, dtype=np.int64) for column in numbers])


def sources(cache: Location, where: str | None) -> list[str]:
    """Return the sources of the training samples that fulfil ``where``."""
    return sorted(select(cache, "DISTINCT source", where, "train")["source"].to_pylist())


# --- which shards there are -------------------------------------------------------------------------------------------


def splits(cache: Location) -> list[str]:
    """Return the splits that have a shard."""
    stored = {split_of_shard(name) for name in stored_files(cache) if SHARD_NAME.fullmatch(name)}
    return [split for split in SPLITS if split in stored]


def unplanned_files(cache: Location) -> list[str]:
    """Return the files in data/ that no query reads, because the plan does not know them."""
    return integrity.unplanned_files(read_plan(cache), stored_files(cache))


def missing_shards(cache: Location) -> list[str]:
    """Return the shards that the plan knows and the folder lacks: a query answers without them."""
    files = stored_files(cache)
    return [entry["name"] for entry in read_plan(cache)["shards"] if entry["name"] not in files]
