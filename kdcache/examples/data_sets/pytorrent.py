"""PyTorrent: functions of Python packages, whose docstrings are the answers (each row has its package's licence).

    kd cache-teacher --examples pytorrent --data-path PyTorrent/jsonl --out data/pytorrent

The original (Zenodo 4546290) is a set of zip files of .jsonl.gz: unpack one, and name its folder. A problem is a
repository: all its functions are in the same split, since they share names, style and often text.
"""

from __future__ import annotations

import ast
import textwrap

from kdcache.examples import files, templates
from kdcache.examples.dataset import DataSet, Draft, Rejected, text

LAYOUTS = (("repo", "original_string", "docstring"), ("repo", "code", "docstring"))


def take(row: files.Row) -> Draft:
    docstring = text(row, "docstring", "summary").strip()
    code = without_docstring(text(row, "original_string", "code"))
    return Draft(
        instruction=templates.DOCSTRING,
        input=code,
        fence="python",
        completion=docstring,
        reference=docstring,
        group_id=text(row, "repo"),
        task="docstring",
        content=(code,),
    )


def without_docstring(code: str) -> str:
    """Return a function without its docstring, which is the answer; Rejected if the two cannot be separated."""
    code = textwrap.dedent(code)
    try:
        (function,) = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Rejected("its code is not one Python 3 function, so its docstring cannot be taken out") from None
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        raise Rejected("its code is no function")
    first = function.body[0]
    if not (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    ):
        return code
    if len(function.body) == 1:
        raise Rejected("there is no code besides the docstring")
    lines = code.encode().splitlines(keepends=True)
    assert first.end_lineno is not None and first.end_col_offset is not None
    before, after = lines[first.lineno - 1][: first.col_offset], lines[first.end_lineno - 1][first.end_col_offset :]
    rest = before + after.lstrip(b" ;") if before.strip() or after.strip() else b""
    return b"".join([*lines[: first.lineno - 1], rest, *lines[first.end_lineno :]]).decode()


DATA_SETS = {"pytorrent": DataSet("0n1xus/pytorrent-standalone", LAYOUTS, take)}
