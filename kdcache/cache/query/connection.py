"""A DuckDB connection that can reach one cache alone, and calls on it that Ctrl-C ends."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import duckdb

from kdcache import storage
from kdcache.cache import integrity
from kdcache.cache.layout import REWARDS_FILE, VOCAB_FILE
from kdcache.cache.query.views import NO_REWARDS, VIEWS, source
from kdcache.errors import KDError, Unstoppable, first_line
from kdcache.progress import ShowProgress, silent
from kdcache.storage import Location

#: How long DuckDB has to react to Ctrl-C. It does not look for it while one function works on one row.
GRACE_SECONDS = 1.5


def connect(
    cache: Location,
    memory_limit: str | None = None,
    views: Sequence[str] = VIEWS,
    split: str | None = None,
    show: ShowProgress = silent,
) -> duckdb.DuckDBPyConnection:
    """Return an in-memory database with ``views`` over ``cache``, which can reach no other file.

    The views read the shards of the plan (of one split, if that has any), each proved to be what was written, because
    DuckDB looks at no checksum. DuckDB cannot make a folder read-only: safety.py keeps queries from writing.
    """
    shards = integrity.readable_shards(cache, split, show) or integrity.readable_shards(cache, None, show)
    if not shards:
        raise KDError(f"{cache} has no shard yet; run the same kd cache-teacher command to the end")
    for view, name in (("vocab", VOCAB_FILE), ("rewards", REWARDS_FILE)):
        if view in views and (cache / name).is_file():
            integrity.check_table(cache, name)
    links = storage.linked_files(cache)
    connection = duckdb.connect()
    folder = storage.duckdb_folder(connection, cache)
    pattern = storage.duckdb_pattern(folder)
    connection.execute("SET VARIABLE cache = ?", [pattern])
    connection.execute("SET VARIABLE shards = ?", [[f"{pattern}/{name}" for name in shards]])
    connection.execute("SET enable_progress_bar = false")
    if memory_limit:
        connection.execute("SET memory_limit = ?", [memory_limit])
    connection.execute("SET allowed_directories = ?", [[folder + "/", pattern + "/"]])
    connection.execute("SET allowed_paths = ?", [[str(path) for path in links]])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    try:
        for name in views:
            without_rewards = name == "rewards" and not (cache / REWARDS_FILE).is_file()
            connection.execute(NO_REWARDS if without_rewards else source(name))
    except duckdb.Error as error:
        storage.raise_remote_error(error)
        raise KDError(f"{cache}: its shards could not be opened: {first_line(error)}", 3) from None
    return connection


@contextlib.contextmanager
def closing(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Close a connection at the end, unless a query that does not end still uses it."""
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.ResourceInUseException):
            connection.close()


def interruptible(connection: duckdb.DuckDBPyConnection, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``call(*arguments)``, run in a thread so that Ctrl-C ends it.

    Python handles a signal only between two of its own steps, and DuckDB's call is one step.

    Raise Unstoppable where DuckDB has not reacted after GRACE_SECONDS, or the user presses Ctrl-C again before that.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def work() -> None:
        try:
            results.append(call(*arguments))
        except BaseException as error:
            errors.append(error)
        finished.set()

    threading.Thread(target=work, name="kd-query", daemon=True).start()
    try:
        finished.wait()
    except KeyboardInterrupt:
        try:
            _stop(connection, finished)
        except KeyboardInterrupt:
            raise Unstoppable from None
        raise
    if errors:
        raise errors[0]
    return results[0]


def _stop(connection: duckdb.DuckDBPyConnection, finished: threading.Event) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while not finished.is_set():
        if time.monotonic() > deadline:
            raise Unstoppable
        connection.interrupt()  # repeatedly, because the query may not have started yet
        finished.wait(0.1)


def is_damage(error: duckdb.Error) -> bool:
    """Say whether a shard could not be read.

    DuckDB then names the shard, or its Parquet reader raises an error without a class of its own.
    """
    named = isinstance(error, duckdb.IOException | duckdb.InvalidInputException) and ".parquet" in str(error)
    return named or type(error) is duckdb.Error


def sql_error(error: duckdb.Error) -> KDError:
    """Return the error that the user sees: DuckDB's own words."""
    storage.raise_remote_error(error)
    text = str(error).strip()
    if type(error) is duckdb.Error:
        text = f"a shard could not be read ({text}); kd cache verify says which"
    return KDError(text, 3 if is_damage(error) else 1)
