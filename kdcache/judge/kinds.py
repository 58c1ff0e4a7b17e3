"""The kinds of verifiers, and how one is read from a cache's column. Adding a kind touches this file and verifiers.py.

A sample's verifier is a JSON object; code needs a sandbox (kdcache/judge/sandbox/):

* {"kind": "stdio", "language": "python" or "cpp", "tests": [{"input", "output"}, ...]}, optionally
  "time_limit_seconds", "memory_limit_mb" and "checker". Without a checker, outputs are compared word by word
  (kdcache/judge/compare.py). A checker is a Python program that is called with the paths of input, expected output and
  output. The last word that it prints is 1 or True for a right output (the data set's own rule), or a score: an output
  is right if its score reaches the 100 that the expected output gets;
* {"kind": "asserts", "language": "python", "tests": ["assert f(1) == 2", ...]}, optionally "setup", which is run
  before, and the two limits;
* {"kind": "exact", "answer"}: equal after Unicode's NFC and with runs of whitespace as one blank;
* {"kind": "numeric", "answer", "tolerance" (1e-6)}: the last number of the answer, with signs, and separators as
  English or Spanish write them: where 1,234 or 1.234 has two readings, either may be right;
* {"kind": "none"}: not judged.

The answer of exact and numeric is the sample's reference unless the verifier gives one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KDError

KINDS = ("stdio", "asserts", "exact", "numeric", "none")
LANGUAGES = {"stdio": ("python", "cpp"), "asserts": ("python",)}  # of the kinds that run programs
TIME_LIMIT_SECONDS, MEMORY_LIMIT_MB, TOLERANCE = 10.0, 512, 1e-6
MOST_TIME_LIMIT_SECONDS, MOST_MEMORY_LIMIT_MB = 60.0, 4096  # that a verifier may set


@dataclass(frozen=True)
class StdioTest:
    """What a program reads, and what it should write."""

    input: str
    output: str


@dataclass(frozen=True)
class Verifier:
    """A checked verifier, with the defaults filled in."""

    kind: str
    language: str = ""
    tests: tuple[StdioTest, ...] | tuple[str, ...] = ()  # of stdio, and of asserts
    setup: str = ""
    checker: str = ""
    time_limit_seconds: float = TIME_LIMIT_SECONDS
    memory_limit_mb: float = MEMORY_LIMIT_MB
    answer: str | None = None
    tolerance: float = TOLERANCE

    @property
    def runs_code(self) -> bool:
        """Whether judging runs a program."""
        return self.kind in LANGUAGES


def parse(text: str | None) -> Verifier | None:
    """Return the verifier in a cache's column, or None where there is none; KDError if it is not a verifier."""
    if text is None or not text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KDError(f"a verifier is not JSON: {error}") from None
    return check(value)


def check(value: Any) -> Verifier:
    """Return a JSON value as a verifier; KDError, with the value, if it is none."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in KINDS:
        raise KDError(f"a verifier is an object whose kind is one of {', '.join(KINDS)}; found {short(value)}")

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise KDError(f"a verifier of kind {kind} needs {what}; found {short(value)}")

    if kind in LANGUAGES:
        return _check_code(kind, value, need)
    if kind == "none":
        return Verifier(kind)
    answer = value.get("answer")
    is_answer = answer is None or (isinstance(answer, str | int | float) and not isinstance(answer, bool))
    need(is_answer, 'an "answer" that is a string or a number')
    need(_is_positive(value.get("tolerance") or 1), 'a "tolerance" that is a number of at least 0')
    tolerance = TOLERANCE if value.get("tolerance") is None else value["tolerance"]
    return Verifier(kind, answer=None if answer in (None, "") else str(answer), tolerance=tolerance)


def _check_code(kind: str, value: dict[str, Any], need: Callable[[bool, str], None]) -> Verifier:
    """Return a verifier that runs programs; ``need`` raises KDError."""
    need(value.get("language") in LANGUAGES[kind], f'a "language", {" or ".join(LANGUAGES[kind])}')
    tests: Any = value.get("tests")
    need(isinstance(tests, list) and bool(tests), '"tests", at least one')
    if kind == "stdio":
        keys = ("input", "output")
        are_tests = all(
            isinstance(test, dict) and all(isinstance(test.get(key), str) for key in keys) for test in tests
        )
        need(are_tests, 'an "input" and an "output" in each test, both strings')
    else:
        need(all(isinstance(test, str) for test in tests), "tests that are strings of Python")
    for name in ("setup", "checker"):
        need(isinstance(value.get(name) or "", str), f'a "{name}" that is a string')
    for name, most in (("time_limit_seconds", MOST_TIME_LIMIT_SECONDS), ("memory_limit_mb", MOST_MEMORY_LIMIT_MB)):
        limit = value.get(name) or 1
        need(_is_positive(limit) and limit <= most, f'a "{name}" that is a positive number, at most {most:g}')
    is_stdio = kind == "stdio"
    return Verifier(
        kind,
        language=value["language"],
        tests=tuple(StdioTest(test["input"], test["output"]) if is_stdio else test for test in tests),
        setup=value.get("setup") or "",
        checker=value.get("checker") or "",
        time_limit_seconds=value.get("time_limit_seconds") or TIME_LIMIT_SECONDS,
        memory_limit_mb=value.get("memory_limit_mb") or MEMORY_LIMIT_MB,
    )


def runs_code(verifier: str | dict[str, Any] | None) -> bool:
    """Return whether judging by a verifier runs a program. What is not a verifier runs none."""
    try:
        checked = parse(verifier) if isinstance(verifier, str) or verifier is None else check(verifier)
    except KDError:
        return False
    return checked is not None and checked.runs_code


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def short(value: Any) -> str:
    """Return a JSON value as text, cut to what fits into a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:200] + "..."
