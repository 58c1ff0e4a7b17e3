r"""Is this answer right? Invariant: only what was judged has a reward; 1 is right, 0 is wrong, None is not judged.

A sample's verifier is a JSON object; code needs a sandbox (kdcache/sandbox.py):

* {"kind": "stdio", "language": "python" or "cpp", "tests": [{"input", "output"}, ...]}, optionally "time_limit_seconds",
  "memory_limit_mb" and "checker". Without a checker, outputs are compared word by word, in order, whatever whitespace is
  between them, case mattering. Words are equal as text, except where a decimal point or exponent stands in the expected
  one: then within 1e-6, absolute or relative. (This is what Codeforces' own wcmp and rcmp6 do.) A checker is a Python
  program called with the paths of input, expected output and output; the last word it prints is 1, or a score below;
* {"kind": "asserts", "language": "python", "tests": ["assert f(1) == 2", ...]}, optionally "setup", which is run before,
  and the two limits;
* {"kind": "exact", "answer"}: equal after Unicode's NFC and with runs of whitespace as one blank;
* {"kind": "numeric", "answer", "tolerance" (1e-6)}: the last number of the answer, with signs, and
  separators as English or Spanish write them: where 1,234 or 1.234 has two readings, either may be right;
* {"kind": "none"}: not judged.

The answer of exact and numeric is the sample's reference unless it is given here.

Asserts share a process with the code that they test. A program that ends early, prints what a pass prints, or raises,
does not pass: what says that all tests ran is a secret of this process, made per program. But code that searches the
interpreter's own frames for it, or returns objects that equal everything, can pass; tests that compare printed output
("stdio") cannot be fooled so.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDError
from kdcache.sandbox import Limits, Outcome, Sandbox, side_by_side

KINDS = ("stdio", "asserts", "exact", "numeric", "none")
LANGUAGES = {"stdio": ("python", "cpp"), "asserts": ("python",)}
TIME_LIMIT_SECONDS, MEMORY_LIMIT_MB = 10.0, 512
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verdict:
    reward: float | None  # 1 right, 0 wrong, None not judged
    reason: str


# --- the verifier of a sample -----------------------------------------------------------------------------------------


def parse(text: str | None) -> dict[str, Any] | None:
    """The verifier in a cache's column, checked; None where there is none."""
    if text is None or not text.strip():
        return None
    try:
        verifier = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KDError(f"a verifier is not JSON: {error}") from None
    return check(verifier)


def check(verifier: Any) -> dict[str, Any]:
    """KDError, saying what was found, unless it is a verifier."""
    kind = verifier.get("kind") if isinstance(verifier, dict) else None
    if kind not in KINDS:
        raise KDError(f"a verifier is an object whose kind is one of {', '.join(KINDS)}; found {_short(verifier)}")

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise KDError(f"a verifier of kind {kind} needs {what}; found {_short(verifier)}")

    if kind in LANGUAGES:
        need(verifier.get("language") in LANGUAGES[kind], f'a "language", {" or ".join(LANGUAGES[kind])}')
        tests = verifier.get("tests")
        need(isinstance(tests, list) and bool(tests), '"tests", at least one')
        if kind == "stdio":
            keys = ("input", "output")
            whole = all(
                isinstance(test, dict) and all(isinstance(test.get(key), str) for key in keys) for test in tests
            )
            need(whole, 'an "input" and an "output" in each test, both strings')
        else:
            need(all(isinstance(test, str) for test in tests), "tests that are strings of Python")
        for name in ("setup", "checker"):
            need(isinstance(verifier.get(name) or "", str), f'a "{name}" that is a string')
        for name in ("time_limit_seconds", "memory_limit_mb"):
            need(_is_positive(verifier.get(name) or 1), f'a "{name}" that is a positive number')
    elif kind in ("exact", "numeric"):
        need(isinstance(verifier.get("answer") or "", str), 'an "answer" that is a string')
        need(_is_positive(verifier.get("tolerance") or 1), 'a "tolerance" that is a number of at least 0')
    return verifier


def needs_sandbox(verifier: dict[str, Any] | None) -> bool:
    """Whether judging runs a program."""
    return verifier is not None and verifier["kind"] in LANGUAGES


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:200] + "..."


# --- the answer in a completion ---------------------------------------------------------------------------------------

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_TAGS = {"python": ("python", "py", "python3"), "cpp": ("cpp", "c++", "cc", "cxx")}


def extract(completion: str, verifier: dict[str, Any]) -> str | None:
    """What of a completion is its answer; None if it stops before one.

    That is the text after the last ``</think>`` (a ``<think>`` that stays open has no answer), in it the last
    ``<answer>...</answer>`` if there is one, and in that, for code, the last fenced block of the language, else the last
    that names none, else all of it if nothing is fenced; for exact the last fenced block, if any; for numbers, the last ``\\boxed{}`` if there is one.
    """
    answer = completion.rpartition("</think>")[2]
    if "<think>" in answer:
        return None
    if tagged := re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL):
        answer = tagged[-1]
    if verifier["kind"] in LANGUAGES:
        if "```" in answer:
            blocks = _FENCE.findall(answer if answer.endswith("\n") else answer + "\n")
            named = [code for tag, code in blocks if tag.lower() in _TAGS[verifier["language"]]]
            answer = (named or [code for tag, code in blocks if not tag] or [""])[-1]
    elif verifier["kind"] == "exact" and "```" in answer:
        answer = ([code for _, code in _FENCE.findall(answer + "\n")] or [answer])[-1]
    elif verifier["kind"] == "numeric" and (boxed := re.findall(r"\\boxed\{([^{}]*)\}", answer)):
        answer = boxed[-1]
    return answer if answer.strip() else None


def answer_in(completion: str, verifier: str | None) -> str:
    """The same for a cache's column: "" where there is no answer, all of it where no verifier says where to look."""
    try:
        known = parse(verifier)
    except KDError:
        known = None
    return completion if known is None else extract(completion, known) or ""


# --- judging ----------------------------------------------------------------------------------------------------------


def verify(
    verifier: dict[str, Any] | str | None,
    completion: str,
    reference: str | None = None,
    sandbox: Sandbox | None = None,
    max_tests: int | None = None,
) -> Verdict:
    """Whether a completion is right. A verifier that is no good, or a sandbox that fails, gives no reward, and why."""
    try:
        known = parse(verifier) if isinstance(verifier, str) or verifier is None else check(verifier)
        if known is None or known["kind"] == "none":
            return Verdict(None, "no verifier")
        if known["kind"] in ("exact", "numeric"):
            return _verify_text(known, extract(completion, known), reference)
        answer = extract(completion, known)
        if answer is None:
            return Verdict(0.0, "no code, or unfinished")
        if sandbox is None:
            raise KDError("the answer is a program, which needs a sandbox")
        judge = _verify_stdio if known["kind"] == "stdio" else _verify_asserts
        return judge(known, answer, known["tests"][:max_tests], sandbox)
    except KDError as error:
        return Verdict(None, str(error))


def verify_many(
    items: Sequence[tuple[dict[str, Any] | str | None, str, str | None]],
    sandbox: Sandbox | None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    max_tests: int | None = None,
) -> list[Verdict]:
    """Verdicts of (verifier, completion, reference), in order, programs side by side.

    KDError if there is code to run and no sandbox to run it in; what is wrong with one item is its verdict's reason.
    """
    if any(runs_code(verifier) for verifier, _, _ in items):
        if sandbox is None:
            raise KDError("some of the answers are programs, which need a sandbox")
        sandbox.check()
    return side_by_side(lambda item: verify(*item, sandbox, max_tests), items, workers, progress)


def sandbox_for(verifiers: Iterable[str | None], unsafe: bool = False) -> Sandbox | None:
    """Where answers are run, if any of these run one. KDError if they cannot be: before anything else is done."""
    if not any(map(runs_code, verifiers)):
        return None
    sandbox = Sandbox(unsafe)
    sandbox.check()
    return sandbox


def runs_code(verifier: dict[str, Any] | str | None) -> bool:
    """Whether judging by it runs a program; what is no verifier runs none."""
    try:
        return needs_sandbox(parse(verifier) if isinstance(verifier, str) else verifier and check(verifier))
    except KDError:
        return False


def _verify_text(verifier: dict[str, Any], answer: str | None, reference: str | None) -> Verdict:
    expected = verifier.get("answer") or reference
    if expected is None:
        return Verdict(None, "no answer to compare with")
    if answer is None:
        return Verdict(0.0, "no answer, or unfinished")
    if verifier["kind"] == "exact":
        right = _normal(answer) == _normal(expected)
        return Verdict(float(right), "equal" if right else "not equal")
    try:
        wanted = [float(expected)]
    except ValueError:
        wanted = _last_number(expected)
    found = _last_number(answer)
    if not wanted:
        return Verdict(None, f"the expected answer has no number: {_short(expected)}")
    if not found:
        return Verdict(0.0, "no number")
    tolerance = TOLERANCE if verifier.get("tolerance") is None else verifier["tolerance"]
    if any(math.isclose(one, other, rel_tol=1e-12, abs_tol=tolerance) for one in found for other in wanted):
        return Verdict(1.0, "equal")
    return Verdict(0.0, f"{found[0]:.15g}, expected {wanted[0]:.15g}")


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


_BLANKS = " \u00a0\u2009\u202f'’"
_GROUPED = rf"\d{{1,3}}(?:[{_BLANKS}]\d{{3}})+(?!\d)(?:[.,]\d+)?"
_NUMBER = re.compile(rf"(?<![\w.,])([-+−]?)[$€£]?({_GROUPED}|\d+(?:[.,]\d+)*|[.,]\d+)((?:[eE][+-]?\d+)?)")


def _last_number(text: str) -> list[float]:
    """The readings of the last number of a text, the likelier first; none if it has no number."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return []
    sign, digits, exponent = numbers[-1]
    blocks = re.split(f"[{_BLANKS}]", digits)
    readings = _readings("".join(blocks))
    if len(blocks) > 1:  # or a list of numbers
        readings += _readings(blocks[-1])
    return [float(f"{'-' if sign in '-−' and sign else ''}{reading}{exponent}") for reading in readings]


def _readings(digits: str) -> list[str]:
    """How digits with points and commas may be meant, in Python's notation."""
    separators = re.sub(r"\d", "", digits)
    whole = re.sub("[.,]", "", digits)
    if not separators:
        return [whole]
    head, tail = re.split(r"[.,](?=\d+$)", digits)
    decimal = re.sub("[.,]", "", head) + "." + tail
    if len(separators) > 1:  # the last is a decimal one only if it differs
        return [decimal if separators[-1] != separators[0] else whole]
    if len(tail) == 3 and 1 <= len(head) <= 3 and head != "0":
        return [whole, decimal] if separators == "," else [decimal, whole]
    return [decimal]


# --- programs ---------------------------------------------------------------------------------------------------------


def _limits(verifier: dict[str, Any]) -> Limits:
    """The time limit is one of CPU time: on a busy machine an answer is as right as on an idle one."""
    seconds = verifier.get("time_limit_seconds") or TIME_LIMIT_SECONDS
    memory_mb = max(64, math.ceil(verifier.get("memory_limit_mb") or MEMORY_LIMIT_MB))
    return Limits(wall_seconds=2 * seconds + 2, cpu_seconds=math.ceil(seconds), memory_mb=memory_mb)


def _failure(outcome: Outcome, where: str) -> str | None:
    """Why a run counts as failed, None if it ended well."""
    if outcome.status == "ok":
        return None
    if outcome.status == "compile":
        return "does not compile"
    if outcome.status == "error":
        return f"exit code {outcome.exit_code}{where}"
    return {"memory": "too much memory", "output": "too much output"}.get(outcome.status, outcome.status) + where


def _verify_stdio(verifier: dict[str, Any], program: str, tests: list[dict[str, str]], sandbox: Sandbox) -> Verdict:
    for number, test in enumerate(tests, 1):
        where = f" on test {number} of {len(tests)}"
        outcome = sandbox.run(verifier["language"], program, test["input"], _limits(verifier))
        failure = _failure(outcome, where)
        if failure is None:
            if verifier.get("checker"):
                right = _checks(verifier["checker"], test, outcome.stdout, sandbox)
            else:
                right = _same_words(outcome.stdout, test["output"])
            failure = None if right else "wrong output" + where
        if failure:
            return Verdict(0.0, failure)
    return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")


def _same_words(output: str, expected: str) -> bool:
    found, wanted = output.split(), expected.split()
    return len(found) == len(wanted) and all(a == b or _close(a, b) for a, b in zip(found, wanted))


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _close(found: str, wanted: str) -> bool:
    """Whether the expected word has a decimal point and the other is a number as good as equal to it."""
    if "." not in wanted or not (_DECIMAL.fullmatch(wanted) and _DECIMAL.fullmatch(found)):
        return False
    return math.isclose(float(found), float(wanted), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _checks(checker: str, test: dict[str, str], output: str, sandbox: Sandbox) -> bool:
    """What a checker says of an output; KDError if it is no good even with the expected one."""
    for given in (output, test["output"]):
        files = {"input.txt": test["input"], "expected.txt": test["output"], "output.txt": given}
        outcome = sandbox.run("python", checker, files=files)
        said = outcome.stdout.split()
        if outcome.status == "ok" and said and _DECIMAL.fullmatch(said[-1]):
            return float(said[-1]) >= 1 and given is output
    raise KDError(f"the checker fails: {_failure(outcome, '') or 'it prints no number'}")


_SECRET = secrets.token_bytes(32)
_HARNESS = """
import json, os, sys, types

def main():
    task = json.loads(sys.stdin.buffer.read())
    module = sys.modules["solution"] = types.ModuleType("solution")
    number = 0
    try:
        for part in ("setup", "program"):
            exec(compile(task[part], part, "exec"), module.__dict__)
        for number, test in enumerate(task["tests"], 1):
            exec(compile(test, "test", "exec"), module.__dict__)
        said = "passed"
    except BaseException as error:
        said = f"{type(error).__name__} in " + (f"test {number}" if number else "the program")
    os.write(1, f"{task['secret']}{said}".encode("utf-8", "replace"))
    os._exit(0)

main()
"""


def _verify_asserts(verifier: dict[str, Any], program: str, tests: list[str], sandbox: Sandbox) -> Verdict:
    task = {"setup": verifier.get("setup") or "", "program": program, "tests": tests}
    secret = hmac.new(_SECRET, json.dumps(task).encode(), hashlib.sha256).hexdigest()  # one a program: it can be cached
    outcome = sandbox.run("python", _HARNESS, json.dumps(task | {"secret": secret}), _limits(verifier))
    if failure := _failure(outcome, ""):
        return Verdict(0.0, failure)
    said = outcome.stdout.rpartition(secret)[2] if secret in outcome.stdout else "ended before its tests"
    if said == "passed":
        return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")
    return Verdict(0.0, said)
