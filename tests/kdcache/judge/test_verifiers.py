"""Right answers get 1, wrong ones 0, what cannot be judged nothing; and none passes without being right."""

import json
import re

import pytest

from kdcache.errors import KDError
from kdcache.judge import answers, kinds
from kdcache.judge.answers import extract
from kdcache.judge.compare import same_words
from kdcache.judge.kinds import check, parse
from kdcache.judge.sandbox import Sandbox
from kdcache.judge.verifiers import Verdict, verify, verify_many
from kdcache.progress import Progress
from trainer.evaluate.metrics import WordTokenizer

SUM = {
    "kind": "stdio",
    "language": "python",
    "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}],
}
DOUBLE = {"kind": "asserts", "language": "python", "tests": ["assert double(2) == 4", "assert double('a') == 'aa'"]}
CPP = "#include <bits/stdc++.h>\n#include <unistd.h>\nint main() { %s }\n"
ADD = "print(sum(map(int, input().split())))"


def fenced(code, language="python"):
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


# --- the verifier of a sample -----------------------------------------------------------------------------------------


def test_a_row_without_a_verifier_has_none():
    assert parse(None) is None and parse("") is None
    assert verify(None, "anything").reward is None
    assert verify({"kind": "none"}, "anything").reward is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", r"found \[\]"),
        ('{"kind": "vibes"}', 'stdio, asserts, exact, numeric, none; found .*"vibes"'),
        ('{"kind": "stdio", "language": "ruby", "tests": []}', "python or cpp"),
        ('{"kind": "stdio", "language": "cpp", "tests": []}', "at least one"),
        ('{"kind": "stdio", "language": "cpp", "tests": [{"input": "1"}]}', '"output"'),
        ('{"kind": "asserts", "language": "cpp", "tests": ["x"]}', "language"),
        ('{"kind": "asserts", "language": "python", "tests": [[1, 2]]}', "strings of Python"),
        ('{"kind": "numeric", "answer": [5]}', "a string or a number"),
        ('{"kind": "numeric", "answer": "5", "tolerance": "a"}', "tolerance"),
        ('{"kind": "asserts", "language": "python", "tests": ["x"], "time_limit_seconds": -1}', "positive"),
        ('{"kind": "asserts", "language": "python", "tests": ["x"], "time_limit_seconds": 1e9}', "at most 60"),
        ('{"kind": "asserts", "language": "python", "tests": ["x"], "memory_limit_mb": 1e9}', "at most 4096"),
    ],
)
def test_a_verifier_that_is_no_good_says_what_was_found_and_gives_no_reward(text, says):
    with pytest.raises(KDError, match=says):
        parse(text)
    verdict = verify(text, "anything")
    assert verdict.reward is None and verdict.reason


def test_only_code_needs_a_sandbox():
    assert [kinds.runs_code(v) for v in (SUM, DOUBLE, {"kind": "exact"}, {"kind": "none"}, None)] == [
        *(True, True, False, False, False)
    ]
    assert verify(SUM, fenced(ADD)).reward is None


# --- the answer in a completion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>18? no</think>\nIt is 20", "\nIt is 20"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("no opening, as chat templates write it</think>d", "d"),
        ("<think>never ending", None),
        ("done</think>x<think>again", None),
        ("a <answer>1</answer> b <answer>2</answer> c", "2"),
        ("<think><answer>1</answer></think>2", "2"),
        ("<answer>3", "<answer>3"),
        ("", None),
        (" \n", None),
        ("<think>x</think>", None),
        ("<answer> </answer>", None),
    ],
)
def test_the_answer_stands_after_the_thoughts_and_in_its_tag(completion, answer):
    assert extract(completion, check({"kind": "exact"})) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("print(1)", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)\n```\nor\n```Python\nprint(2)\n```", "print(2)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\nIt prints\n```\n1\n```", "print(1)\n"),
        ("<answer>\n```python\nprint(1)\n```\n</answer> ```python\nprint(2)\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\nlonger:\n```python\nprint(", "print(1)\n"),
        ("```python\nprint(", None),
        ("```ruby\nputs 1\n```", None),
        ("```python\ns = '```'\nprint(s)\n```", "s = '```'\nprint(s)\n"),
        ("1. First\n   ```python\n   print(1)\n   ```", "   print(1)\n"),
    ],
)
def test_code_is_the_last_whole_block_of_its_language(completion, answer):
    assert extract(completion, check(SUM)) == answer


def test_cpp_blocks_go_by_their_own_names():
    completion = fenced("int main() {}", "c++") + "\n" + fenced("print(1)")
    assert extract(completion, check(SUM | {"language": "cpp"})) == "int main() {}\n"


# --- texts and numbers ------------------------------------------------------------------------------------------------


def test_exact_answers_may_differ_in_spaces_and_in_how_accents_are_stored():
    verifier = {"kind": "exact", "answer": "El an\u0303o  pasado\n"}
    assert verify(verifier, " El a\u00f1o\tpasado").reward == 1.0
    assert verify(verifier, "El ano pasado").reward == 0.0
    assert verify(verifier, "el a\u00f1o pasado").reward == 0.0
    assert verify({"kind": "exact"}, "Madrid", "Madrid").reward == 1.0
    assert verify({"kind": "exact"}, "Madrid").reward is None
    assert verify({"kind": "exact"}, "<think>Madrid", "Madrid").reward == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("18", "18"),
        ("She makes 9 * 2 = $18 a day.", "18"),
        ("So 16-3-4=9, and 9*2=<<9*2=18>>18\n#### 18", "18"),
        ("The total is 1,234,567.", "1234567"),
        ("The total is 1,234,567.89", "1234567.89"),
        ("En total son 1.234.567,89 euros", "1234567.89"),
        ("Obtuvo una ganancia de $70 000.", "70000"),
        ("Son 70.000 dólares", "70000"),
        ("Cuesta 3,50 €", "3.5"),
        ("cuesta 3.500 euros", "3500"),
        ("it weighs 3.500 kg", "3.5"),
        ("-5", "-5"),
        ("La diferencia es de −5 grados", "-5"),
        ("20-2=18", "18"),
        ("**18**", "18"),
        ("18%", "18"),
        (".5", "0.5"),
        ("about 1.5e3 of them", "1500"),
        ("x = \\boxed{42}, as in exercise 7", "42"),
        ("$\\boxed{\\$1{,}000}$ or \\boxed{-3}", "-3"),
        ("<think>17</think>The answer is 18", "18"),
        ("numbers 16 300", "300"),
        ("18.0000001", "18"),
    ],
)
def test_the_last_number_is_read_in_english_and_in_spanish(completion, expected):
    verdict = verify({"kind": "numeric", "answer": expected}, completion)
    assert verdict.reward == 1.0, verdict
    assert verify({"kind": "numeric"}, completion, f"That makes #### {expected}").reward == 1.0


@pytest.mark.parametrize(
    "completion", ["17", "18 or 19", "-18", "1.8", "180", "eighteen", "<think>18", "18.01", "Q18", ""]
)
def test_another_number_or_none_is_wrong(completion):
    assert verify({"kind": "numeric", "answer": "18"}, completion).reward == 0.0


def test_a_tolerance_is_the_verifiers_and_large_whole_numbers_are_exact():
    assert verify({"kind": "numeric", "answer": "3.14", "tolerance": 0.01}, "3.1416").reward == 1.0
    assert verify({"kind": "numeric", "answer": "123456789"}, "123456788").reward == 0.0
    assert verify({"kind": "numeric", "answer": "5", "tolerance": 0}, "5").reward == 1.0
    assert verify({"kind": "numeric", "answer": "five"}, "5").reward is None


@pytest.mark.parametrize(
    "answer, completion, reward",
    [
        ("3/4", "It is 3/4.", 1.0),
        ("3/4", "It is 0.75", 1.0),
        ("3/4", "It is 4", 0.0),
        ("0.75", "So \\boxed{\\frac{3}{4}}", 1.0),
        ("0.75", "So \\frac{3}{4}", 1.0),
        ("-1/2", "minus half: -0.5", 1.0),
        ("3/0", "3", 0.0),
        (5, "five is 5", 1.0),
        (0, "It is 0", 1.0),
        (0, "It is 7", 0.0),
        (2.5, "2.5", 1.0),
        ("between 3 and 4", "4", None),
        ("(1, 2)", "2", None),
    ],
)
def test_an_expected_answer_is_one_number_or_a_fraction_or_nothing_is_judged(answer, completion, reward):
    assert verify({"kind": "numeric", "answer": answer}, completion, "The reference says 7").reward == reward


# --- programs ---------------------------------------------------------------------------------------------------------


def test_a_program_passes_when_all_its_tests_do(sandbox):
    assert verify(SUM, fenced(ADD), None, sandbox) == Verdict(1.0, "passed 2 of 2 tests")
    assert verify(json.dumps(SUM), ADD, None, sandbox).reward == 1.0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(3)", "wrong output on test 2 of 2"),
        ("print(1, 2)", "wrong output on test 1 of 2"),
        ("print()", "wrong output on test 1 of 2"),
        (ADD + "; print(0)", "wrong output on test 1 of 2"),
        (ADD + "; raise SystemExit(1)", "exit code 1 on test 1 of 2"),
        ("print(3", "exit code 1 on test 1 of 2"),
        ("while True: pass", "timeout on test 1 of 2"),
        ("x = [0] * 10**10", "too much memory on test 1 of 2"),
        ("while True: print(3)", "too much output on test 1 of 2"),
        ("raise SystemExit(0)", "wrong output on test 1 of 2"),
        ("print('passed 2 of 2 tests')", "wrong output on test 1 of 2"),
    ],
)
def test_a_program_fails_at_its_first_failing_test(sandbox, program, reason):
    assert verify(SUM | {"time_limit_seconds": 1}, fenced(program), None, sandbox) == Verdict(0.0, reason)


def test_cpp_programs_are_judged_too(sandbox):
    verifier = SUM | {"language": "cpp"}
    good = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b << std::endl; }"
    assert verify(verifier, fenced(good, "cpp"), None, sandbox) == Verdict(1.0, "passed 2 of 2 tests")
    assert (
        verify(verifier, fenced(good.replace("+", "-"), "cpp"), None, sandbox).reason == "wrong output on test 1 of 2"
    )
    assert verify(verifier, fenced(good.replace(";", ""), "cpp"), None, sandbox) == Verdict(0.0, "does not compile")
    assert verify(verifier, fenced(ADD), None, sandbox) == Verdict(0.0, "no code, or unfinished")


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("1 2 \n3", "1 2\n3\n\n", True),
        ("1\n2\n", "1 2", True),
        ("YES", "yes", False),
        ("3", "3.0", True),
        ("0.3333333333", "0.33333333", True),
        ("0.3334", "0.333333", False),
        ("1000000.5", "1000000.0", True),
        ("3.0", "3", True),
        ("3", "3.000000", True),
        ("0.0000001", "1e-07", True),
        ("1e-07", "0.0000001", True),
        ("1e5", "100000", True),
        ("2.9999999999", "3", True),
        ("2.9", "3", False),
        ("1e18", "1000000000000000001", False),
        ("1000000006.0", "1000000007", False),
        ("1000000007.0", "1000000007", True),
        ("03", "3", False),
        ("+3", "3", False),
        ("-0.0", "0", True),
        ("inf", "1e999", False),
        ("1e999", "1e999", True),
        ("1e99999", "9" * 400, False),
        ("0x10", "16", False),
        ("3.", "3", True),
        (".5", "0.5", True),
        ("1,5", "1.5", False),
        ("n\u0303", "ñ", True),
        ("ñ", "n\u0303", True),
        ("ﬁ", "fi", False),
        ("1\r\n2\r\n", "1\n2\n", True),
        ("YES", "YES.", False),
        ("nan", "1.0", False),
        ("1_0.0", "10.0", False),
        ("", "", True),
        ("1 2 3", "1 2", False),
    ],
)
def test_outputs_are_compared_word_by_word(output, expected, same):
    assert same_words(output, expected) is same


@pytest.mark.parametrize(
    ("language", "program", "given", "expected", "reward"),
    [
        ("python", "print(open('/dev/stdin').read())", "a\n", "a", 1),
        ("python", "print(repr(open(0, newline='').read()))", "a\r\nb\r\n", "'a\\nb\\n'", 1),
        ("python", "print('1 ' * 1_100_000)", "", "1 " * 1_100_000, 1),
        ("python", "print('1 ' * 1_100_000)", "", "1", 0),
        ("python", "import sys; sys.stderr.write('debug ' * 150_000); print(1)", "", "1", 1),
        ("python", "print(1); raise SystemExit(1)", "", "1", 0),
        ("python", "import sys; print(1); sys.stdout.close(); sys.exit(0)", "", "1", 1),
        ("python", "print(1 / 3)", "", "0.333333", 1),
        ("python", "print('n\u0303')", "", "ñ", 1),
        ("cpp", CPP % "long long a; std::cin >> a; std::cout << std::midpoint(a, 4LL);", "2", "3", 1),
        ("cpp", CPP % 'freopen("/dev/stdin", "r", stdin); int a; std::cin >> a; std::cout << a;', "2", "2", 1),
        ("cpp", CPP % 'std::ifstream f("/proc/self/fd/1"); alarm(1); char c; f.get(c); std::cout << 4;', "2", "2", 0),
    ],
)
def test_right_programs_are_right_however_they_read_and_print(sandbox, language, program, given, expected, reward):
    verifier = {"kind": "stdio", "language": language, "tests": [{"input": given, "output": expected}]}
    assert verify(verifier, program, None, sandbox).reward == reward


def test_a_module_that_is_missing_is_named(sandbox):
    verdict = verify(SUM, "import no.such_module", None, sandbox)
    assert verdict == Verdict(0.0, "exit code 1 on test 1 of 2: No module named 'no'")


def test_only_as_many_tests_are_run_as_asked_for(sandbox):
    assert verify(SUM, "print(3)", None, sandbox, max_tests=1) == Verdict(1.0, "passed 1 of 1 tests")


CHECKER = """
import sys
given, expected, output = (open(path).read() for path in sys.argv[1:])
words = [int(word) for word in output.split()]
print(1 if len(words) == 2 and sum(words) == int(given) else 0)
"""


def test_a_checker_judges_where_there_are_many_right_outputs(sandbox):
    verifier = SUM | {"tests": [{"input": "7", "output": "3 4"}], "checker": CHECKER}
    assert verify(verifier, "print(1, int(input()) - 1)", None, sandbox).reward == 1.0
    assert verify(verifier, "print(1, 1)", None, sandbox).reward == 0.0
    assert verify(verifier, "print('seven')", None, sandbox).reward == 0.0  # the checker itself stumbles over it
    for broken in ("print('maybe')", "1 / 0", "import os; os._exit(0)", "print(0)", "print(50)", "print(False)"):
        verdict = verify(verifier | {"checker": broken}, "print(3, 4)", None, sandbox)
        assert verdict.reward is None and "checker" in verdict.reason


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("1 if right else 0", 1),
        ("right", 1),
        ("1.0 if right else 0.5", 1),
        ("100 if right else 50", 1),
        ("50 if output else 100", 0),
        ("100 if expected == output else 99.9", 1),
        ("0.5 if output else 1", None),
    ],
)
def test_a_checkers_right_is_one_or_true_or_what_it_gives_the_expected_output(sandbox, said, reward):
    checker = f"import sys\ngiven, expected, output = (open(path).read().strip() for path in sys.argv[1:])\nright = expected == output\nprint({said})"
    verifier = SUM | {"tests": [{"input": "", "output": "7" if reward != 0 else ""}], "checker": checker}
    assert verify(verifier, "print(7)", None, sandbox).reward == reward
    assert verify(verifier, "print(8)", None, sandbox).reward == (None if reward is None else 0)


# --- time -------------------------------------------------------------------------------------------------------------

MEGABYTE = 1 << 20
NUMERIC, EXACT = {"kind": "numeric", "answer": "7"}, {"kind": "exact", "answer": "7"}
TAGS = (
    "<think>",
    "<answer>",
    "</think><answer>",
    "<answer></answer>",
    "</think> <answer> ",
    "<think> </think> <answer> </answer>",
)
FENCES = ("```", "```a\n", "```\n", "```python\n", "``` a `", "``` " + "a" * 99 + " " * 99, " ", "\n")
DIGITS = (
    "1",
    "1.",
    "1,",
    "1 ",
    "1 111 ",
    "1.111,",
    "111 1111 ",
    "1e",
    "1e+",
    "-",
    "0",
    ".",
    "\\boxed{",
    "9" * 399 + " ",
)
MARKS = ("\u0316\u0300", "\u0301\u0327", "e\u0301", "\u1100\u1161")


@pytest.mark.parametrize(
    ("read", "pieces"),
    [
        (lambda text: extract("<answer>" + text, check(SUM)), TAGS + FENCES),
        (lambda text: extract("```python\n" + text + "`", check(SUM)), FENCES),
        (lambda text: answers.has_reasoned_form("<think>a" + text + "</answer>"), TAGS),
        (lambda text: answers.has_reasoned_form("<think>" + text), TAGS),
        (lambda text: verify(NUMERIC, text).reward, DIGITS),
        (lambda text: verify(NUMERIC, "1" + text + "x 1").reward, DIGITS),
        (lambda text: verify(EXACT, "a" + text + "b").reward, FENCES + MARKS),
        (lambda text: same_words(text + "x", "1.5"), DIGITS + MARKS),
        (lambda text: WordTokenizer().tokenize(text + " a") is None, MARKS),
    ],
)
def test_a_megabyte_of_repetition_is_read_at_all(read, pieces):
    """In quadratic time each would take hours."""
    results = [read(piece * (MEGABYTE // len(piece))) for piece in pieces]
    assert len(results) == len(pieces)


def test_a_function_passes_its_asserts(sandbox):
    code = "def double(x):\n    print('noise')\n    return x * 2\nif __name__ == '__main__':\n    double(input())"
    assert verify(DOUBLE, fenced(code), None, sandbox) == Verdict(1.0, "passed 2 of 2 tests")
    setup = DOUBLE | {
        "setup": "from functools import partial\nclass Node: pass",
        "tests": ["assert partial(double, Node)"],
    }
    data = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"
    assert verify(setup, data + code, None, sandbox).reward == 1.0


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def double(x): return x + 2", "TypeError in test 2"),
        ("def double(x): return 4", "AssertionError in test 2"),
        ("def triple(x): return 4", "NameError in test 1"),
        ("def double(x) return 4", "SyntaxError in the program"),
        ("import sys; sys.exit(0)", "SystemExit in the program"),
        ("import os; os._exit(0)", "ended before its tests did"),
        ("print('passed'); import os; os._exit(0)", "ended before its tests did"),
        ("def double(x): raise SystemExit(0)", "SystemExit in test 1"),
        ("import os\ndef double(x): os.write(1, b'passed 2 of 2 tests'); os._exit(0)", "ended before its tests did"),
        ("import atexit, os; atexit.register(os._exit, 0); exit()", "SystemExit in the program"),
        ("import os; os.kill(os.getpid(), 9)", "exit code 137|ended before its tests did"),
        ("def double(x):\n    while True: pass", "timeout"),
        ("import builtins\nbuiltins.AssertionError = ()\ndef double(x): return 0", "AssertionError in test 1"),
        ("import sys\nprint(open(sys.argv[0]).read())\ndef double(x): return 0", "AssertionError in test 1"),
        ("import sys\nprint(sys.stdin.read())\ndef double(x): return 0", "AssertionError in test 1"),
    ],
)
def test_asserts_are_not_passed_by_ending_early_or_by_printing_what_a_pass_prints(sandbox, program, reason):
    verdict = verify(DOUBLE | {"time_limit_seconds": 1}, program, None, sandbox)
    assert verdict.reward == 0 and re.fullmatch(reason, verdict.reason), verdict


def test_many_answers_are_judged_in_order_and_one_bad_row_spoils_no_other(sandbox):
    items = [(SUM, f"print({n})", None) for n in range(3)]
    items += [
        ("{", "x", None),
        (None, "x", None),
        ({"kind": "exact"}, "a", "a"),
        (DOUBLE, "double = lambda x: x * 2", None),
    ]
    items += [(SUM, fenced(ADD + " # \ud800"), None), ({"kind": "stdio"}, "x", None)]
    shown = []
    verdicts = verify_many(items, sandbox, workers=2, show=shown.append)
    assert [verdict.reward for verdict in verdicts] == [0.0, 0.0, 0.0, None, None, 1.0, 1.0, 1.0, None]
    assert shown[-1] == Progress(len(items), len(items), "answers")


def test_code_without_a_sandbox_that_works_is_not_judged(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KDError, match="bubblewrap"):
        verify_many([(SUM, ADD, None)], Sandbox())
    assert verify_many([({"kind": "exact"}, "a", "a"), ("{", "", None)], Sandbox())[0].reward == 1.0
    verdict = verify(SUM, ADD, None, Sandbox())
    assert verdict.reward is None and "bubblewrap" in verdict.reason
