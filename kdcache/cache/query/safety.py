"""What a query may do: read the cache, and nothing else.

DuckDB can be confined to the folder of the cache, but not kept from writing into it. So each statement is checked
before it runs, in DuckDB's own parse tree and never as text::

    a query          one SELECT or EXPLAIN in which no node can write      -> ``reading_statement``
    a --where        one expression that reads, and that gives the same answer each time   -> ``condition``

Invariant: no text of a condition becomes part of any SQL: DuckDB takes it as a parsed expression.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import duckdb

from kdcache.errors import KDError, UsageError, first_line

_READING_NODES = ("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE")
_FUNCTIONS_THAT_RUN_SQL = ("query", "json_execute_serialized_sql")

_AN_EXAMPLE = "expected one condition, as in \"origin = 'sampled' AND reward = 1\""


def reading_statement(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """Return the one statement of ``sql``; KDError (2) unless it is a SELECT, or the EXPLAIN of one, all through.

    DuckDB calls more than reads a SELECT: WITH may hold a COPY or an INSERT, and functions may be given SQL to run.
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


def is_complete(text: str) -> bool:
    """Say whether what was typed so far ends in a semicolon that is not part of a comment or string."""
    tokens = _tokens(text)
    return bool(tokens) and tokens[-1].startswith(b";")


def condition(connection: duckdb.DuckDBPyConnection, where: str) -> duckdb.Expression:
    """Parse a user's condition as one expression. UsageError unless it only reads and never changes its answer.

    Its answer must not change, because several processes, and a run that is resumed, evaluate it again.
    """
    try:
        expression = duckdb.SQLExpression(where)
    except duckdb.Error as error:
        raise UsageError(f"--where {where!r}: {_AN_EXAMPLE}; DuckDB reads it otherwise ({first_line(error)})") from None
    tree = _parse_tree(connection, f"SELECT {where}")  # as SQLExpression parses it
    [item] = [{}] if tree["error"] else tree["statements"][0]["node"]["select_list"]
    if item.get("alias", "?"):
        raise UsageError(f"--where {where!r}: {_AN_EXAMPLE}; more follows it ({item.get('alias')})")
    nodes = list(_nodes(tree))
    if any(_may_write(node) for node in nodes):
        raise UsageError(f"--where {where!r}: a condition reads the cache, and runs nothing else")
    sql = "SELECT function_name FROM duckdb_functions() WHERE stability = 'VOLATILE'"
    volatile = {name for (name,) in connection.execute(sql).fetchall()}
    called = {str(node.get("function_name")).lower() for node in nodes}
    if called & volatile or any(node.get("sample") for node in nodes):
        culprit = next(iter(sorted(called & volatile)), "USING SAMPLE")
        raise UsageError(
            f"--where {where!r}: {culprit} gives another answer each time; hash(sample_id) % 10 = 0 always draws the "
            "same tenth"
        )
    return expression


def explained(error: duckdb.Error, view: str, columns: Sequence[str]) -> str:
    """Say in a sentence what is wrong with a condition on the rows of a view."""
    text = first_line(error)
    if match := re.search(r'Referenced column "(.+?)" not found', text):
        near = difflib.get_close_matches(match[1], columns, n=1)
        hint = f" (is {near[0]} meant?)" if near else ""
        return f"there is no column {match[1]}{hint}; the view {view} has {', '.join(columns)}"
    if isinstance(error, duckdb.BinderException) and ("aggregates" in text or "window functions" in text):
        return (
            f"it is evaluated on one row of {view} at a time, so it holds no aggregate and no window function; put "
            'one into a subquery, as in "reward > (SELECT avg(reward) FROM samples)"'
        )
    if "Values were not provided" in text or "prepared parameter" in text:
        return "a condition has no parameters ($1, ?); write the values into it"
    return text


def _tokens(sql: str) -> list[bytes]:
    """Cut SQL before each of its tokens, with DuckDB's own lexer; comments are left out."""
    raw = sql.encode()
    tokens = duckdb.tokenize(sql)  # (byte offset, kind)
    ends = [start for start, _ in tokens[1:]] + [len(raw)]
    return [raw[start:end] for (start, kind), end in zip(tokens, ends) if kind != duckdb.token_type.comment]


def _parse_tree(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any]:
    """Return DuckDB's tree of a SELECT; its key ``error`` is true for what is none."""
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
    tree = _parse_tree(connection, sql)
    return not tree["error"] and not any(_may_write(node) for node in _nodes(tree))


def _may_write(node: dict[str, Any]) -> bool:
    # A list of allowed nodes, not of forbidden ones: what a later DuckDB adds is refused.
    if "cte_map" in node and node.get("type") not in _READING_NODES:
        return True
    return str(node.get("function_name")).lower() in _FUNCTIONS_THAT_RUN_SQL
