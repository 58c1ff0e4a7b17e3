"""Judges assert statements in two processes that share nothing but a pipe of plain values. Invariant: the process that
holds the tests never runs the answer's code, and nothing that the answer writes is more than the value of a call.

    python asserts.py program IN OUT PROGRAM     # has the answer; evaluates what it is asked to
    python asserts.py judge IN OUT TASK          # has the tests, and prints what came of them

Each runs in a sandbox of its own, and IN and OUT are the ends of two pipes between them. To the tests a function of the
answer is a stand-in (``Remote``): calling it sends the arguments to the other process and returns the value that comes
back. A value is rebuilt from text as exactly None, bool, int, float, complex, str, bytes, list, tuple, dict, set or
frozenset. What is none of these stays where it is and has a stand-in too, which cannot be compared. The tests' own names,
Python's included, are always the judge's, whatever the answer defines.

This file is sent into the sandboxes as text, so it imports nothing of this package, and little else: each import costs
every program milliseconds.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

MOST_BYTES = 16 << 20  # of a message

# --- plain values as text ---------------------------------------------------------------------------------------------

_PLAIN = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
_LETTERS: dict[type, str] = {list: "l", tuple: "t", dict: "d", set: "S", frozenset: "z"}


def encode(value: Any, refer: Callable[[Any], str]) -> str:
    """A plain value as text. Subclasses lose what they add; ``refer`` gives the text of anything else."""
    pieces: list[str] = []

    def put(item: Any) -> None:
        kind = type(item)
        if kind not in _PLAIN:
            kind = next((base for base in _PLAIN if base is not bool and issubclass(kind, base)), kind)
        if item is None:
            pieces.append("N")
        elif kind is bool:
            pieces.append("T" if item else "F")
        elif kind is int:
            pieces.append(f"i{int.__format__(item, 'x')}:")
        elif kind is float:
            pieces.append(f"f{float.__repr__(item)}:")
        elif kind is complex:
            pieces.append(f"c{float.__repr__(item.real)}:{float.__repr__(item.imag)}:")
        elif kind is str:
            pieces.append(f"s{str.__len__(item)}:{str.__str__(item)}")
        elif kind in (bytes, bytearray):
            pieces.append(f"b{kind.__len__(item)}:{kind.decode(item, 'latin-1')}")
        elif kind is dict:
            pieces.append(f"d{dict.__len__(item)}:")
            for pair in dict.items(item):
                put(pair[0])
                put(pair[1])
        elif kind in _LETTERS:
            pieces.append(f"{_LETTERS[kind]}{kind.__len__(item)}:")
            for one in kind.__iter__(item):
                put(one)
        else:
            pieces.append(refer(item))

    put(value)
    return "".join(pieces)


def decode(text: str, resolve: Callable[[str, str], Any]) -> Any:
    """The value of a text, of exactly the plain types. Any exception: the text is none of ``encode``."""
    position = 0

    def head() -> str:
        nonlocal position
        end = text.index(":", position)
        piece, position = text[position:end], end + 1
        return piece

    def take() -> Any:
        nonlocal position
        kind = text[position]
        position += 1
        if kind in "NTF":
            return {"N": None, "T": True, "F": False}[kind]
        if kind == "i":
            return int(head(), 16)
        if kind == "f":
            return float(head())
        if kind == "c":
            return complex(float(head()), float(head()))
        if kind in "rg":
            return resolve(kind, head())
        size = int(head())
        if kind in "sb":
            piece = text[position : position + size]
            if size < 0 or len(piece) != size:
                raise ValueError("cut off")
            position += size
            return piece if kind == "s" else piece.encode("latin-1")
        if kind == "d":
            return {take(): take() for _ in range(size)}
        made = {"l": list, "t": tuple, "S": set, "z": frozenset}[kind]
        return made([take() for _ in range(size)])

    return take()


def send(descriptor: int, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    data = b"%d\n" % len(data) + data
    while data:
        data = data[os.write(descriptor, data[: 1 << 20]) :]


def receive(descriptor: int) -> str | None:
    """The next message; None at the end. ValueError if it is none, or too long."""
    header = b""
    while not header.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            return None
        header += byte
        if len(header) > 20:
            raise ValueError("no message")
    size = int(header)
    if not 0 <= size <= MOST_BYTES:
        raise ValueError("too long")
    data = bytearray()
    while len(data) < size:
        chunk = os.read(descriptor, size - len(data))
        if not chunk:
            return None
        data += chunk
    return data.decode("utf-8", "surrogatepass")


# --- the process that has the answer ----------------------------------------------------------------------------------


def serve(source: int, sink: int, program: str) -> None:
    """Evaluate whatever is asked for, until nobody asks any more."""
    import _operator

    module = sys.modules["solution"] = type(sys)("solution")
    kept: list[Any] = []

    def refer(value: Any) -> str:
        kept.append(value)
        return f"r{len(kept) - 1},{type(value).__name__}:"

    def resolve(kind: str, name: str) -> Any:
        return kept[int(name)] if kind == "r" else getattr(builtins, name)

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

    def answer(request: str) -> str:
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
        send(sink, answer(request))


# --- the process that has the tests -----------------------------------------------------------------------------------


class Failed(BaseException):
    """The answer is wrong: why. No ``except Exception`` of a test stops it."""


class Unjudged(BaseException):
    """This cannot be judged: why. It is not the answer's doing."""


class Judge:
    """Asks the other process. ``spoiled``: a verdict that stands, whatever the tests make of its exception."""

    def __init__(self, source: int, sink: int):
        self.source, self.sink = source, sink
        self.spoiled: BaseException | None = None
        self.relayed: list[BaseException] = []  # exceptions that are the answer's

    def ask(
        self, operation: str, *arguments: Any, in_place: bool = False, keywords: dict[str, Any] | None = None
    ) -> Any:
        request = encode((operation, list(arguments), keywords or {}, in_place), self._refer)
        try:
            send(self.sink, request)
        except OSError:
            raise self.spoil(Failed("")) from None
        return self.reply(operation, arguments, in_place)

    def reply(self, operation: str, arguments: tuple[Any, ...] = (), in_place: bool = False) -> Any:
        """The value that comes back, or its exception raised here."""
        try:
            text = receive(self.source)
            message = ("gone", "") if text is None else decode(text, self._resolve)
            if type(message) is not tuple or type(message[0]) is not str:
                raise ValueError("no reply")
            kind, first, *rest = message
            if kind == "raise":
                first, rest = _name(first), [str(rest[0]), str(rest[1])]
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
        else:  # what would end the tests, or a loop of theirs, as if all were well
            error = Failed(first)
        error.__dict__["kind"] = first
        self.relayed.append(error)
        raise error

    def spoil(self, error: BaseException) -> BaseException:
        self.spoiled = self.spoiled or error
        return error

    def _change(self, arguments: tuple[Any, ...], now: Any) -> None:
        """Let the tests see what a call has done to its arguments."""
        for argument, new in zip(arguments, now if isinstance(now, list) else []):
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
        return Remote(self, int(number), _name(name))


def _name(text: Any) -> str:
    return text if type(text) is str and text.isidentifier() and len(text) <= 80 else "an object"


class Remote:
    """Stands for what the answer's process keeps. It can be used in every way but compared."""

    __slots__ = ("_judge", "_kind", "_number")

    def __init__(self, judge: Judge, number: int, kind: str):
        object.__setattr__(self, "_judge", judge)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return _judge(self).ask("call", self, *arguments, keywords=keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols are those below
            raise AttributeError(name)
        return _judge(self).ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _judge(self).ask("setattr", self, name, value)

    def __instancecheck__(self, value: Any) -> bool:
        raise _judge(self).spoil(Unjudged("the tests ask of what class a value is, and the class is the answer's"))

    __hash__ = object.__hash__


def _judge(remote: Remote) -> Judge:
    judge: Judge = object.__getattribute__(remote, "_judge")
    return judge


def _forwarding(operation: str, reflected: bool = False) -> Callable[..., Any]:
    def method(self: Remote, *arguments: Any) -> Any:
        order = (*arguments, self) if reflected else (self, *arguments)
        return _judge(self).ask(operation, *order)

    return method


def _refusing(self: Remote, other: Any) -> bool:
    """An object of the answer's equals whatever it likes: it is not asked."""
    kind = object.__getattribute__(self, "_kind")
    if other is None or type(other) in _PLAIN:
        raise _judge(self).spoil(Failed(f"{kind} is no plain value"))
    raise _judge(self).spoil(Unjudged(f"the tests compare objects ({kind}), and only plain values can be compared"))


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
    """Run the tests: "passed"; "wrong" and why ("": see how the program ended); or "unjudged" and why."""
    import ast

    module = sys.modules["solution"] = type(sys)("solution")
    namespace = module.__dict__
    try:
        base = ast.parse(setup, "setup")
        exec(compile(base, "setup", "exec", dont_inherit=True), namespace)
        trees = [ast.parse(test, "test") for test in tests]
        names = _answers_names([setup, *tests], [base, *trees], namespace)
        codes = [compile(_changing(tree), "test", "exec", dont_inherit=True) for tree in trees]
    except Unjudged as error:
        return "unjudged", str(error)
    except BaseException as error:
        return "unjudged", f"the tests cannot be run ({type(error).__name__}: {error})"
    judge = Judge(source, sink)
    namespace["__in_place__"] = lambda function: (
        (lambda *a, **k: judge.ask("call", function, *a, keywords=k, in_place=True))
        if type(function) is Remote
        else function
    )
    where = "in the program"
    try:
        if shared := _shared(base):
            try:
                judge.ask("setup", shared)
            except Exception as error:
                raise Unjudged(f"the setup cannot be run ({type(error).__name__}: {error})") from None
        judge.ask("program")
        for number, code in enumerate(codes, 1):
            where = f"in test {number}"
            for name in names:
                namespace.pop(name, None)
                with contextlib.suppress(NameError):  # which comes as soon as a test needs it
                    namespace[name] = judge.ask("name", name)
            exec(code, namespace)
            if judge.spoiled:
                raise judge.spoiled
        return "passed", ""
    except BaseException as error:
        raised = judge.spoiled or error
    if isinstance(raised, Unjudged):
        return "unjudged", str(raised)
    own = not any(raised is error for error in judge.relayed)
    if own and isinstance(raised, Failed):
        return "wrong", f"{raised} {where}" if str(raised) else ""
    if own and isinstance(raised, ImportError | SystemExit | KeyboardInterrupt):
        return "unjudged", f"the tests cannot be run ({type(raised).__name__}: {raised})"
    kind = raised.__dict__.get("kind", type(raised).__name__)
    missing = f": {str(raised)[:100]!r}" if isinstance(raised, ImportError) else ""
    return "wrong", f"{kind} {where}{missing}"


def _answers_names(sources: list[str], trees: list[Any], namespace: dict[str, Any]) -> list[str]:
    """The names that tests use and nobody but the answer can define. Python's modules need no import."""
    import ast

    used, bound = set[str](), set(namespace)
    for source in sources:
        _names_of(source, used, bound)
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
    if not names:  # a task may be to write what has the name of one of Python's own: sum(10, 15)
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        names = called - bound
        if len(names) != 1:
            raise Unjudged("the tests name nothing that is the answer's")
    caught = [node.type for node in nodes if isinstance(node, ast.ExceptHandler) and node.type]
    if any(isinstance(one, ast.Name) and one.id in names for kind in caught for one in ast.walk(kind)):
        raise Unjudged("the tests catch an exception that is the answer's own")
    return sorted(names)


def _names_of(source: str, used: set[str], bound: set[str]) -> None:
    """Add a script's global names."""
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


def _shared(setup: Any) -> str:
    """What of the setup the answer's process may know: imports, and classes without tests."""
    import ast

    def is_free(node: Any) -> bool:
        return not any(isinstance(one, ast.Assert) for one in ast.walk(node))

    return "\n".join(
        ast.unparse(node)
        for node in setup.body
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.ClassDef) and is_free(node))
    )


def _changing(tree: Any) -> Any:
    """The test, with the calls marked whose effect on their arguments it looks at.

    Those are the statements ``f(a)`` and ``b = f(a)``; not a call inside an assert, nor one whose result is compared with
    what is made of its own argument: an answer that empties a list has not sorted it.
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
        given = {name.id for one in call.args for name in ast.walk(one) if isinstance(name, ast.Name)}
        crossed = any(
            one & results and other & given
            for sides in compared
            for one in sides
            for other in sides
            if one is not other
        )
        if not crossed:
            mark = ast.copy_location(ast.Name("__in_place__", ast.Load()), call)
            call.func = ast.copy_location(ast.Call(mark, [call.func], []), call)
    return ast.fix_missing_locations(tree)


def plain(kind: str, text: str) -> Any:
    """To ``decode``: there is nothing here but plain values."""
    raise ValueError(kind)


def main(role: str, source: str, sink: str, *paths: str) -> None:
    if role == "program":
        serve(int(source), int(sink), *paths)
        os._exit(0)
    with open(paths[0], encoding="utf-8", errors="surrogatepass", newline="") as file:
        setup, tests = decode(file.read(), plain)
    verdict = os.dup(1)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # tests print what they like
    found = examine(int(source), int(sink), setup, tests)
    os.write(verdict, encode(found, str).encode("utf-8", "surrogatepass"))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
