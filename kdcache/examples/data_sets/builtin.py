"""The project's own prompts: English, Spanish, Python and short arithmetic with reasoning (builtin.jsonl, Apache-2.0).

The tasks are interleaved, so that any ``--limit`` holds some of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from kdcache.examples.types import Example


def read(system: str | None) -> Iterator[Example]:
    before = ({"role": "system", "content": system},) if system is not None else ()
    with open(Path(__file__).with_name("builtin.jsonl"), encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Example(
                source="builtin",
                row_id=row["id"],
                messages=(*before, {"role": "user", "content": row["prompt"]}),
                completion=row["completion"],
                group_id=row["id"],
                reference=row["completion"],
                task=row["task"],
                language=row["language"],
            )
