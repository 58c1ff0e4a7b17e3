"""The tables of one or more evaluations: each model's metrics with intervals, and what it retained of the teacher.

    kd compare data/evaluation --against sft

Retention is student / teacher, for the metrics where that says what the student kept, on the very same prompts and at the
same temperature: anything else is refused. Intervals are the middle 95% of resampled problems (and runs, where a label has
several), paired between models; fewer than five problems have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import UsageError
from kdcache.storage import atomic, folders, lock
from trainer.evaluate import metrics, parts
from trainer.evaluate.bootstrap import Estimate, bootstrap, interval
from trainer.evaluate.folder import TEACHER
from trainer.evaluate.parts import Part


@dataclass(frozen=True)
class Comparison:
    """One metric of one label at one temperature."""

    label: str
    temperature: float | None  # None: nothing was generated
    metric: str
    value: Estimate
    runs: int
    answers: int
    retention: Estimate | None = None  # value / the teacher's
    difference: Estimate | None = None  # value - that of the label of --against

    def as_json(self) -> dict[str, Any]:
        """Return the row of comparison.json, which has no key for what there is not."""
        row: dict[str, Any] = {
            "label": self.label,
            "temperature": self.temperature,
            "metric": self.metric,
            "value": self.value.value,
            "interval": self.value.interval,
            "runs": self.runs,
            "answers": self.answers,
        }
        for name, estimate in (("retention", self.retention), ("difference", self.difference)):
            if estimate is not None:
                row |= {name: estimate.value, f"{name}_interval": estimate.interval}
        return row

    def as_csv(self) -> dict[str, Any]:
        """Return the same with two columns, low and high, per interval."""
        row: dict[str, Any] = {}
        for name, value in self.as_json().items():
            if name.endswith("interval"):
                prefix = name.removesuffix("interval")
                row[f"{prefix}low"], row[f"{prefix}high"] = value or (None, None)
            else:
                row[name] = value
        return row


@dataclass(frozen=True)
class _Measured:
    """A part with the values of its metrics, and each in B resamplings."""

    part: Part
    values: dict[str, float]
    resampled: dict[str, np.ndarray]  # [B]


def rows(paths: Sequence[Path], against: str | None = None) -> list[Comparison]:
    """Return one row per label, temperature and metric, with the difference to the label ``against`` where one is given.

    UsageError if there is no such label, KDError if the models were not measured on the same prompts and samples.
    """
    measured = [_Measured(part, part.values(), bootstrap(part.sums)) for part in parts.read(paths)]
    by_key = {(each.part.label, each.part.temperature): each for each in measured}
    labels = dict.fromkeys(label for label, _ in by_key)
    if against is not None and against not in labels:
        raise UsageError(f"--against {against}: no such label; there are: {', '.join(labels)}")
    comparisons = []
    for (label, temperature), each in by_key.items():
        teacher = None if label == TEACHER else by_key.get((TEACHER, temperature))
        base = None if against is None or label == against else by_key.get((against, temperature))
        comparisons += [_comparison(each, name, teacher, base) for name in metrics.ordered(each.values)]
    return comparisons


def _comparison(model: _Measured, name: str, teacher: _Measured | None, base: _Measured | None) -> Comparison:
    value, resampled = model.values[name], model.resampled[name]
    retention = difference = None
    if metrics.metric_of(name).retained and teacher is not None and teacher.values.get(name):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = resampled / teacher.resampled[name]
        retention = Estimate(value / teacher.values[name], interval(ratios))
    if base is not None and name in base.values:
        difference = Estimate(value - base.values[name], interval(resampled - base.resampled[name]))
    return Comparison(
        model.part.label,
        model.part.temperature,
        name,
        Estimate(value, interval(resampled)),
        model.part.runs,
        model.part.answers,
        retention,
        difference,
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def wide(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[Any]]]:
    """Return names and lines for the screen: one line per label and temperature, one column per metric."""
    lines: dict[tuple[str, float | None], dict[str, Any]] = {}
    for row in comparisons:
        line = {"model": row.label, "temperature": row.temperature, "runs": row.runs, "answers": row.answers}
        lines.setdefault((row.label, row.temperature), line)[row.metric] = row.value.value
    columns = ["model", "temperature", *metrics.ordered({row.metric for row in comparisons}), "runs", "answers"]
    return columns, [[line.get(name) for name in columns] for line in lines.values()]


def long(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[Any]]]:
    """Return names and lines for the screen: one line per metric, label and temperature, with its estimates."""
    kinds = [k for k in ("value", "retention", "difference") if any(getattr(row, k) is not None for row in comparisons)]
    lines = []
    for metric in metrics.ordered({row.metric for row in comparisons}):
        for row in (row for row in comparisons if row.metric == metric):
            estimates = [getattr(row, kind) for kind in kinds]
            lines.append([metric, row.temperature, row.label, *(str(e) if e is not None else "" for e in estimates)])
    return ["metric", "temperature", "model", *(f"{kind} (95%)" for kind in kinds)], lines


def write(comparisons: Sequence[Comparison], out: Path) -> tuple[Path, Path]:
    """Write comparison.json and comparison.csv in ``out``."""
    folders.check_writable(out, folders.COMPARISON)
    lines = [row.as_csv() for row in comparisons]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with lock.held(out, ".lock-comparison", wait=True):  # both files of one comparison
        atomic.write_json(out / "comparison.json", [row.as_json() for row in comparisons])
        atomic.write_csv(out / "comparison.csv", columns, [[line.get(name) for name in columns] for line in lines])
    return out / "comparison.json", out / "comparison.csv"
