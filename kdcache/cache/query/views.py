"""The files of sql/: one view or macro each, with a header that says what it answers.

They are plain DuckDB: ``cd CACHE && duckdb`` and ``.read`` them, or set the variable ``cache`` first. A header is a
comment of these parts, of which columns and example are always there, and parameters only for a macro::

    -- NAME: what it answers.
    --
    -- parameters  what it is called with
    -- columns     name (unit): what it holds
    -- note        what can be misunderstood
    -- example     one query
"""

from __future__ import annotations

import re

from kdcache.paths import resource_folder

#: An order in which they can be created: a view may use those before it.
VIEWS = (
    *("vocab", "rewards", "samples", "positions", "candidates", "shards"),
    *("sources", "lengths", "duplicates"),
    *("captured_mass", "captured_mass_curve", "near_deterministic_share", "entropy_histogram", "calibration"),
    *("prompts", "token_ranks", "uncertain_tokens", "disagreements", "hardest_samples", "sample"),
)

#: Stands in for sql/rewards.sql where a cache has no rewards.parquet: early caches, and some on object stores.
NO_REWARDS = (
    "CREATE VIEW rewards AS SELECT NULL::VARCHAR AS sample_id, NULL::FLOAT AS reward, NULL::VARCHAR AS reason LIMIT 0"
)


def source(view: str) -> str:
    """Return the SQL of a view."""
    return (resource_folder("sql") / f"{view}.sql").read_text(encoding="utf-8")


def header(view: str) -> dict[str, str]:
    """Return the parts of a view's header: answers, columns, example, and of some parameters and note."""
    parts: dict[str, str] = {}
    part = "answers"
    for line in source(view).splitlines():
        if not line.startswith("--"):
            break
        text = line.removeprefix(f"-- {view}: ").removeprefix("--").strip()
        if match := re.match(r"(parameters|columns|note|example)  +", text):
            part, text = match[1], text[match.end() :]
        parts[part] = f"{parts.get(part, '')}\n{text}".strip()
    return parts


def signature(view: str) -> str:
    """Return the name as a query writes it: a macro's with its parameters."""
    macro = re.search(r"^CREATE OR REPLACE MACRO (.+?) AS TABLE", source(view), re.MULTILINE)
    return macro[1] if macro else view


def described() -> list[tuple[str, str]]:
    """Return (signature, what it answers) of every view."""
    return [(signature(name), header(name)["answers"]) for name in VIEWS]
