"""Judges completions by their verifiers. Invariant: only what was judged has a reward: 1 is right, 0 is wrong.

    python -c 'from kdcache.judge.verifiers import verify; print(verify({"kind": "numeric", "answer": "7"}, "It is 7."))'

A verifier says how a completion is judged (kdcache/judge/kinds.py), a verdict is what came of it. The verdict of a
completion that could not be judged has the reward None, and says why.

Asserts run in a process that holds the tests and never the answer (kdcache/judge/asserts/). Another process holds the
answer and is asked for the values of its functions, one call at a time. So an answer can write nothing but values, and
a value has to be right. The setup belongs to the tests: the answer sees its imports, and those of its classes that
have no test in them. Some tests are not judged: those that pass their own functions or objects to the answer, compare
objects of the answer with each other, catch exceptions of its classes, or assert nothing. A name that neither the
tests nor Python define is the answer's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDError
from kdcache.judge import asserts, compare, kinds
from kdcache.judge.answers import extract
from kdcache.judge.asserts import values
from kdcache.judge.kinds import StdioTest, Verifier
from kdcache.judge.sandbox import Sandbox
from kdcache.judge.sandbox.limits import Limits, Outcome
from kdcache.judge.sandbox.pool import side_by_side
from kdcache.progress import ShowProgress, silent

#: A verifier as a cache's column holds it, and the reference that it may compare with.
Judge = tuple[str | None, str | None]


@dataclass(frozen=True)
class Verdict:
    """What judging a completion has found."""

    reward: float | None  # 1 right, 0 wrong, None not judged
    reason: str


def verify(
    verifier: dict[str, Any] | str | None,
    completion: str,
    reference: str | None = None,
    sandbox: Sandbox | None = None,
    max_tests: int | None = None,
) -> Verdict:
    """Return the verdict on a completion. An invalid verifier or a sandbox that fails gives no reward, and the reason."""
    try:
        parsed = kinds.parse(verifier) if isinstance(verifier, str) or verifier is None else kinds.check(verifier)
        if parsed is None or parsed.kind == "none":
            return Verdict(None, "no verifier")
        answer = extract(completion, parsed)
        if not parsed.runs_code:
            return _verify_text(parsed, answer, reference)
        if answer is None:
            return Verdict(0.0, "no code, or unfinished")
        if sandbox is None:
            raise KDError("the answer is a program, which needs a sandbox")
        run_tests = _verify_stdio if parsed.kind == "stdio" else _verify_asserts
        return run_tests(parsed, answer, parsed.tests[:max_tests], sandbox)
    except KDError as error:
        return Verdict(None, str(error))


def best(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the first verdict with the highest reward; one without a reward only if none has one."""
    return max(verdicts, key=lambda verdict: -1.0 if verdict.reward is None else verdict.reward)


def verify_many(
    items: Sequence[tuple[dict[str, Any] | str | None, str, str | None]],
    sandbox: Sandbox | None,
    workers: int | None = None,
    show: ShowProgress = silent,
    max_tests: int | None = None,
) -> list[Verdict]:
    """Return the verdicts of (verifier, completion, reference), in order; programs run side by side.

    KDError if there is code to run and no sandbox to run it in. What is wrong with one item is its verdict's reason.
    """
    if any(kinds.runs_code(verifier) for verifier, _, _ in items):
        if sandbox is None:
            raise KDError("some of the answers are programs, which need a sandbox")
        sandbox.check()
    return side_by_side(lambda item: verify(*item, sandbox, max_tests), items, workers, show, "answers")


def sandbox_for(verifiers: Iterable[str | None], unsafe: bool = False) -> Sandbox | None:
    """Return the sandbox in which answers are run; None if no verifier runs any. KDError if it cannot run programs."""
    if not any(map(kinds.runs_code, verifiers)):
        return None
    sandbox = Sandbox(unsafe)
    sandbox.check()
    return sandbox


# --- exact and numeric ------------------------------------------------------------------------------------------------


def _verify_text(verifier: Verifier, answer: str | None, reference: str | None) -> Verdict:
    expected = reference if verifier.answer is None else verifier.answer
    if expected is None:
        return Verdict(None, "no answer to compare with")
    if answer is None:
        return Verdict(0.0, "no answer, or unfinished")
    if verifier.kind == "exact":
        is_equal = compare.same_text(answer, expected)
        return Verdict(float(is_equal), "equal" if is_equal else "not equal")
    return _verify_number(verifier, answer, expected)


def _verify_number(verifier: Verifier, answer: str, expected: str) -> Verdict:
    try:
        wanted = [float(expected)]
    except ValueError:
        wanted = compare.last_number(expected)
        # A reference may be a whole explanation; the verifier's own answer has to be one number.
        if verifier.answer is not None and compare.count_numbers(expected) > 1:
            return Verdict(None, f"the expected answer is not one number: {kinds.short(expected)}")
    readings = compare.last_number(answer)
    if not wanted:
        return Verdict(None, f"the expected answer has no number: {kinds.short(expected)}")
    if not readings:
        return Verdict(0.0, "no number")
    if any(
        math.isclose(reading, other, rel_tol=1e-12, abs_tol=verifier.tolerance)
        for reading in readings
        for other in wanted
    ):
        return Verdict(1.0, "equal")
    return Verdict(0.0, f"{readings[0]:.15g}, expected {wanted[0]:.15g}")


# --- programs ---------------------------------------------------------------------------------------------------------

_MISSING_MODULE = re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')", re.ASCII)


def _limits(verifier: Verifier, expected: str = "") -> Limits:
    """Return the limits of a run. The time limit counts CPU time: a busy machine makes no answer wrong."""
    return Limits(
        wall_seconds=2 * verifier.time_limit_seconds + 2,
        cpu_seconds=math.ceil(verifier.time_limit_seconds),
        memory_mb=max(64, math.ceil(verifier.memory_limit_mb)),
        output_bytes=max(Limits.output_bytes, 2 * len(expected.encode("utf-8", "replace")) + 65_536),
    )


def _failure(outcome: Outcome, where: str) -> str | None:
    """Return why a run has failed; None if it ended well."""
    if outcome.status == "ok":
        return None
    if outcome.status == "compile":
        return "does not compile"
    if outcome.status == "error":
        missing = _MISSING_MODULE.fullmatch(outcome.stderr.rstrip().rpartition("\n")[2][:200])
        return f"exit code {outcome.exit_code}{where}" + (f": {missing[1]}" if missing else "")
    return {"memory": "too much memory", "output": "too much output"}.get(outcome.status, outcome.status) + where


def _verify_stdio(verifier: Verifier, program: str, tests: Sequence[Any], sandbox: Sandbox) -> Verdict:
    for number, test in enumerate(tests, 1):
        where = f" on test {number} of {len(tests)}"
        stdin = test.input.replace("\r\n", "\n")
        outcome = sandbox.run(verifier.language, program, stdin, _limits(verifier, test.output))
        failure = _failure(outcome, where)
        if failure is None:
            if verifier.checker:
                is_right = _passes_checker(verifier.checker, test, outcome.stdout, sandbox)
            else:
                is_right = compare.same_words(outcome.stdout, test.output)
            failure = None if is_right else "wrong output" + where
        if failure:
            return Verdict(0.0, failure)
    return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")


def _passes_checker(checker: str, test: StdioTest, output: str, sandbox: Sandbox) -> bool:
    """Return whether a checker accepts an output; KDError unless it gives the expected output full marks: 1 or 100."""
    marks, _ = _marks(checker, test, output, sandbox)
    if marks == 1:
        return True
    full_marks, word = _marks(checker, test, test.output, sandbox)
    if full_marks not in (1, 100):
        raise KDError(f"the checker fails: it says {word} of the expected output, and not 1 or 100")
    return full_marks == 100 and marks is not None and marks >= 100


def _marks(checker: str, test: StdioTest, output: str, sandbox: Sandbox) -> tuple[float | None, str]:
    """Return the marks that a checker gives an output, and its last word; None, and why, if it gives none."""
    files = {"input.txt": test.input, "expected.txt": test.output, "output.txt": output}
    outcome = sandbox.run("python", checker, files=files)
    word = (outcome.stdout.split() or [""])[-1]
    failure = _failure(outcome, "")
    if failure is None and word in ("True", "False"):
        return float(word == "True"), word
    if failure is None and (marks := compare.as_number(word)) is not None:
        return marks, word
    return None, failure or "no number"


def _verify_asserts(verifier: Verifier, program: str, tests: Sequence[Any], sandbox: Sandbox) -> Verdict:
    task = values.encode((verifier.setup, list(tests)), str)
    jobs = [("judge", {"task": task}), ("program", {"program.py": program})]
    judge, answer = sandbox.run_joined(asserts.script(), jobs, _limits(verifier))
    failure = _failure(answer, "")
    if failure and answer.status != "error":  # it exceeded a limit
        return Verdict(0.0, failure)
    if judge_failure := _failure(judge, ""):
        return Verdict(0.0, f"{judge_failure} in the tests")
    # The judge's word counts before the answer's exit code: an answer that still writes when its judge is done also fails.
    result, reason = values.decode(judge.stdout, values.only_plain)
    if result == "passed":
        return Verdict(1.0, f"passed {len(tests)} of {len(tests)} tests")
    return Verdict(None if result == "unjudged" else 0.0, reason or failure or "ended before its tests did")
