"""Codeforces problems with official tests, to be answered by the teacher itself (CC BY 4.0, open-r1).

    kd cache-teacher --examples codeforces --mode sample --samples 4 --max-tokens 4096 --out data/codeforces

The problem is contest and index, whatever language it is asked in. Tests that the site shows cut off ("...") are left out.
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
    """Of the answer: what the row says, else the fence that the prompt asks for."""
    said = str(row.get("language") or ("cpp" if "```cpp" in prompt else "python")).lower()
    return "cpp" if said.startswith(("cpp", "c++")) else said


def problem(row: files.Row) -> str | None:
    """contest/index, as the data sets' ids are; None (a hash of the prompt) where neither is there."""
    if row.get("contest_id") and row.get("index"):
        return f"{row['contest_id']}/{row['index']}"
    return None if row.get("id") is None else str(row["id"])


def own_words(row: files.Row, prompt: str) -> tuple[str, ...]:
    """The statement without the instructions around it."""
    return (optional(row, "description") or prompt.partition("# Problem\n")[2] or prompt,)


DATA_SETS = {
    "codeforces": DataSet(
        "open-r1/codeforces", (LAYOUT,), take, config="verifiable-prompts", within="verifiable-prompts/*"
    )
}
