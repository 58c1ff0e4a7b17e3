"""The held-out samples that a student is farthest from, with what every model answered to their prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from kdcache.cache import documents, query
from kdcache.storage import Location
from trainer.evaluate.folder import COPY, TEACHER, Evaluation

WORST = 20  # samples on the page
LEAST_TOKENS = 4  # of a sample: the KL of fewer says little


@dataclass(frozen=True)
class WorstSample:
    """One sample as report.json lists it."""

    sample_id: str
    student: str  # label of the model that it is worst for
    kl: float  # nats per token
    tokens: float
    prompt_id: str
    origin: str
    prompt: str
    completion: str
    reference: str | None
    answers: dict[str, str]  # label -> its first answer to the prompt


def worst_samples(cache: Location, evaluation: Evaluation, methods: Mapping[str, str]) -> list[WorstSample]:
    """Return the WORST samples of the distilled student, or else of the last one measured, by KL per token.

    ``methods``: label -> method of training. The list is empty where no student was measured on this cache.
    """
    students = [entry for entry in evaluation.entries if entry.label not in (TEACHER, COPY)]
    if not students or documents.read_plan(cache)["fingerprint"] not in evaluation.settings["caches"]:
        return []
    student = next((entry for entry in students if methods.get(entry.label) == "kd"), students[-1])
    forced = pq.read_table(
        evaluation.path / student.folder / "forced.parquet", columns=["sample_id", "tokens", "kl"]
    ).to_pylist()
    long_enough = [row for row in forced if row["tokens"] >= LEAST_TOKENS]
    worst = sorted(long_enough, key=lambda row: -row["kl"] / row["tokens"])[:WORST]
    texts = _texts(cache, evaluation.settings["split"], [row["sample_id"] for row in worst])
    answers = _first_answers(evaluation)
    return [
        WorstSample(
            sample_id=row["sample_id"],
            student=student.label,
            kl=row["kl"] / row["tokens"],
            tokens=row["tokens"],
            answers=answers.get(texts[row["sample_id"]]["prompt_id"], {}),
            **texts[row["sample_id"]],
        )
        for row in worst
    ]


def _texts(cache: Location, split: str, sample_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return sample_id -> the columns of the cache that WorstSample has."""
    columns = "sample_id, prompt_id, origin, prompt, completion, reference"
    rows = query.select(
        cache,
        columns,
        None,
        split,
        "AND list_contains($ids::VARCHAR[], sample_id)",
        parameters={"ids": list(sample_ids)},
    ).to_pylist()
    return {row.pop("sample_id"): row for row in rows}


def _first_answers(evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """Return prompt_id -> label -> the first answer of that label."""
    answers: dict[str, dict[str, str]] = {}
    for entry in evaluation.entries:
        file = evaluation.path / entry.folder / "answers.parquet"
        for row in pq.read_table(file, columns=["prompt_id", "answer"]).to_pylist():
            answers.setdefault(row["prompt_id"], {}).setdefault(entry.label, row["answer"])
    return answers
