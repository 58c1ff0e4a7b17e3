"""Judges assert statements in two processes that share nothing but a pair of pipes for plain values.

Invariant: the process that holds the tests never runs the answer's code, and whatever the answer writes is no more than
the value of a call. Each process runs in a sandbox of its own::

    judge: has the tests                                     program: has the answer
    --------------------                                     -----------------------
    run the setup, read the names in the tests
    ("setup", [imports and classes], {}, False)  ---------->  run it
                                     <----------------------  ("value", None, [])
    ("program", [], {}, False)       ---------------------->  run the answer
                                     <----------------------  ("value", None, [])
    for each test:
      ("name", ["double"], {}, False)  -------------------->  look "double" up
                                     <----------------------  ("value", r0, [])
      assert double(2) == 4
      ("call", [r0, 2], {}, False)   ---------------------->  call it
                                     <----------------------  ("value", 4, [])  or  ("raise", class, builtin, message)
      compare 4 with 4
    print ("passed", "") and end                              is ended with the judge

A request is (operation, arguments, keywords, in place?). If the last is True, the reply also has the arguments as the
call left them. ``values`` says how these are written.

To the tests, a function of the answer is a stand-in (``judge.Remote``). A value is rebuilt from text as exactly None,
bool, int, float, complex, str, bytes, list, tuple, dict, set or frozenset. Anything else stays where it is and has a
stand-in too, which cannot be compared. The tests' own names, Python's included, are always the judge's, whatever the
answer defines.

The modules of this folder are sent into the sandboxes as one text, so they import nothing of this package but each
other, and little else: each import costs every program milliseconds.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

#: In this order, for a name must be defined before a class uses it.
MODULES = ("values", "answer", "tests", "judge")


@functools.cache
def script() -> str:
    """Return the program of both processes: the modules one after another, without their imports of each other.

    Its arguments: ``program IN OUT PROGRAM`` or ``judge IN OUT TASK``, where IN and OUT are the ends of the pipes.
    """
    parts = [_without_own_imports(Path(__file__).with_name(f"{name}.py").read_text()) for name in MODULES]
    return "\n".join(["from __future__ import annotations", *parts, "main(*sys.argv[1:])\n"])


def _without_own_imports(source: str) -> str:
    """Return a module's source without its imports of this package and of __future__."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("__future__", "kdcache")):
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
    return "\n".join(lines)
