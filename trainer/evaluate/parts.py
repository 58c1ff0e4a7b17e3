"""From evaluation folders to sums per problem, after the check that all models were measured on the same samples.

    folders             models (label: runs)        parts (label, temperature: sums of runs x problems)
    e1: teacher, sft    teacher: 1 run              teacher T=1
    e1: kd         ->   sft: 1 run             ->   sft T=0, sft T=1
    e2: teacher, kd     kd: 2 runs                  kd T=0, kd T=1

The teacher counts once, as it is the same in all folders; that is checked. What was teacher-forced has no temperature
and stands in every part of its label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.errors import KDError
from trainer.evaluate import folder as evaluations
from trainer.evaluate import metrics
from trainer.evaluate.folder import TEACHER, Evaluation, Measurements

#: Settings that must be the same for two evaluations to stand in one table.
COMPARED = ("measures", "caches", "split", "where", "max_length", "prompts_hash", "top_p", "max_new_tokens")


@dataclass(frozen=True)
class Part:
    """One label at one temperature: the sums of its R runs over the same G groups."""

    label: str
    temperature: float | None  # None: nothing was generated
    runs: int
    answers: int
    sums: dict[str, np.ndarray]  # (R, G, ...)

    def values(self) -> dict[str, float]:
        """Return the value of each metric over all runs and groups; a metric without a finite value is left out."""
        totals = metrics.values({name: array.mean(axis=0).sum(axis=0) for name, array in self.sums.items()})
        return {name: float(value) for name, value in totals.items() if np.isfinite(value)}


def read(paths: Sequence[Path]) -> list[Part]:
    """Return the parts of all folders. KDError if they were not measured alike, on the same samples and prompts."""
    opened = [evaluations.read(path) for path in paths]
    for evaluation in opened:
        _check_settings(opened[0], evaluation)
    runs_of_label = _runs_of_label(opened)
    groups = sorted(
        {
            group
            for runs in runs_of_label.values()
            for run in runs
            for table in (run.forced, run.answers)
            for group in table["group_id"].to_pylist()
        }
    )
    index = {group: number for number, group in enumerate(groups)}
    parts = []
    for label, runs in runs_of_label.items():
        for temperature in sorted({t for run in runs for t in run.answers["temperature"].to_pylist()}) or [None]:
            part = _part(label, temperature, runs, index)
            if part.sums:
                parts.append(part)
    return parts


def _check_settings(first: Evaluation, other: Evaluation) -> None:
    if differing := [name for name in COMPARED if first.settings.get(name) != other.settings.get(name)]:
        raise KDError(
            f"{other.path} was measured with other settings than {first.path} ({', '.join(differing)} differ), so they cannot "
            "be compared: evaluate all models on one cache and split, with one set of prompts"
        )


def _runs_of_label(opened: Sequence[Evaluation]) -> dict[str, list[Measurements]]:
    """Return label -> its runs, the teacher's once. KDError for a run on other samples than the first (the teacher's)."""
    runs_of_label: dict[str, list[Measurements]] = {}
    first: Measurements | None = None
    for evaluation in opened:
        for entry in evaluation.entries:
            run = evaluation.measurements(entry)
            first = first or run
            _check_same(entry.label, run, first)
            runs = runs_of_label.setdefault(entry.label, [])
            if entry.label != TEACHER or not runs:
                runs.append(run)
    return runs_of_label


def _check_same(label: str, run: Measurements, first: Measurements) -> None:
    """Refuse a model that was measured on other samples or prompts than the teacher."""
    for kind, column, table, first_table in (
        ("samples", "sample_id", run.forced, first.forced),
        ("prompts", "prompt_id", run.answers, first.answers),
    ):
        ids, expected = set(table[column].to_pylist()), set(first_table[column].to_pylist())
        if ids and expected and ids != expected:
            raise KDError(
                f"{label} was not measured on the {kind} that the teacher was: {len(expected - ids)} are missing and "
                f"{len(ids - expected)} are others, so there is no retention. Evaluate them together, on one cache and split"
            )


def _part(label: str, temperature: float | None, runs: Sequence[Measurements], index: dict[str, int]) -> Part:
    """Return the sums of one label at one temperature: those that all of its runs have."""
    answers = [_at(run.answers, temperature) for run in runs]
    sums = [sums_of(run.forced, answered, index) for run, answered in zip(runs, answers)]
    common = [name for name in sums[0] if all(name in others for others in sums)]
    stacked = {name: np.stack([of_run[name] for of_run in sums]) for name in common}
    return Part(label, temperature, len(runs), sum(map(len, answers)), stacked)


def _at(answers: pa.Table, temperature: float | None) -> pa.Table:
    return answers.filter(pa.array([t == temperature for t in answers["temperature"].to_pylist()], pa.bool_()))


def sums_of(forced: pa.Table, answers: pa.Table, index: dict[str, int]) -> dict[str, np.ndarray]:
    """Return every sum by group: (G,), and (G, BINS) for the bins of ECE. ``index``: group -> its number.

    A metric that was not measured, as its column is missing or has no value, is left out.
    """
    sums: dict[str, np.ndarray] = {}

    def add(name: str, groups: Sequence[str], values: Any) -> None:
        array = np.asarray(values, dtype=np.float64)
        sums.setdefault(name, np.zeros((len(index), *array.shape[1:])))
        np.add.at(sums[name], [index[group] for group in groups], array)

    if len(forced):
        for part in metrics.POSITION_SUMS:
            if part.name in forced.column_names:
                add(part.name, forced["group_id"].to_pylist(), forced[part.name].to_pylist())
    for name in metrics.ANSWER_METRICS:
        if name in answers.column_names:
            scores = zip(answers["group_id"].to_pylist(), answers[name].to_pylist())
            scored = [(group, score) for group, score in scores if score is not None]
            if scored:
                groups = [group for group, _ in scored]
                add(name, groups, [score for _, score in scored])
                add(metrics.count_of(name), groups, np.ones(len(scored)))
    rewards: dict[tuple[str, str], list[float]] = {}  # of one prompt
    for row in answers.select(["group_id", "prompt_id", "reward"]).to_pylist():
        if row["reward"] is not None:
            rewards.setdefault((row["group_id"], row["prompt_id"]), []).append(row["reward"])
    if rewards:
        samples = min(map(len, rewards.values()))
        groups = [group for group, _ in rewards]
        add("verified", groups, np.ones(len(rewards)))
        for k in sorted({1, samples}):
            passes = [metrics.pass_at_k(len(r), sum(x >= 1 for x in r), k) for r in rewards.values()]
            add(f"pass@{k}", groups, passes)
    return sums
