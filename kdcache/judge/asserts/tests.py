"""What the tests of an assert verifier say, read from their syntax trees before anything is run."""

from __future__ import annotations

import builtins
import sys
from typing import Any


class Unjudged(BaseException):
    """This cannot be judged, and why. It is not the answer's doing."""


def names_of_answer(sources: list[str], trees: list[Any], namespace: dict[str, Any]) -> list[str]:
    """Return the names that tests use and only the answer can define; Unjudged if there is nothing to judge.

    ``namespace`` holds what the setup defines. Python's own modules are imported into it if the tests use them.
    """
    import ast

    used, bound = set[str](), set(namespace)
    for source in sources:
        _add_global_names(source, used, bound)
    nodes = [node for tree in trees for node in ast.walk(tree)]
    if not any(isinstance(node, ast.Assert | ast.Raise) for node in nodes):
        raise Unjudged("the tests assert nothing")
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            if name in used - bound and name in sys.stdlib_module_names:
                namespace[name] = __import__(name)
                bound.add(name)
    names = {name for name in used - bound if not hasattr(builtins, name)}
    if not names:  # a task may ask for a function that is named like one of Python's own: sum(10, 15)
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        names = called - bound
        if len(names) != 1:
            raise Unjudged("the tests name nothing that is the answer's")
    caught = [node.type for node in nodes if isinstance(node, ast.ExceptHandler) and node.type]
    if any(isinstance(part, ast.Name) and part.id in names for kind in caught for part in ast.walk(kind)):
        raise Unjudged("the tests catch an exception that is the answer's own")
    return sorted(names)


def _add_global_names(source: str, used: set[str], bound: set[str]) -> None:
    """Add the global names that a script uses to ``used``, and those that it binds to ``bound``."""
    import symtable

    tables = [symtable.symtable(source, "test", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global() or table.get_type() == "module":
                if symbol.is_referenced():
                    used.add(symbol.get_name())
                if symbol.is_assigned() or symbol.is_imported():
                    bound.add(symbol.get_name())


def shareable_setup(setup: Any) -> str:
    """Return the part of the setup that the answer's process may know: imports, and classes without asserts."""
    import ast

    def is_free_of_asserts(node: Any) -> bool:
        return not any(isinstance(part, ast.Assert) for part in ast.walk(node))

    return "\n".join(
        ast.unparse(node)
        for node in setup.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.ClassDef) and is_free_of_asserts(node))
    )


def mark_calls_in_place(tree: Any) -> Any:
    """Return the test, with a mark on the calls whose effect on their arguments the test looks at.

    Those are the statements ``f(a)`` and ``b = f(a)``. A call inside an assert is not one of them, nor is a call whose
    result is compared with something computed from its own argument: an answer that empties a list has not sorted it.
    """
    import ast

    compared = [
        [{name.id for name in ast.walk(side) if isinstance(name, ast.Name)} for side in (node.left, *node.comparators)]
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr | ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        call = node.value
        targets = node.targets if isinstance(node, ast.Assign) else []
        results = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        passed = {name.id for argument in call.args for name in ast.walk(argument) if isinstance(name, ast.Name)}
        is_compared_with_argument = any(
            side & results and other & passed
            for sides in compared
            for side in sides
            for other in sides
            if side is not other
        )
        if not is_compared_with_argument:
            mark = ast.copy_location(ast.Name("__in_place__", ast.Load()), call)
            call.func = ast.copy_location(ast.Call(mark, [call.func], []), call)
    return ast.fix_missing_locations(tree)
