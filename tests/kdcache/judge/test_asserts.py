"""Asserts are judged by values alone: right answers pass, and nothing else that an answer does makes a verdict."""

import pytest

from kdcache.judge.asserts import values
from kdcache.judge.sandbox import Sandbox, program
from kdcache.judge.verifiers import Verdict, verify

DOUBLE = {"kind": "asserts", "language": "python", "tests": ["assert double(2) == 4", "assert double('a') == 'aa'"]}
SORTED = {"kind": "asserts", "language": "python", "tests": ["data = [3, 1, 2]\nassert order(data) == sorted(data)"]}
SETS = {"kind": "asserts", "language": "python", "tests": ["assert set(pick(3)) == set((4, 5))"]}
CLOSE = {"kind": "asserts", "language": "python", "tests": ["assert math.isclose(third(1), 0.333, abs_tol=0.001)"]}
MAPPED = {
    "kind": "asserts",
    "language": "python",
    "tests": ["for got, wanted in zip(map(double, [1, 2]), [2, 4], strict=False):\n    assert got == wanted"],
}


def of(*tests, setup=""):
    return {"kind": "asserts", "language": "python", "tests": list(tests), "setup": setup}


# --- faking -----------------------------------------------------------------------------------------------------------

FRAMES = """
import gc, sys
def double(x):
    frame, found = sys._getframe(), []
    while frame:
        found += [*frame.f_globals.values(), *frame.f_locals.values()]
        frame = frame.f_back
    for one in found + gc.get_objects():
        if isinstance(one, list) and one and all(isinstance(test, str) and "assert" in test for test in one):
            one.clear()
        if isinstance(one, str) and "double(2) ==" in one and "found" not in one:
            return eval(one.split("==")[1])
"""
WRITES = """
import os
def flood(text):
    for descriptor in range(64):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, text)
        except OSError:
            pass
"""
PASSED = "b't2:s6:passeds0:'"

FAKES = {
    "os.write is replaced": (
        DOUBLE | {"time_limit_seconds": 0.2},
        "import os\nos.write = lambda descriptor, data: len(data)\ndouble = print",
    ),
    "what it writes is replaced": (
        DOUBLE,
        f"import os\nwrite = os.write\nos.write = lambda d, data: write(d, {PASSED})\ndef double(x): return 0",
    ),
    "compile is replaced": (
        DOUBLE,
        "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: None).__code__\ndouble = len",
    ),
    "exec is replaced": (DOUBLE, "import builtins\nbuiltins.exec = lambda *a: None\ndef double(x): return 0"),
    "enumerate is replaced": (DOUBLE, "import builtins\nbuiltins.enumerate = lambda *a: []\ndef double(x): return 0"),
    "the comparison is replaced": (
        DOUBLE,
        "import builtins, _operator\nbuiltins.type = lambda x: int\n_operator.eq = lambda a, b: True\ndef double(x): return 0",
    ),
    "frames and gc are searched for tests": (DOUBLE, FRAMES),
    "an object equals everything": (
        DOUBLE,
        "class A:\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\ndef double(x): return A()",
    ),
    "a number equals everything": (
        DOUBLE,
        "class A(int):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef double(x): return A(7)",
    ),
    "a text equals everything": (
        of("assert double('a') == 'aa'"),
        "class A(str):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef double(x): return A('z')",
    ),
    "a list's elements equal everything": (
        of("assert ones(2) == [1, 1]"),
        "class A:\n    def __eq__(s, o): return True\ndef ones(x): return [A(), A()]",
    ),
    "a class lies about itself": (
        DOUBLE,
        "class A:\n    __class__ = int\n    def __eq__(s, o): return True\n    def __reduce__(s): return (int, (4,))\n"
        "def double(x): return A()",
    ),
    "a set of what equals everything": (
        SETS,
        "class A:\n    def __eq__(s, o): return True\n    def __hash__(s): return hash(4)\ndef pick(x): return [A()]",
    ),
    "Python's own functions are redefined": (
        SETS,
        "import builtins\nset = builtins.set = lambda x: 1\ndef pick(x): return []",
    ),
    "a module is patched": (
        CLOSE,
        "import math, sys, types\nmath.isclose = lambda *a, **k: True\ndef third(x): return 5.0",
    ),
    "a module is put in the place of another": (
        CLOSE,
        "class math:\n    isclose = lambda *a, **k: True\ndef third(x): return 5.0",
    ),
    "the exception is redefined": (
        DOUBLE,
        "import builtins\nbuiltins.AssertionError = builtins.BaseException = type('E', (Exception,), {})\ndouble = len",
    ),
    "the program ends well": (DOUBLE, "import os\ndef double(x): os._exit(0)"),
    "the program ends well at exit": (DOUBLE, "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit()"),
    "a verdict is printed": (DOUBLE, f"{WRITES}\nprint('passed')\nflood({PASSED})\ndef double(x): return 0"),
    "a verdict is written and the program ends": (DOUBLE, f"{WRITES}\nflood({PASSED})\nos._exit(0)"),
    "replies are written beforehand": (
        DOUBLE,
        f"{WRITES}\nflood(b'21\\nt3:s5:valueb1:xl0:' * 9)\nflood(b'16\\nt2:s5:valuei4:' * 9)\ndef double(x): return 0",
    ),
    "a reply is no value": (
        DOUBLE,
        f"{WRITES}\ndef double(x):\n    flood(b'3\\nr0:')\n    flood(b'9\\nl-1:N')\n    flood(b'999999999\\nx')",
    ),
    "a reply tells the judge to stop": (
        DOUBLE,
        f"{WRITES}\ndef double(x): flood(b'52\\nt4:s5:raises8:Unjudgeds9:BaseExceptions8:Unjudged')",
    ),
    "a child serves in the place of the program": (DOUBLE, "import os\nos.fork()\ndef double(x): return 0"),
    "an exception that ends a loop": (MAPPED, "def double(x): raise StopIteration"),
    "an exception that ends Python": (DOUBLE, "def double(x): raise SystemExit(0)"),
    "an exception that ends Python, of its own": (
        DOUBLE,
        "class Unjudged(KeyboardInterrupt): pass\ndef double(x): raise Unjudged('passed')",
    ),
    "an argument is changed to fit": (SORTED, "def order(data):\n    data.clear()\n    return []"),
    "an argument is changed to fit its result": (
        of("data = [3, 1, 2]\ngot = order(data)\nassert got == sorted(data)"),
        "def order(data):\n    data.clear()\n    return []",
    ),
    "the setup's expectations are read": (
        of("assert double(2) == WANTED", setup="WANTED = 4\ndef reference(x): return x * 2"),
        "def double(x): return globals().get('WANTED') or reference(x)",
    ),
    "the file system and /proc are searched": (
        DOUBLE,
        "import glob\ndef double(x):\n    for path in glob.glob('/code/*') + glob.glob('/tmp/*') + glob.glob('/proc/*/*'):\n"
        "        try: text = open(path).read(100000)\n        except (OSError, ValueError): continue\n"
        "        if 'double(2) ' + '== 4' in text: return 4\n",
    ),
    "the judge is killed": (
        DOUBLE,
        "import os\nfor n in range(1, 60):\n    if n != os.getpid():\n        try: os.kill(n, 9)\n        except OSError: pass\n"
        "def double(x): return 0",
    ),
    "nothing equals itself": (
        of("assert double(2) != 5", "assert double(2) == 4"),
        "def double(x): return float('nan')",
    ),
    "an unequal object": (
        of("assert double(2) != 5"),
        "class A:\n    def __ne__(s, o): return True\ndef double(x): return A()",
    ),
    "numbers that collide": (
        of("assert set(many(60_000)) == {1}") | {"time_limit_seconds": 0.5},  # which cost the judge its time
        "def many(x): return [n * (2**61 - 1) for n in range(x)]",
    ),
}


@pytest.mark.parametrize("name", FAKES)
def test_a_verdict_cannot_be_faked(sandbox, name):
    verifier, program = FAKES[name]
    assert verify({"time_limit_seconds": 2} | verifier, program, None, sandbox).reward == 0.0


# --- right answers ----------------------------------------------------------------------------------------------------

RIGHT = {
    "plain values": (DOUBLE, "def double(x): return x * 2"),
    "noise": (DOUBLE, "print('noise')\ndef double(x):\n    print('more')\n    return x * 2"),
    "a set of results": (SETS, "def pick(x): return (5, 4, 5)"),
    "a module that is not imported": (CLOSE, "def third(x): return x / 3"),
    "a loop over results": (MAPPED, "def double(x): return x * 2"),
    "sorting": (SORTED, "def order(data): return sorted(data)"),
    "sorting in place, and returning it": (SORTED, "def order(data):\n    data.sort()\n    return data"),
    "in place": (of("a = [3, 1]\norder(a)\nassert a == [1, 3]"), "def order(a): a.sort()"),
    "in place, with a result": (
        of("a = [1, 1, 2]\nk = unique(a)\nassert k == 2\nassert a[:k] == [1, 2]"),
        "def unique(a):\n    a[:] = sorted(set(a))\n    return len(a)",
    ),
    "identity of constants": (of("assert f(1) is True", "assert f(0) is None"), "def f(x): return True if x else None"),
    "all types": (
        of("assert f() == [None, True, -7, 2**70, 1.5, 2j, 'ñ\\n', b'\\xff', (1,), {1: {2}}, frozenset([3])]"),
        "def f(): return [None, True, -7, 2**70, 1.5, 2j, 'ñ\\n', b'\\xff', (1,), {1: {2}}, frozenset([3])]",
    ),
    "exact floats": (
        of("assert f(0.1) == 0.1 + 0.2 and f(1) != f(1)"),
        "def f(x): return x + 0.2 if x < 1 else x * float('nan')",
    ),
    "a Counter, a namedtuple and an enum": (
        of("assert f('aab') == {'a': 2, 'b': 1}", "assert g() == (1, 2)", "assert h() == 3"),
        "import collections, enum\nf = collections.Counter\ndef g(): return collections.namedtuple('P', 'x y')(1, 2)\n"
        "class E(enum.IntEnum): A = 3\ndef h(): return E.A",
    ),
    "a generator": (of("assert list(f(3)) == [0, 1, 2]", "assert next(f(1)) == 0"), "def f(n): yield from range(n)"),
    "a truth": (of("assert f('ab')", "assert not f('cd')"), "import re\ndef f(text): return re.search('b', text)"),
    "a class": (
        of("s = Stack()\ns.push(3)\ns.push(4)\nassert s.pop() == 4 and len(s) == 1 and s.items[0] == 3"),
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)",
    ),
    "a class, as on LeetCode": (
        of("assert Solution().two([2, 7], 9) == [0, 1]"),
        "class Solution:\n    def two(self, nums, target): return [0, 1]",
    ),
    "a function of the tests": (
        of("def check(double):\n    assert double(2) == 4\ncheck(double)"),
        "def double(x): return 2 * x",
    ),
    "an expected exception": (
        of("try:\n    f(-1)\nexcept ValueError as error:\n    assert 'low' in str(error)\nelse:\n    assert False"),
        "def f(x): raise ValueError('too low')",
    ),
    "Python's functions as arguments": (of("assert f(len, 'ab') == 2"), "def f(g, x): return g(x)"),
    "a function named like Python's": (of("assert sum(10, 15) == 6"), "def sum(a, b): return 6"),
    "a constant": (of("assert LIMIT == 10"), "LIMIT = 10"),
    "the setup's imports and classes": (
        of("assert partial(double, Node.two)() == 4", setup="from functools import partial\nclass Node:\n    two = 2"),
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A(Node):\n    x: int\n"
        "def double(x): return partial(int)(x) * Node.two",
    ),
    "a large value": (of("assert len(f(300_000)) == 300_000"), "def f(n): return list(range(n))"),
    "keywords and operators": (
        of("assert f(x=2) + 1 == 5", "assert (V(1) + V(2)).n == 3"),
        "def f(x): return x * 2\nclass V:\n"
        "    def __init__(self, n): self.n = n\n    def __add__(self, other): return V(self.n + other.n)",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes(sandbox, name):
    verifier, program = RIGHT[name]
    tests = len(verifier["tests"])
    assert verify(verifier, program, None, sandbox) == Verdict(1.0, f"passed {tests} of {tests} tests")


@pytest.mark.parametrize(
    ("verifier", "program", "reason"),
    [
        (of("f(1)"), "def f(x): pass", "assert nothing"),
        (of("assert 1 == 1"), "def f(x): pass", "name nothing"),
        (of("assert f(1) =="), "def f(x): pass", "SyntaxError"),
        (of("import pytest\nwith pytest.raises(ValueError):\n    f(1)\nassert f(2) == 2"), "f = int", "No module named 'pytest'"),
        (of("assert f(1) == 1", setup="import numpy as np\n1 / 0"), "f = int", "cannot be run"),
        (of("assert f(lambda x: x) == 1"), "def f(x): return 1", "pass a function"),
        (of("assert f(Node()) == 1", setup="class Node: pass"), "def f(x): return 1", "pass a Node"),
        (of("assert P(1) == P(1)"), "class P:\n    def __init__(self, x): self.x = x", "compare objects"),
        (of("try:\n    f()\nexcept Low:\n    pass\nassert f(1) == 1"), "class Low(Exception): pass\nf = int", "catch an exception"),
        (of("import sys\nassert f(1) == 1\nsys.exit(0)"), "f = int", "SystemExit"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_judged_say_why(sandbox, verifier, program, reason):
    verdict = verify(verifier, program, None, sandbox)
    assert verdict.reward is None and reason in verdict.reason


def test_tests_that_end_before_the_answer_has_started_are_judged(monkeypatch):
    real = program.start

    def slow_for_the_answer(stack, wrapper, command, *rest):
        wait = ["/bin/sh", "-c", 'sleep 60; exec "$@"', "sh"] if "program" in command else []
        return real(stack, [*wait, *wrapper], command, *rest)

    monkeypatch.setattr(program, "start", slow_for_the_answer)
    verdict = verify(of("assert f(1) =="), "def f(x): pass", None, Sandbox())
    assert verdict.reward is None and "SyntaxError" in verdict.reason


def test_a_module_that_is_missing_is_named(sandbox):
    reason = verify(DOUBLE, "import no_such_module\ndef double(x): return x * 2", None, sandbox).reason
    assert reason == "ModuleNotFoundError in the program: \"No module named 'no_such_module'\""


def test_asserts_are_judged_without_bubblewrap_too_where_that_is_asked_for():
    assert verify(DOUBLE, "def double(x): return x * 2", None, Sandbox(unsafe=True)).reward == 1.0


@pytest.mark.parametrize(
    "text", ["", "x", "i:", "i1", "s5:a", "s-1:", "l2:N", "d1:l0:N", "S1:l0:", "r0:", "f:", "l1:" * 9999]
)
def test_a_text_that_is_no_value_is_refused(text):
    with pytest.raises((ValueError, IndexError, TypeError, KeyError, RecursionError)):
        values.decode(text, values.only_plain)


def test_values_survive_being_text():
    value = [
        None,
        True,
        -7,
        2**70,
        1e-320,
        float("inf"),
        2j,
        "\ud800\n:",
        b"\xff",
        (1, ()),
        {1: {2}},
        frozenset([3]),
        {},
    ]
    assert values.decode(values.encode(value, str), values.only_plain) == value


def test_the_word_of_the_judge_counts_before_the_exit_code_of_an_answer_that_writes_on(sandbox):
    verdict = verify(of("assert f() == 1"), "def f(): return 'x' * (17 << 20)", None, sandbox)
    assert (verdict.reward, verdict.reason) == (0.0, "a value that cannot be read in test 1")
