r"""Is this answer right? Invariant: only what was judged has a reward; 1 is right, 0 is wrong, None is not judged.

A sample's verifier is a JSON object; code needs a sandbox (kdcache/judge/sandbox/):

* {"kind": "stdio", "language": "python" or "cpp", "tests": [{"input", "output"}, ...]}, optionally "time_limit_seconds",
  "memory_limit_mb" and "checker". Without a checker, outputs are compared word by word, in order, whatever whitespace is
  between them, case mattering, after Unicode's NFC. Words are equal as text; or as numbers, if either has a decimal point
  or an exponent: within 1e-6, absolute or relative, but only absolute where the expected one is whole. (Codeforces' own
  wcmp and rcmp6 do this, without knowing whole from decimal.) A checker is a Python program called with the paths of input,
  expected output and output; the last word it prints is 1 or True for a right output (the data set's own rule), or a
  score: then right is what reaches the 100 that it gives the expected output;
* {"kind": "asserts", "language": "python", "tests": ["assert f(1) == 2", ...]}, optionally "setup", which is run before,
  and the two limits;
* {"kind": "exact", "answer"}: equal after Unicode's NFC and with runs of whitespace as one blank;
* {"kind": "numeric", "answer", "tolerance" (1e-6)}: the last number of the answer, with signs, and
  separators as English or Spanish write them: where 1,234 or 1.234 has two readings, either may be right;
* {"kind": "none"}: not judged.

The answer of exact and numeric is the sample's reference unless it is given here.

Asserts run in a process that holds the tests and never the answer (kdcache/judge/asserts/); another one holds the answer and
is asked for the values of its functions, one call at a time. So an answer can write nothing but values, and a value has to
be right. Setup is the tests' own: the answer sees its imports, and its classes if no test is in them. Not judged, with the
reason: tests that pass functions or objects of theirs to the answer, compare its objects with each other, catch exceptions
of its own classes, or assert nothing. A name that neither the tests nor Python define is the answer's.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kdcache.errors import KDError
from kdcache.judge import asserts
from kdcache.judge.sandbox import Sandbox
from kdcache.judge.sandbox.limits import Limits, Outcome
from kdcache.judge.sandbox.pool import side_by_side
from kdcache.progress import ShowProgress, silent

KINDS = ("stdio", "asserts", "exact", "numeric", "none")
LANGUAGES = {"stdio": ("python", "cpp"), "asserts": ("python",)}
TIME_LIMIT_SECONDS, MEMORY_LIMIT_MB = 10.0, 512
MOST_TIME_LIMIT_SECONDS, MOST_MEMORY_LIMIT_MB = 60.0, 4096  # that a row may ask for
TOLERANCE = 1e-6
MOST_DIGITS = 400  # of a number that is read as one


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
        for name, most in (("time_limit_seconds", MOST_TIME_LIMIT_SECONDS), ("memory_limit_mb", MOST_MEMORY_LIMIT_MB)):
            value = verifier.get(name) or 1
            need(_is_positive(value) and value <= most, f'a "{name}" that is a positive number, at most {most:g}')
    elif kind in ("exact", "numeric"):
        answer = verifier.get("answer")
        is_answer = answer is None or (isinstance(answer, str | int | float) and not isinstance(answer, bool))
        need(is_answer, 'an "answer" that is a string or a number')
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
    if tagged := _between(answer, "<answer>", "</answer>"):
        answer = tagged[-1]
    if verifier["kind"] in LANGUAGES:
        if "```" in answer:
            blocks = _fenced(answer)
            named = [code for tag, code in blocks if tag.lower() in _TAGS[verifier["language"]]]
            answer = (named or [code for tag, code in blocks if not tag] or [""])[-1]
    elif verifier["kind"] == "exact" and "```" in answer:
        answer = ([code for _, code in _fenced(answer)] or [answer])[-1]
    elif verifier["kind"] == "numeric" and (boxed := re.findall(r"\\boxed\{([^{}]*)\}", answer)):
        answer = boxed[-1]
    return answer if answer.strip() else None


def _between(text: str, opening: str, closing: str) -> list[str]:
    """What stands between an opening and the next closing, all of them; in time that is linear, which no pattern's would be."""
    pieces, position = [], 0
    while (start := text.find(opening, position)) >= 0 and (end := text.find(closing, start + len(opening))) >= 0:
        pieces.append(text[start + len(opening) : end])
        position = end + len(closing)
    return pieces


_TAG = re.compile(r"[\w+#.-]*")


def _fenced(text: str) -> list[tuple[str, str]]:
    """Tag and content of each whole fenced block of Markdown."""
    blocks: list[tuple[str, str]] = []
    tag, content = None, list[str]()
    for line in text.split("\n"):
        mark = line.strip(" \t\r")
        if tag is not None and mark == "```":
            blocks.append((tag, "".join(f"{one}\n" for one in content)))
            tag, content = None, []
        elif tag is not None:
            content.append(line)
        elif mark.startswith("```") and "`" not in mark[3:]:
            tag = _TAG.match(mark[3:].lstrip(" \t"))[0]  # type: ignore[index]  # it matches nothing, too
    return blocks


_ANSWER = re.compile(r"\s*<answer>")


def has_reasoned_form(text: str) -> bool:
    """Whether a text is <think>...</think><answer>...</answer>, neither of them empty, and nothing besides."""
    text = text.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return False
    thoughts = text[len("<think>") : -len("</answer>")]
    end = len(thoughts) - len(thoughts.lstrip())  # something is thought
    while (end := thoughts.find("</think>", end + 1)) >= 0:
        if opening := _ANSWER.match(thoughts, end + len("</think>")):
            return bool(thoughts[opening.end() :].strip())
    return False


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


Judge = tuple[str | None, str | None]  # a verifier, and the reference that it may compare with


def best(verdicts: Sequence[Verdict]) -> Verdict:
    """The first of those with the highest reward; one that could not be judged only where no other was."""
    return max(verdicts, key=lambda verdict: -1.0 if verdict.reward is None else verdict.reward)


def verify_many(
    items: Sequence[tuple[dict[str, Any] | str | None, str, str | None]],
    sandbox: Sandbox | None,
    workers: int | None = None,
    show: ShowProgress = silent,
    max_tests: int | None = None,
) -> list[Verdict]:
    """Verdicts of (verifier, completion, reference), in order, programs side by side.

    KDError if there is code to run and no sandbox to run it in; what is wrong with one item is its verdict's reason.
    """
    if any(runs_code(verifier) for verifier, _, _ in items):
        if sandbox is None:
            raise KDError("some of the answers are programs, which need a sandbox")
        sandbox.check()
    return side_by_side(lambda item: verify(*item, sandbox, max_tests), items, workers, show, "answers")


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
    answer_known = verifier.get("answer") not in (None, "")
    expected = str(verifier["answer"]) if answer_known else reference
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
        if answer_known and len(_NUMBER.findall(_without_fractions(expected))) > 1:
            return Verdict(None, f"the expected answer is not one number: {_short(expected)}")
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
    return " ".join(nfc(text).split())


def nfc(text: str) -> str:
    """Unicode's NFC; but a text in which more than 30 marks follow each other as it is, which would take quadratic time.

    30 is what Unicode's "stream-safe" format allows; no language comes near it.
    """
    run = 0
    if not text.isascii():
        for character in text:
            run = run + 1 if unicodedata.combining(character) else 0
            if run > 30:
                return text
    return unicodedata.normalize("NFC", text)


_BLANKS = " \u00a0\u2009\u202f'’"
_GROUPED = rf"\d{{1,3}}(?:[{_BLANKS}]\d{{3}})+(?!\d)(?:[.,]\d+)?"
_NUMBER = re.compile(rf"(?<![\w.,])([-+−]?)[$€£]?({_GROUPED}|\d+(?:[.,]\d+)*|[.,]\d+)((?:[eE][+-]?\d+)?)")


_FRACTION = re.compile(
    r"(?<![\w.,/])([-+−]?\d{1,30}) ?/ ?(\d{1,30})(?![\w/]|[.,]\d)|([-+−]?)\\[dt]?frac\{ ?([-+−]?\d{1,30}) ?\}\{ ?(\d{1,30}) ?\}"
)


def _without_fractions(text: str) -> str:
    """A text with 0 in the place of each fraction (3/4, \\frac{3}{4}), so that each is one number."""
    return _FRACTION.sub("0", text)


def _last_number(text: str) -> list[float]:
    """The readings of the last number of a text, the likelier first; none if it has no number. A fraction is one number."""
    numbers = list(_NUMBER.finditer(text))
    if not numbers:
        return []
    fractions = list(_FRACTION.finditer(text))
    if fractions and fractions[-1].end() >= numbers[-1].end():
        fraction = fractions[-1]
        sign, above, below = (fraction[3], fraction[4], fraction[5]) if fraction[4] else ("", fraction[1], fraction[2])
        value = int(above.replace("−", "-")) / int(below) if int(below) else math.nan
        return [-value if sign in ("-", "−") else value]
    sign, digits, exponent = numbers[-1].groups()
    if len(digits) + len(exponent) > MOST_DIGITS:
        return []
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


def _limits(verifier: dict[str, Any], expected: str = "") -> Limits:
    """The time limit is one of CPU time: on a busy machine an answer is as right as on an idle one."""
    output = max(Limits.output_bytes, 2 * len(expected.encode("utf-8", "replace")) + 65_536)
    seconds = verifier.get("time_limit_seconds") or TIME_LIMIT_SECONDS
    memory_mb = max(64, math.ceil(verifier.get("memory_limit_mb") or MEMORY_LIMIT_MB))
    return Limits(
        wall_seconds=2 * seconds + 2, cpu_seconds=math.ceil(seconds), memory_mb=memory_mb, output_bytes=output
    )


def _failure(outcome: Outcome, where: str) -> str | None:
    """Why a run counts as failed, None if it ended well."""
    if outcome.status == "ok":
        return None
    if outcome.status == "compile":
        return "does not compile"
    if outcome.status == "error":
        missing = _MISSING.fullmatch(outcome.stderr.rstrip().rpartition("\n")[2][:200])
        return f"exit code {outcome.exit_code}{where}" + (f": {missing[1]}" if missing else "")
    return {"memory": "too much memory", "output": "too much output"}.get(outcome.status, outcome.status) + where


_MISSING = re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')", re.ASCII)


def _verify_stdio(verifier: dict[str, Any], program: str, tests: list[dict[str, str]], sandbox: Sandbox) -> Verdict:
    for number, test in enumerate(tests, 1):
        where = f" on test {number} of {len(tests)}"
        given = test["input"].replace("\r\n", "\n")
        outcome = sandbox.run(verifier["language"], program, given, _limits(verifier, test["output"]))
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
    found, wanted = nfc(output).split(), nfc(expected).split()
    return len(found) == len(wanted) and all(a == b or _close(a, b) for a, b in zip(found, wanted))


_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _close(found: str, wanted: str) -> bool:
    """Whether two words are numbers, one of them with a decimal point or an exponent, and as good as equal."""
    if any(len(word) > MOST_DIGITS or not _DECIMAL.fullmatch(word) for word in (found, wanted)):
        return False
    one, other = float(found), float(wanted)
    if not math.isfinite(one) or not math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return False
    if not wanted.lstrip("+-").isdigit():
        return True
    # A whole number is wanted: a large one exactly, and not spelt otherwise.
    return not found.lstrip("+-").isdigit() and abs(Decimal(found) - Decimal(wanted)) <= Decimal(TOLERANCE)


def _checks(checker: str, test: dict[str, str], output: str, sandbox: Sandbox) -> bool:
    """What a checker says of an output. KDError if it does not give the expected one full marks: 1, or 100."""

    def score(given: str) -> tuple[float | None, str]:
        files = {"input.txt": test["input"], "expected.txt": test["output"], "output.txt": given}
        outcome = sandbox.run("python", checker, files=files)
        said = (outcome.stdout.split() or [""])[-1]
        failure = _failure(outcome, "")
        if failure is None and said in ("True", "False"):
            return float(said == "True"), said
        if failure is None and len(said) <= MOST_DIGITS and _DECIMAL.fullmatch(said):
            return float(said), said
        return None, failure or "no number"

    marks, _ = score(output)
    if marks == 1:
        return True
    full, said = score(test["output"])
    if full not in (1, 100):
        raise KDError(f"the checker fails: it says {said} of the expected output, and not 1 or 100")
    return full == 100 and marks is not None and marks >= 100


def _verify_asserts(verifier: dict[str, Any], program: str, tests: list[str], sandbox: Sandbox) -> Verdict:
    task = asserts.encode((verifier.get("setup") or "", tests), str)
    jobs = [("judge", {"task": task}), ("program", {"program.py": program})]
    judge, answer = sandbox.run_joined(Path(asserts.__file__).read_text(), jobs, _limits(verifier))
    if failure := _failure(answer, ""):
        return Verdict(0.0, failure)
    if failure := _failure(judge, ""):
        return Verdict(0.0, f"{failure} in the tests")
    result, reason = asserts.decode(judge.stdout, asserts.plain)
    if result == "passed":
        return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")
    return Verdict(None if result == "unjudged" else 0.0, reason or "ended before its tests did")
