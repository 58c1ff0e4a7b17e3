"""The process that has the tests: it runs them against stand-ins for the answer's functions, and finds the verdict."""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from kdcache.judge.asserts.answer import serve
from kdcache.judge.asserts.tests import Unjudged, mark_calls_in_place, names_of_answer, shareable_setup
from kdcache.judge.asserts.values import PLAIN_TYPES, decode, encode, only_plain, receive, send


class Failed(BaseException):
    """The answer is wrong, and why. No ``except Exception`` of a test stops it."""


class AnswerProcess:
    """The answer's process, as the tests see it: ``ask`` sends it a request and returns its reply.

    ``spoiled`` is a verdict that stands, even if the tests catch its exception.
    """

    def __init__(self, source: int, sink: int):
        self.source, self.sink = source, sink
        self.spoiled: BaseException | None = None
        self.relayed: list[BaseException] = []  # exceptions that the answer raised

    def ask(
        self, operation: str, *arguments: Any, in_place: bool = False, keywords: dict[str, Any] | None = None
    ) -> Any:
        """Return the value of an operation over there; with ``in_place``, the arguments change as they did there."""
        request = encode((operation, list(arguments), keywords or {}, in_place), self._refer)
        try:
            send(self.sink, request)
        except OSError:
            raise self.spoil(Failed("")) from None
        return self._reply(operation, arguments, in_place)

    def _reply(self, operation: str, arguments: tuple[Any, ...], in_place: bool) -> Any:
        """Return the value that comes back, or raise its exception here. Anything else spoils the verdict."""
        try:
            text = receive(self.source)
            message = ("gone", "") if text is None else decode(text, self._resolve)
            if type(message) is not tuple or type(message[0]) is not str:
                raise ValueError("no reply")
            kind, first, *rest = message
            if kind == "raise":
                first, rest = _safe_name(first), [str(rest[0]), str(rest[1])]
        except Exception:
            raise self.spoil(Failed("a value that cannot be read")) from None
        if kind == "value":
            if in_place:
                self._change(arguments, rest[0] if rest else [])
            return first
        if kind != "raise":
            raise self.spoil(Failed(""))
        base = getattr(builtins, rest[0], None)
        if operation == "next" and base is StopIteration:
            raise StopIteration
        error: BaseException
        if isinstance(base, type) and issubclass(base, Exception) and base not in (StopIteration, StopAsyncIteration):
            try:
                error = base(rest[1])
            except Exception:
                error = RuntimeError(rest[1])
        else:  # any of these would end the tests, or one of their loops, as if all were well
            error = Failed(first)
        error.__dict__["kind"] = first
        self.relayed.append(error)
        raise error

    def spoil(self, error: BaseException) -> BaseException:
        """Let a verdict stand, unless one does already; return its exception, to be raised."""
        self.spoiled = self.spoiled or error
        return error

    def _change(self, arguments: tuple[Any, ...], changed: Any) -> None:
        """Change lists, dictionaries and sets of the tests as the call has changed their copies."""
        for argument, new in zip(arguments, changed if isinstance(changed, list) else []):
            if type(argument) is not type(new):
                continue
            if isinstance(argument, list):
                argument[:] = new
            elif isinstance(argument, dict | set):
                argument.clear()
                argument.update(new)

    def _refer(self, value: Any) -> str:
        if isinstance(value, Remote):
            return f"r{object.__getattribute__(value, '_number')}:"
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return f"g{name}:"
        raise self.spoil(
            Unjudged(f"the tests pass a {type(value).__name__} to the answer, and only plain values can be passed")
        )

    def _resolve(self, kind: str, text: str) -> Remote:
        if kind != "r":
            raise ValueError(kind)
        number, _, name = text.partition(",")
        return Remote(self, int(number), _safe_name(name))


def _safe_name(text: Any) -> str:
    """Return a name that the answer's process wrote, if it is one: it is shown to people."""
    return text if type(text) is str and text.isidentifier() and len(text) <= 80 else "an object"


class Remote:
    """A stand-in for an object of the answer's process. It can be used in every way, but it cannot be compared."""

    __slots__ = ("_kind", "_number", "_process")

    def __init__(self, process: AnswerProcess, number: int, kind: str):
        object.__setattr__(self, "_process", process)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _process_of(self).ask("call", self, *arguments, keywords=keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols are those defined below
            raise AttributeError(name)
        return _process_of(self).ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _process_of(self).ask("setattr", self, name, value)

    def __instancecheck__(self, value: Any) -> bool:
        raise _process_of(self).spoil(Unjudged("the tests ask of what class a value is, and the class is the answer's"))

    __hash__ = object.__hash__


def _process_of(remote: Remote) -> AnswerProcess:
    process: AnswerProcess = object.__getattribute__(remote, "_process")
    return process


def _forwarding(operation: str, reflected: bool = False) -> Callable[..., Any]:
    """Return a method that lets the answer's process do an operation."""

    def method(self: Remote, *arguments: Any) -> Any:
        order = (*arguments, self) if reflected else (self, *arguments)
        return _process_of(self).ask(operation, *order)

    return method


def _refusing(self: Remote, other: Any) -> bool:
    """Refuse a comparison: an object of the answer's equals whatever it likes, so it is not asked."""
    kind = object.__getattribute__(self, "_kind")
    if other is None or type(other) in PLAIN_TYPES:
        raise _process_of(self).spoil(Failed(f"{kind} is no plain value"))
    raise _process_of(self).spoil(
        Unjudged(f"the tests compare objects ({kind}), and only plain values can be compared")
    )


for _operation in ("len", "iter", "next", "str", "repr", "int", "float", "round", "abs", "neg", "pos", "invert"):
    setattr(Remote, f"__{_operation}__", _forwarding(_operation))
for _operation in ("getitem", "setitem", "delitem", "contains", "index", "reversed"):
    setattr(Remote, f"__{_operation}__", _forwarding(_operation))
Remote.__bool__ = _forwarding("truth")  # type: ignore[attr-defined]
for _operation in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift"):
    setattr(Remote, f"__{_operation}__", _forwarding(_operation))
    setattr(Remote, f"__r{_operation}__", _forwarding(_operation, reflected=True))
for _operation in ("and", "or", "xor"):
    setattr(Remote, f"__{_operation}__", _forwarding(_operation + "_" * (_operation != "xor")))
    setattr(Remote, f"__r{_operation}__", _forwarding(_operation + "_" * (_operation != "xor"), reflected=True))
for _operation in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Remote, f"__{_operation}__", _refusing)


def examine(source: int, sink: int, setup: str, tests: list[str]) -> tuple[str, str]:
    """Run the tests, and return a result and why: "passed", "wrong" or "unjudged".

    A wrong answer without a reason means that the way its program ended says why.
    """
    import ast

    module = sys.modules["solution"] = type(sys)("solution")
    namespace = module.__dict__
    try:
        setup_tree = ast.parse(setup, "setup")
        exec(compile(setup_tree, "setup", "exec", dont_inherit=True), namespace)
        trees = [ast.parse(test, "test") for test in tests]
        names = names_of_answer([setup, *tests], [setup_tree, *trees], namespace)
        codes = [compile(mark_calls_in_place(tree), "test", "exec", dont_inherit=True) for tree in trees]
    except Unjudged as error:
        return "unjudged", str(error)
    except BaseException as error:
        return "unjudged", f"the tests cannot be run ({type(error).__name__}: {error})"
    process = AnswerProcess(source, sink)
    namespace["__in_place__"] = lambda function: (
        (lambda *a, **k: process.ask("call", function, *a, keywords=k, in_place=True))
        if type(function) is Remote
        else function
    )
    where = "in the program"
    try:
        if shared := shareable_setup(setup_tree):
            try:
                process.ask("setup", shared)
            except Exception as error:
                raise Unjudged(f"the setup cannot be run ({type(error).__name__}: {error})") from None
        process.ask("program")
        for number, code in enumerate(codes, 1):
            where = f"in test {number}"
            for name in names:
                namespace.pop(name, None)
                with contextlib.suppress(NameError):  # the test raises it again if it needs the name
                    namespace[name] = process.ask("name", name)
            exec(code, namespace)
            if process.spoiled:
                raise process.spoiled
        return "passed", ""
    except BaseException as error:
        raised = process.spoiled or error
    if isinstance(raised, Unjudged):
        return "unjudged", str(raised)
    is_of_tests = not any(raised is error for error in process.relayed)
    if is_of_tests and isinstance(raised, Failed):
        return "wrong", f"{raised} {where}" if str(raised) else ""
    if is_of_tests and isinstance(raised, ImportError | SystemExit | KeyboardInterrupt):
        return "unjudged", f"the tests cannot be run ({type(raised).__name__}: {raised})"
    kind = raised.__dict__.get("kind", type(raised).__name__)
    missing = f": {str(raised)[:100]!r}" if isinstance(raised, ImportError) else ""
    return "wrong", f"{kind} {where}{missing}"


def main(role: str, source: str, sink: str, *paths: str) -> None:
    """Be one of the two processes: "program" with the answer's path, or "judge" with the path of setup and tests."""
    if role == "program":
        serve(int(source), int(sink), *paths)
        os._exit(0)
    with open(paths[0], encoding="utf-8", errors="surrogatepass", newline="") as file:
        setup, tests = decode(file.read(), only_plain)
    verdict = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # tests print what they like
    result = examine(int(source), int(sink), setup, tests)
    os.write(verdict, encode(result, str).encode("utf-8", "surrogatepass"))
    os._exit(0)
