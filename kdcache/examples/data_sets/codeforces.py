"""Codeforces problems with official tests, to be answered by the teacher itself (CC BY 4.0, open-r1).

    kd cache-teacher --examples codeforces --mode sample --samples 4 --max-tokens 4096 --out data/codeforces

A problem is a contest and an index, in whatever language the answer is to be. Tests that the site truncates ("...") are
left out.
"""

from __future__ import annotations

from typing import Any

from kdcache.examples import files
from kdcache.examples.dataset import DataSet, Draft, Rejected, optional, stdio, text

LAYOUT = ("prompt", "official_tests", "input_mode")


def take(row: files.Row) -> Draft:
    prompt = text(row, "prompt")
    if row.get("input_mode") not in (None, "stdio"):
        raise Rejected(f"input_mode is {row['input_mode']!r}; only stdio can be checked")
    verifier = verifier_of(row, row.get("official_tests") or row.get("examples"), language_of(row, prompt))
    if verifier is None:
        raise Rejected("no tests (columns 'official_tests' and 'examples' hold none that is whole)")
    return Draft(
        instruction=prompt, group_id=problem(row), task="competition", verifier=verifier, content=own_words(row, prompt)
    )


def verifier_of(row: files.Row, tests: Any, language: str) -> dict[str, Any] | None:
    """Return the verifier of a row with these tests; None if no test is complete."""

    def is_whole(test: Any) -> bool:
        return isinstance(test, dict) and not any(
            str(test.get(name)).rstrip().endswith("...") for name in ("input", "output")
        )

    return stdio(
        language,
        [test for test in (tests if isinstance(tests, list) else []) if is_whole(test)],
        time_limit_seconds=_number(row.get("time_limit")),
        memory_limit_mb=_number(row.get("memory_limit")),
        checker=optional(row, "generated_checker"),
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def language_of(row: files.Row, prompt: str) -> str:
    """Return the language of the answer: the row's, else that of the fence which the prompt asks for."""
    language = str(row.get("language") or ("cpp" if "```cpp" in prompt else "python")).lower()
    return "cpp" if language.startswith(("cpp", "c++")) else language


def problem(row: files.Row) -> str | None:
    """Return contest/index, as the data sets' ids are; None (a hash of the prompt is used) if both are missing."""
    if row.get("contest_id") and row.get("index"):
        return f"{row['contest_id']}/{row['index']}"
    return None if row.get("id") is None else str(row["id"])


def own_words(row: files.Row, prompt: str) -> tuple[str, ...]:
    """Return the problem's statement without the instructions around it."""
    return (optional(row, "description") or prompt.partition("# Problem\n")[2] or prompt,)


DATA_SETS = {
    "codeforces": DataSet(
        "open-r1/codeforces", (LAYOUT,), take, config="verifiable-prompts", within="verifiable-prompts/*"
    )
}
