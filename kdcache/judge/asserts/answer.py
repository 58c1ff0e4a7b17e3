"""The process that has the answer's program: it evaluates what the other process asks for, and returns the values."""

from __future__ import annotations

import builtins
import sys
from typing import Any

from kdcache.judge.asserts.values import decode, encode, receive, send


def serve(source: int, sink: int, program: str) -> None:
    """Answer requests from ``source`` into ``sink`` until nobody asks any more. ``program`` is the answer's path."""
    import _operator

    module = sys.modules["solution"] = type(sys)("solution")
    objects: list[Any] = []  # those that stay here: the other process knows them by their index

    def refer(value: Any) -> str:
        objects.append(value)
        return f"r{len(objects) - 1},{type(value).__name__}:"

    def resolve(kind: str, name: str) -> Any:
        return objects[int(name)] if kind == "r" else getattr(builtins, name)

    def perform(operation: str, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if operation == "call":
            return arguments[0](*arguments[1:], **keywords)
        if operation == "name":
            if arguments[0] not in module.__dict__:
                raise NameError(arguments[0])
            return module.__dict__[arguments[0]]
        if operation == "setup":
            return exec(compile(arguments[0], "setup", "exec", dont_inherit=True), module.__dict__)
        if operation == "program":
            with open(program, encoding="utf-8") as file:
                return exec(compile(file.read(), "program", "exec", dont_inherit=True), module.__dict__)
        return (getattr(_operator, operation, None) or getattr(builtins, operation))(*arguments)

    def reply_to(request: str) -> str:
        try:
            operation, arguments, keywords, in_place = decode(request, resolve)
            value = perform(operation, arguments, keywords)
            return encode(("value", value, arguments if in_place else []), refer)
        except BaseException as error:
            kind = type(error)
            base = next((base for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base), Exception)
            try:
                message = str(error)[:1000]
            except BaseException:
                message = ""
            return encode(("raise", kind.__name__, base.__name__, message), refer)

    while (request := receive(source)) is not None:
        send(sink, reply_to(request))
