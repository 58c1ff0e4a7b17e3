"""A DuckDB connection with the views of sql/ over a cache, which reads that cache alone and writes nothing.

The files of sql/ are plain DuckDB: ``cd CACHE && duckdb`` and ``.read`` them, or set the variable ``cache`` first. A
view may use others; ``VIEWS`` is an order in which they can be created. docs/sql.md is made from their headers::

    python -m kdcache.cache.query > docs/sql.md
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from kdcache import storage
from kdcache.cache import integrity, manifest
from kdcache.cache.format import SPLITS
from kdcache.cache.layout import REWARDS_FILE
from kdcache.errors import KDError, Unstoppable, UsageError, first_line
from kdcache.paths import resource_folder
from kdcache.progress import ShowProgress, silent
from kdcache.storage import Location

VIEWS = (
    *("vocab", "rewards", "samples", "positions", "candidates", "shards"),
    *("sources", "lengths", "duplicates"),
    *("captured_mass", "captured_mass_curve", "near_deterministic_share", "entropy_histogram", "calibration"),
    *("prompts", "token_ranks", "uncertain_tokens", "disagreements", "hardest_samples", "sample"),
)


#: In the place of sql/rewards.sql for a cache that was written before there was such a file.
NO_REWARDS = (
    "CREATE VIEW rewards AS SELECT NULL::VARCHAR AS sample_id, NULL::FLOAT AS reward, NULL::VARCHAR AS reason LIMIT 0"
)


#: How long DuckDB has to react to Ctrl-C. It does not look for it inside one call of a function on one row.
GRACE_SECONDS = 1.5


# --- asking -----------------------------------------------------------------------------------------------------------


def connect(
    cache: Location,
    memory_limit: str | None = None,
    views: Sequence[str] = VIEWS,
    split: str | None = None,
    progress: ShowProgress = silent,
) -> duckdb.DuckDBPyConnection:
    """An in-memory database with ``views`` over ``cache``, which can reach no other file.

    The views read the shards of the plan (of one split, if that has any), proved to be what was written: DuckDB looks at no checksum.
    It has no folder that can be read and not be written: that nothing is written is what ``stream`` sees to.
    """
    shards = integrity.readable_shards(cache, split, progress) or integrity.readable_shards(cache, None, progress)
    if not shards:
        raise KDError(f"{cache} has no shard yet; run the same kd cache-teacher command to the end")
    for view, name in (("vocab", integrity.VOCAB_FILE), ("rewards", REWARDS_FILE)):
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
            unjudged = name == "rewards" and not (cache / REWARDS_FILE).is_file()
            connection.execute(NO_REWARDS if unjudged else source(name))
    except duckdb.Error as error:
        storage.raise_remote_error(error)
        raise KDError(f"{cache}: its shards could not be opened: {first_line(error)}", 3) from None
    return connection


def run(cache: Location, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Column names and all rows of one query; KDError with DuckDB's own words if it is wrong."""
    connection = connect(cache)
    with _closing(connection):
        names, rows = stream(connection, sql)
        return names, list(rows)


@contextlib.contextmanager
def _closing(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.ResourceInUseException):  # by a query that does not end
            connection.close()


def stream(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """Column names of one query, and its rows as they come: a result may be larger than memory.

    No name stands twice: as in a table made of the query, a second ``a`` is ``a_1``. Another query can be asked of the connection when the rows were taken, or their iterator closed.
    """
    try:
        result = _interruptible(connection, connection.execute, _reading(connection, sql))
    except duckdb.Error as error:
        raise _sql_error(error) from None

    def rows() -> Iterator[tuple[Any, ...]]:
        try:
            while some := _interruptible(connection, result.fetchmany, 10_000):
                yield from some
        except duckdb.Error as error:
            raise _sql_error(error) from None
        finally:
            with contextlib.suppress(duckdb.ResourceInUseException):  # by this query, where it does not end
                connection.abort()

    return _distinct([column[0] for column in result.description or []]), rows()


def _distinct(names: Sequence[str]) -> list[str]:
    """The names of columns, those that were there before with a number."""
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        found[name if name not in found else next(n for n in numbered if n not in found and n not in names)] = None
    return list(found)


def _interruptible(connection: duckdb.DuckDBPyConnection, call: Callable[..., Any], *arguments: Any) -> Any:
    """``call(*arguments)`` in a thread, so that Ctrl-C ends it: the main thread hears of it only while it runs Python.

    Unstoppable where DuckDB has not reacted after GRACE_SECONDS, or the user does not wait that long.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(call(*arguments))
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=work, name="kd-query", daemon=True).start()
    try:
        done.wait()
    except KeyboardInterrupt:
        try:
            _stop(connection, done)
        except KeyboardInterrupt:
            raise Unstoppable from None
        raise
    if errors:
        raise errors[0]
    return results[0]


def _stop(connection: duckdb.DuckDBPyConnection, done: threading.Event) -> None:
    deadline = time.monotonic() + GRACE_SECONDS
    while not done.is_set():
        if time.monotonic() > deadline:
            raise Unstoppable
        connection.interrupt()  # again and again: the query may only be about to begin
        done.wait(0.1)


def is_complete(text: str) -> bool:
    """Whether what was typed so far ends in a semicolon, leaving comments and those in strings aside."""
    tokens = _tokens(text)
    return bool(tokens) and tokens[-1].startswith(b";")


def select(
    cache: Location,
    columns: str,
    where: str | None,
    split: str,
    rest: str = "",
    view: str = "samples",
    parameters: Mapping[str, Any] | None = None,
) -> pa.Table:
    """``columns`` of the rows of a split that fulfil a user's condition.

    ``rest`` is the program's own SQL: further conditions (``AND ...``), grouping and order, with ``parameters``.
    """
    views = VIEWS if where is not None else tuple(dict.fromkeys(("rewards", "samples", view)))
    connection = connect(cache, memory_limit="512MB", views=views, split=split if where is None else None)
    with _closing(connection):
        try:
            rows = connection.view(view)
            chosen = rows.filter(duckdb.ColumnExpression("split") == duckdb.ConstantExpression(split))
            if where is not None:
                chosen = chosen.filter(_condition(connection, where))
            chosen.create_view("chosen", replace=False)
            sql = f"SELECT {columns} FROM chosen WHERE true {rest}"
            return _interruptible(connection, lambda: connection.sql(sql, params=parameters).to_arrow_table())
        except duckdb.Error as error:
            storage.raise_remote_error(error)
            if where is None or _is_damage(error):
                raise KDError(f"{cache}: its shards could not be read: {first_line(error)}", 3) from None
            raise UsageError(f"--where {where!r}: {_explained(error, view, rows.columns)}") from None


def select_samples(cache: Location, where: str | None, split: str) -> tuple[list[str], np.ndarray]:
    """The samples of a split that fulfil ``where``, in file order.

    Returns the files that hold some, and an int64 table [n, 4]: index of the file, row in it, prompt tokens, completion
    tokens. 32 bytes a sample is all that a trainer keeps of a cache.
    """
    columns = "file, file_row_number, prompt_tokens, completion_tokens"
    found = select(cache, columns, where, split, "ORDER BY file, file_row_number")
    files = found["file"].combine_chunks().dictionary_encode()
    numbers = [files.indices, *found.columns[1:]]
    return files.dictionary.to_pylist(), np.column_stack([np.asarray(c, dtype=np.int64) for c in numbers])


def splits(cache: Location) -> list[str]:
    """The splits that have a shard."""
    return [split for split in SPLITS if any((cache / "data").glob(f"{split}-*.parquet"))]


def sources(cache: Location, where: str | None) -> list[str]:
    """Where the training samples that fulfil ``where`` come from."""
    return sorted(select(cache, "DISTINCT source", where, "train")["source"].to_pylist())


def unplanned_files(cache: Location) -> list[str]:
    """What is in data/ and is not read, as the plan does not know it."""
    return integrity.unplanned_files(manifest.read_plan(cache), storage.files(cache / "data"))


def missing_shards(cache: Location) -> list[str]:
    """The shards that the plan knows and the folder does not hold: a query answers without them."""
    there = storage.files(cache / "data")
    planned = [shard["name"] for shard in manifest.read_plan(cache)["shards"]]
    return [name for name in planned if name.removeprefix("data/") not in there]


# --- what a query may do ----------------------------------------------------------------------------------------------

_READING_NODES = ("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE")
_FUNCTIONS_THAT_RUN_SQL = ("query", "json_execute_serialized_sql")


def _reading(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """The one statement of ``sql``; KDError unless it is a SELECT, or the EXPLAIN of one, through and through.

    DuckDB calls more a SELECT than reads: WITH may hold a COPY or an INSERT, and functions may be given SQL to run.
    """
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise KDError(f"expected one SQL statement, found {len(statements)}", 2)
    [statement] = statements
    text = statement.query
    if statement.type == duckdb.StatementType.EXPLAIN:  # EXPLAIN ANALYZE runs what it explains
        tokens = _tokens(text)[1:]
        text = b"".join(tokens[1:] if tokens[0].strip().upper() == b"ANALYZE" else tokens).decode()
    elif statement.type != duckdb.StatementType.SELECT:
        text = ""
    if not text or not _only_reads(connection, text):
        raise KDError("only SELECT and EXPLAIN are run: a cache is read, never written", 2)
    return statement


def _tokens(sql: str) -> list[bytes]:
    """The SQL cut before each of its tokens, by DuckDB's own lexer; comments are left out."""
    raw = sql.encode()
    found = duckdb.tokenize(sql)  # byte offsets
    ends = [start for start, _ in found[1:]] + [len(raw)]
    return [raw[start:end] for (start, kind), end in zip(found, ends) if kind != duckdb.token_type.comment]


def _parsed(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """DuckDB's tree of a SELECT; its key ``error`` is true for what is none."""
    [(serialized,)] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    try:
        return json.loads(serialized)
    except RecursionError:
        raise KDError("the query nests too deeply to be checked; write it with lists or subqueries", 2) from None


def _nodes(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    todo: list[Any] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo.extend(node.values())
        elif isinstance(node, list):
            todo.extend(node)


def _only_reads(connection: duckdb.DuckDBPyConnection, sql: str) -> bool:
    tree = _parsed(connection, sql)
    return not tree["error"] and not any(_may_write(node) for node in _nodes(tree))


def _may_write(node: dict[str, Any]) -> bool:
    if "cte_map" in node and node.get("type") not in _READING_NODES:
        return True
    return str(node.get("function_name")).lower() in _FUNCTIONS_THAT_RUN_SQL


# --- a user's condition -----------------------------------------------------------------------------------------------

_AN_EXAMPLE = "expected one condition, as in \"origin = 'sampled' AND reward = 1\""


def _condition(connection: duckdb.DuckDBPyConnection, where: str) -> duckdb.Expression:
    """A condition parsed as one expression, which DuckDB takes as such: no text of it becomes part of any SQL.

    It reads only, and says the same of a row whenever it is asked: several processes, and a run that is continued,
    ask it anew.
    """
    try:
        expression = duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise UsageError(f"--where {where!r}: {_AN_EXAMPLE}; DuckDB reads it otherwise ({first_line(error)})") from None
    tree = _parsed(connection, f"SELECT {where}")  # as SQLExpression did
    [item] = [{}] if tree["error"] else tree["statements"][0]["node"]["select_list"]
    if item.get("alias", "?"):
        raise UsageError(f"--where {where!r}: {_AN_EXAMPLE}; after it stands more ({item.get('alias')})")
    nodes = list(_nodes(tree))
    if any(_may_write(node) for node in nodes):
        raise UsageError(f"--where {where!r}: a condition reads the cache, and runs nothing else")
    changing = "SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    volatile = {name for (name,) in connection.execute(changing).fetchall()}
    called = {str(node.get("function_name")).lower() for node in nodes}
    if called & volatile or any(node.get("sample") for node in nodes):
        what = next(iter(sorted(called & volatile)), "USING SAMPLE")
        raise UsageError(
            f"--where {where!r}: {what} says something else each time; hash(sample_id) % 10 = 0 draws the same tenth always"
        )
    return expression


def _explained(error: duckdb.Error, view: str, columns: Sequence[str]) -> str:
    """What is wrong with a condition, in a sentence."""
    text = first_line(error)
    if named := re.search(r'Referenced column "(.+?)" not found', text):
        near = difflib.get_close_matches(named[1], columns, n=1)
        hint = f" (is {near[0]} meant?)" if near else ""
        return f"there is no column {named[1]}{hint}; the view {view} has {', '.join(columns)}"
    if isinstance(error, duckdb.BinderException) and ("aggregates" in text or "window functions" in text):
        return (
            f"it is asked of each row of {view} by itself, so it holds no aggregate and no window function; put one into a "
            'subquery, as in "reward > (SELECT avg(reward) FROM samples)"'
        )
    if "Values were not provided" in text or "prepared parameter" in text:
        return "a condition has no parameters ($1, ?); write the values into it"
    return text


def _is_damage(error: duckdb.Error) -> bool:
    """A shard could not be read: DuckDB names it, or fails without a class in the depths of its Parquet reader."""
    named = isinstance(error, duckdb.IOException | duckdb.InvalidInputException) and ".parquet" in str(error)
    return named or type(error) is duckdb.Error


def _sql_error(error: duckdb.Error) -> KDError:
    """DuckDB's own words."""
    storage.raise_remote_error(error)
    text = str(error).strip()
    if type(error) is duckdb.Error:
        text = f"a shard could not be read ({text}); kd cache verify says which"
    return KDError(text, 3 if _is_damage(error) else 1)


# --- the files of sql/ ------------------------------------------------------------------------------------------------


def source(view: str) -> str:
    return (resource_folder("sql") / f"{view}.sql").read_text(encoding="utf-8")


def header(view: str) -> dict[str, str]:
    """The parts of a file's header: answers, parameters (of a macro), columns, note (of some), example."""
    parts: dict[str, str] = {}
    part = "answers"
    for line in source(view).splitlines():
        if not line.startswith("--"):
            break
        text = line.removeprefix(f"-- {view}: ").removeprefix("--").strip()
        if named := re.match(r"(parameters|columns|note|example)  +", text):
            part, text = named[1], text[named.end() :]
        parts[part] = f"{parts.get(part, '')}\n{text}".strip()
    return parts


def signature(view: str) -> str:
    """The name as it is called: a macro's with its parameters."""
    macro = re.search(r"^CREATE OR REPLACE MACRO (.+?) AS TABLE", source(view), re.MULTILINE)
    return macro[1] if macro else view


def described() -> list[tuple[str, str]]:
    """(view, what it answers) for each file of sql/, from its header."""
    return [(signature(name), header(name)["answers"]) for name in VIEWS]


def document() -> str:
    """docs/sql.md."""
    lines = [
        "# The views of a cache",
        "",
        "<!-- Made of the headers of sql/ by: python -m kdcache.cache.query > docs/sql.md -->",
        "",
        'Each is one file of sql/, and can be asked with `kd sql CACHE "SELECT ..."`. The `duckdb` client (2.0 or',
        "newer) reads them too: start it in a cache's folder and `.read` the files in the order of this table, as a view",
        "may use others. Log-probabilities and entropies are in nats. Both kinds of caches are understood: `topk:K`, where",
        "a position has K candidates, and `threshold:TAU`, where it has as many as there are, and those below TAU are a",
        "sample.",
        "",
        "| view | what it answers |",
        "|---|---|",
        *(f"| [{name}](#{re.sub('[^a-z_]', '', name)}) | {answers} |" for name, answers in described()),
    ]
    for view in VIEWS:
        parts = header(view)
        lines += ["", f"## {signature(view)}", "", parts["answers"]]
        for part in ("parameters", "columns", "note"):
            if part in parts:
                lines += ["", f"*{part}*: {parts[part]}"]
        lines += ["", "```sql", parts["example"], "```"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
