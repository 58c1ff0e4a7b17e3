"""One row per prompt: what `kd evaluate` asks students again, and what `kd grpo` learns from.

A prompt may stand in several rows of a cache and in several caches: with other references, and with several sampled answers.
Both commands want it once, with everything that any of its rows says. They differ in the condition that a user may give,
so there are two queries: `kd evaluate` chooses rows of ``samples``, `kd grpo` chooses rows of the view ``prompts``, which
knows how often the teacher was right. Nothing here depends on the order in which DuckDB's threads return the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from kdcache.cache import query
from kdcache.judge import verifiers
from kdcache.storage import Location


@dataclass(frozen=True)
class Prompt:
    """One prompt with what all of its rows say about it. ``prompt_id`` is a hash of its text."""

    prompt_id: str
    group_id: str  # of the problem: prompts of one problem are resampled together
    text: str = field(repr=False)
    ids: list[int] = field(repr=False)
    judges: tuple[verifiers.Judge, ...] = ()  # the best verdict counts
    answers: list[str] = field(default_factory=list, repr=False)  # that the teacher sampled
    traces: list[list[int]] = field(default_factory=list, repr=False)  # ids of right answers without their end of turn
    reasoned: bool = False  # the prompt demands reasoning in tags


_JUDGE = "{verifier: verifier, reference: reference}"


def answered(caches: Sequence[Location], split: str, where: str | None, max_prompt_tokens: int) -> list[Prompt]:
    """Return the prompts of a split with the teacher's sampled answers, in the order of ``prompt_id``.

    ``where`` is a condition on samples. Rows without a verifier count too, as their reference can be compared with.
    """
    columns = (
        "prompt_id, min(group_id) AS group_id, min(prompt) AS prompt, first(prompt_ids ORDER BY sample_id) AS prompt_ids, "
        f"list(DISTINCT {_JUDGE} ORDER BY {_JUDGE}) AS judges, "
        "list(completion ORDER BY sample_index, sample_id) FILTER (origin = 'sampled') AS answers"
    )
    rest = f"AND prompt_tokens <= {max_prompt_tokens:d} GROUP BY prompt_id ORDER BY prompt_id"
    rows = [row for cache in caches for row in query.select(cache, columns, where, split, rest).to_pylist()]
    prompts = merged(
        Prompt(
            row["prompt_id"],
            row["group_id"],
            row["prompt"],
            row["prompt_ids"],
            _judges(row["judges"]),
            answers=row["answers"] or [],
        )
        for row in rows
    )
    return sorted(prompts, key=lambda prompt: prompt.prompt_id)


def verifiable(cache: Location, where: str | None, stop_ids: Collection[int], reasoned: bool) -> list[Prompt]:
    """Return the prompts of the train split that have a verifier, with the ids of right answers: one for each data set.

    ``where`` is a condition on the view ``prompts``. ``stop_ids`` end an answer in this cache.
    """
    rows = query.select(
        cache,
        "prompt_id, group_id, prompt, prompt_ids, judges, traces",
        where,
        "train",
        "AND verifier IS NOT NULL ORDER BY prompt_id, source",
        view="prompts",
    ).to_pylist()
    return [
        Prompt(
            row["prompt_id"],
            row["group_id"],
            row["prompt"],
            row["prompt_ids"],
            _judges(row["judges"]),
            traces=[trace[:-1] if trace[-1] in stop_ids else trace for trace in row["traces"]],
            reasoned=reasoned,
        )
        for row in rows
    ]


def merged(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return each prompt once, with the judges, answers and traces of all data sets and caches that have it."""
    by_id: dict[str, Prompt] = {}
    for prompt in prompts:
        first = by_id.get(prompt.prompt_id)
        if first is None:
            by_id[prompt.prompt_id] = prompt
            continue
        by_id[prompt.prompt_id] = dataclasses.replace(
            first,
            judges=tuple(dict.fromkeys([*first.judges, *prompt.judges])),
            answers=[*first.answers, *prompt.answers],
            traces=[*first.traces, *(trace for trace in prompt.traces if trace not in first.traces)],
        )
    return list(by_id.values())


def _judges(rows: Sequence[dict[str, str | None]]) -> tuple[verifiers.Judge, ...]:
    return tuple((row["verifier"], row["reference"]) for row in rows)
