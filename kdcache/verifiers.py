"""Is this answer right? What a sample's ``verifier`` (JSON, in its cache row) says, asked of a completion.

    {"kind": "stdio", "language": "python", "tests": [{"input": "3 4", "output": "7"}], "time_limit_seconds": 2}
    {"kind": "asserts", "language": "python", "setup": "import math", "tests": ["assert f(2) == 4"]}
    {"kind": "exact", "answer": "..."}      without an answer: the row's reference
    {"kind": "numeric", "answer": "18", "tolerance": 1e-6}
    {"kind": "none"}

A row that cannot be judged has no reward and says why; a program that fails, in whatever way, has reward 0. Programs are
run in ``sandbox.py``, and nowhere else.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDError
from kdcache.sandbox import Limits, Outcome, Sandbox, side_by_side

#: kind -> what it cannot do without
KINDS: dict[str, tuple[str, ...]] = {
    "stdio": ("language", "tests"),
    "asserts": ("tests",),
    "exact": (),
    "numeric": ("answer",),
    "none": (),
}
LANGUAGES = ("python", "cpp")
FLOAT_TOLERANCE = 1e-6  # of numbers with a decimal point, relative or absolute, as Codeforces' own checkers take it
#: Where a row states no limit. Python starts in some milliseconds, and a judge's machine is not this one.
TIME_SECONDS, MEMORY_MB = 10.0, 512

Item = tuple[str | None, str, str | None]  # verifier, completion, reference


@dataclass(frozen=True)
class Verdict:
    reward: float | None  # 1 right, 0 wrong, None: there is nothing to judge it by
    reason: str


def parse(verifier: str | None) -> dict[str, Any] | None:
    """The verifier as an object; None for none. KDError names what is missing or not known."""
    if verifier is None:
        return None
    try:
        found = json.loads(verifier)
    except ValueError as error:
        raise KDError(f"the verifier is not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        kind = found.get("kind") if isinstance(found, dict) else found
        raise KDError(f"verifier of kind {kind!r}; known: {', '.join(KINDS)}")
    missing = [name for name in KINDS[found["kind"]] if not found.get(name)]
    if missing:
        raise KDError(f"a verifier of kind {found['kind']} needs {missing[0]!r}; found: {', '.join(found)}")
    language = found.get("language", "python")
    if language not in LANGUAGES or (found["kind"] == "asserts" and language != "python"):
        raise KDError(f"a verifier of kind {found['kind']} cannot run {language!r}")
    return None if found["kind"] == "none" else found


def needs_sandbox(verifier: str | None) -> bool:
    """Whether judging runs a program. What cannot be parsed runs none."""
    try:
        found = parse(verifier)
    except KDError:
        return False
    return found is not None and found["kind"] in ("stdio", "asserts")


def verify(verifier: str | None, completion: str, reference: str | None, sandbox: Sandbox | None) -> Verdict:
    """Judge one completion. ``sandbox`` may be None where nothing is run; KDError if it is needed, or fails."""
    try:
        found = parse(verifier)
    except KDError as error:
        return Verdict(None, str(error))
    if found is None:
        return Verdict(None, "no verifier")
    answer = extract(completion, found)
    if answer is None:
        return Verdict(0.0, "no answer: the reasoning does not end")
    if not answer.strip():
        return Verdict(0.0, "no answer")
    kind = found["kind"]
    if kind == "exact":
        wanted = found.get("answer", reference)
        if wanted is None:
            return Verdict(None, "no answer to compare with")
        return _yes(_words(answer) == _words(_unfenced(wanted)), "equal", "not equal")
    if kind == "numeric":
        return _numeric(answer, str(found["answer"]), float(found.get("tolerance", FLOAT_TOLERANCE)))
    if sandbox is None:
        raise KDError("this verifier runs a program, and there is no sandbox to run it in")
    return (_stdio if kind == "stdio" else _asserts)(found, answer, sandbox)


def verify_many(
    items: Sequence[Item],
    sandbox: Sandbox | None,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """The verdicts in order; programs side by side."""
    return side_by_side(lambda item: verify(*item, sandbox), items, workers, progress)


# --- the answer in a completion ---------------------------------------------------------------------------------------


def extract(completion: str, verifier: dict[str, Any] | None) -> str | None:
    """What of a completion is the answer: after the reasoning, inside the last <answer>, and of code the last fence.

    None where ``<think>`` is not closed: the answer never came.
    """
    text = completion
    if "</think>" in text:
        text = text.rpartition("</think>")[2]
    elif "<think>" in text:
        return None
    if inside := re.findall(r"<answer>(.*?)(?:</answer>|\Z)", text, re.DOTALL):
        text = inside[-1]
    kind = (verifier or {}).get("kind")
    if kind in ("stdio", "asserts", "exact"):
        return _unfenced(text)
    if kind == "numeric" and (boxed := re.findall(r"\\boxed\{([^{}]*)\}", text)):
        return boxed[-1]
    return text.strip()


def _unfenced(text: str) -> str:
    """The last fenced block, closed or not; the text itself where there is none."""
    fenced = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", text, re.DOTALL | re.MULTILINE)
    return fenced[-1].strip("\n") if fenced else text.strip()


# --- text and numbers -------------------------------------------------------------------------------------------------


def _yes(right: bool, reason: str, otherwise: str) -> Verdict:
    return Verdict(float(right), reason if right else otherwise)


def _words(text: str) -> list[str]:
    """Equal for texts that differ in Unicode composition and white space alone."""
    return unicodedata.normalize("NFC", text).split()


_NUMBER = re.compile(r"[-−+]?\d(?:[\d.,  ]*\d)?")


def _numeric(answer: str, wanted: str, tolerance: float) -> Verdict:
    """The last number of the answer, in any way it may be meant, against the wanted one."""
    said, right = _NUMBER.findall(answer), _NUMBER.findall(wanted)
    if not right:
        return Verdict(None, f"the wanted answer {wanted!r} is no number")
    if not said:
        return Verdict(0.0, "no number in the answer")
    value = _readings(right[-1])[0]
    close = any(math.isclose(x, value, rel_tol=tolerance, abs_tol=tolerance) for x in _readings(said[-1]))
    return _yes(close, f"{said[-1]} is right", f"{said[-1]} is not {right[-1]}")


def _readings(number: str) -> list[float]:
    """1,234.5 and 1.234,5 are told by their last separator; 1,234 and 1.234 may each be one of two, the English first."""
    text = re.sub(r"[  +]", "", number).replace("−", "-")
    if "," in text and "." in text:
        thousands = "," if text.rindex(".") > text.rindex(",") else "."
        return [_float(text.replace(thousands, "").replace(",", "."))]
    for separator in ",.":
        if separator in text:
            grouped = re.fullmatch(rf"-?\d{{1,3}}(\{separator}\d{{3}})+", text) is not None
            whole, decimal = _float(text.replace(separator, "")), _float(text.replace(separator, "."))
            if text.count(separator) > 1:
                return [whole]
            return ([whole, decimal] if separator == "," else [decimal, whole]) if grouped else [decimal]
    return [_float(text)]


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- programs ---------------------------------------------------------------------------------------------------------


def _limits(verifier: dict[str, Any]) -> Limits:
    """Time as the row states it, doubled and a second more: another machine, and a start. Memory as it states it."""
    stated = verifier.get("time_limit_seconds")
    seconds = TIME_SECONDS if stated is None else 2 * float(stated) + 1
    return Limits(
        wall_seconds=2 * seconds + 1,  # it may have to wait for a processor
        cpu_seconds=math.ceil(seconds),
        memory_mb=max(int(verifier.get("memory_limit_mb") or MEMORY_MB), 64),
    )


def _stdio(verifier: dict[str, Any], program: str, sandbox: Sandbox) -> Verdict:
    tests, limits = verifier["tests"], _limits(verifier)
    for number, test in enumerate(tests, 1):
        outcome = sandbox.run(verifier["language"], program, test["input"], limits)
        where = f"test {number} of {len(tests)}"
        if outcome.status != "ok":
            return Verdict(0.0, _failed(outcome, where))
        if verifier.get("checker"):
            right = _checked(verifier["checker"], test, outcome.stdout, sandbox)
            if right is None:
                return Verdict(None, f"the row's checker failed on {where}")
        else:
            right = same_output(outcome.stdout, test["output"])
        if not right:
            return Verdict(0.0, f"wrong answer on {where}")
    return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")


def _failed(outcome: Outcome, where: str) -> str:
    last = outcome.stderr.strip().rpartition("\n")[2][:120]
    words = {"error": f"exit code {outcome.exit_code}", "compile": "does not compile"}
    return f"{words.get(outcome.status, outcome.status)} on {where}" + (f": {last}" if last else "")


def same_output(said: str, wanted: str) -> bool:
    """Word for word, white space aside, as judges do; a wanted number with a decimal point to FLOAT_TOLERANCE."""
    a, b = said.split(), wanted.split()
    return len(a) == len(b) and all(x == y or _near(x, y) for x, y in zip(a, b))


def _near(said: str, wanted: str) -> bool:
    if not re.fullmatch(r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?", wanted):
        return False
    return math.isclose(_float(said), float(wanted), rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE)


def _checked(checker: str, test: dict[str, str], said: str, sandbox: Sandbox) -> bool | None:
    """A problem's own checker (Python: input, right output and given output as files; it prints 1 or a full score)."""
    files = {"input": test["input"], "correct_output": test["output"], "solution_output": said}
    outcome = sandbox.run("python", checker, "", Limits(), files)
    try:
        return float(outcome.stdout.split()[0]) >= 1 if outcome.status == "ok" else None
    except (IndexError, ValueError):
        return None


#: Runs what it is given, then the tests. That the tests came to their end is told by a word that the program was never
#: told: to leave early, whatever the exit code, or to print "passed" is no pass.
_HARNESS = """
import json, sys
def main():
    given = json.loads(sys.stdin.read())
    space = {"__name__": "answer"}
    for part in (given["setup"], given["program"], *given["tests"]):
        exec(compile(part, "answer", "exec"), space)
    sys.stdout.write("\\n" + given["word"])
    sys.stdout.flush()
main()
"""


def _asserts(verifier: dict[str, Any], program: str, sandbox: Sandbox) -> Verdict:
    """Limits of this: a program that searches its own process for the harness can find the word. None does by chance."""
    word = secrets.token_hex(16)
    given = {"setup": verifier.get("setup") or "", "program": program, "tests": verifier["tests"], "word": word}
    outcome = sandbox.run("python", _HARNESS, json.dumps(given), _limits(verifier))
    if outcome.status == "ok" and outcome.stdout.endswith("\n" + word):
        return Verdict(1.0, f"passed {len(verifier['tests'])} tests")
    if outcome.status == "ok":
        return Verdict(0.0, "left before the tests were done")
    return Verdict(0.0, _failed(outcome, "the tests"))
