"""BugNet: programs of CodeNet before and after the fix of one bug, in Python and C++ (code: CDLA-Permissive-2.0).

    kd cache-teacher --examples bugnet-python --data-path bugnet/ --out data/bugnet

A folder holds ``{Python,C++}_{train,validation,test}.jsonl`` and may hold ``problem_descriptions.json`` and
``problem_tests.json``. The data set's own splits are not kept: ours go by problem. An answer is judged by running it
if there is a test, else by comparing it. The verifier's ``baseline`` is the program with the bug: the answer of a
model that copies its input.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kdcache.errors import KDError, UsageError, first_line
from kdcache.examples import files, templates
from kdcache.examples.dataset import DataSet, Draft, Rejected, optional, stdio, text

LAYOUT = ("problem_id", "language", "fail", "pass")
SPLITS = ("train", "validation", "test")
VERIFIER_LANGUAGES = {"Python": "python", "C++": "cpp"}


def rows(place: str, local: bool, language: str) -> Iterator[files.Row]:
    """Yield the rows of the language's three files, or of one file, with their problem's description and tests."""
    path = Path(place) if local else _download(place, language)
    paths = [path] if path.is_file() else [p for s in SPLITS if (p := path / f"{language}_{s}.jsonl").is_file()]
    if not paths:
        raise UsageError(f"--data-path {path}: expected {language}_train.jsonl, {language}_validation.jsonl or similar")
    folder = paths[0].parent
    descriptions, tests = _by_problem(folder, "description"), _by_problem(folder, "input", "output")
    for file in paths:
        for row in files.read(file):
            problem = row.get("problem_id")
            description = row.get("description") or next(iter(descriptions[problem]), {}).get("description")
            yield row | {"description": description} | {"tests": tests[problem] or [row]}


def _by_problem(folder: Path, *columns: str) -> dict[Any, list[files.Row]]:
    """Return the rows of problem_descriptions.json or problem_tests.json by problem; none if there is no such file."""
    path = folder / ("problem_descriptions.json" if columns == ("description",) else "problem_tests.json")
    by_problem: dict[Any, list[files.Row]] = defaultdict(list)
    for row in files.read(path) if path.is_file() else ():
        if any(column not in row for column in ("problem_id", *columns)):
            raise KDError(f"{path}: expected rows of problem_id, {', '.join(columns)}; found: {', '.join(row)}")
        by_problem[row["problem_id"]].append(row)
    return by_problem


def _download(name: str, language: str) -> Path:
    """Download the files themselves: ``datasets`` no longer runs loading scripts such as this data set's."""
    from huggingface_hub import snapshot_download

    wanted = [f"{language}_*.jsonl", "problem_*.json"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:
        raise KDError(f"{name}: could not be had from the Hub: {first_line(error)}; use --data-path") from None


def take(row: files.Row, language: str) -> Draft:
    bug, fix = text(row, "fail"), text(row, "pass")
    if row.get("language") != language:
        raise Rejected(f"its language is {row.get('language')}, expected {language}")
    if bug.strip() == fix.strip():
        raise Rejected("its fix changes nothing")
    description = _plain(optional(row, "description"))
    template = templates.BUG_FIX_DESCRIBED if description else templates.BUG_FIX
    verifier = stdio(VERIFIER_LANGUAGES[language], row["tests"]) or {"kind": "exact"}
    return Draft(
        instruction=template.format(language=language, description=description),
        input=bug,
        fence=VERIFIER_LANGUAGES[language],
        completion=fix,
        reference=fix,
        group_id=optional(row, "problem_id") or None,
        task="bug-fix",
        verifier=verifier | {"baseline": bug},
        content=(bug,),
    )


def _plain(page: str) -> str:
    """Return the text of one of CodeNet's descriptions, which are HTML, without tags and empty lines."""
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", page)).splitlines())
    return "\n".join(line for line in lines if line)


DATA_SETS = {
    f"bugnet-{verifier_language}": DataSet(
        "alexjercan/bugnet", (LAYOUT,), partial(take, language=language), rows=partial(rows, language=language)
    )
    for language, verifier_language in VERIFIER_LANGUAGES.items()
}
