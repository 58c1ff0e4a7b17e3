"""The tables of one or more evaluations: each model's metrics with intervals, and what it retained of the teacher.

    kd compare data/evaluation --against sft

Retention is student / teacher of a metric where more is better, on the very same prompts and at the same temperature:
anything else is refused. Intervals are the middle 95% of resampled problems (and runs, where a label has several),
paired between models; of fewer than five problems there are none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import KDError
from kdcache.storage import atomic, folders, lock
from trainer.evaluate import metrics

#: Settings that must be the same for two evaluations to stand in one table.
COMPARED = ("measures", "caches", "split", "where", "max_length", "prompts_hash", "top_p", "max_new_tokens")
TEACHER, COPY = "teacher (cache)", "copy the input"  # labels of rows that no model is behind
EVALUATION_FILE = folders.EVALUATION.marker  # names the parts of an evaluation's folder

#: In the order of the table; those of RETAINED are divided by the teacher's.
SHOWN = ("kl", "agreement", "ce", "perplexity", "ece", "rougeL", "rougeL_paper", "rougeL_teacher", "exact")
RETAINED = ("rougeL", "rougeL_paper", "exact")


@dataclass(frozen=True)
class Part:
    """One label at one temperature: its runs' sums over the same groups, and what they were measured on."""

    label: str
    temperature: float | None  # None: nothing was generated
    runs: int
    answers: int
    sums: dict[str, np.ndarray]  # (R, G, ...)


def rows(folders: Sequence[Path], against: str | None = None) -> list[dict[str, Any]]:
    """One row a label, temperature and metric: value, interval, retention and, with ``against``, the difference to it.

    KDError if the models were not measured on the same prompts and samples.
    """
    parts = _parts(folders)
    labels = [part.label for part in parts]
    if against is not None and against not in labels:
        raise KDError(f"--against {against}: no such label; there are: {', '.join(dict.fromkeys(labels))}", 2)
    resampled = [metrics.bootstrap(part.sums) for part in parts]
    values = [_value(part) for part in parts]

    def other(label: str, temperature: float | None) -> int | None:
        """The part of a label at a temperature."""
        same = [i for i, part in enumerate(parts) if part.label == label]
        return next((i for i in same if parts[i].temperature == temperature), None)

    found = []
    for i, part in enumerate(parts):
        teacher = other(TEACHER, part.temperature)
        base = None if against is None or part.label == against else other(against, part.temperature)
        for name in ordered(values[i]):
            row: dict[str, Any] = {
                "label": part.label,
                "temperature": part.temperature,
                "metric": name,
                "value": values[i][name],
                "interval": metrics.interval(resampled[i][name]),
                "runs": part.runs,
                "answers": part.answers,
            }
            retained = name in RETAINED or name.startswith("pass@")
            if retained and teacher is not None and teacher != i and values[teacher].get(name):
                with np.errstate(divide="ignore", invalid="ignore"):
                    row["retention"] = values[i][name] / values[teacher][name]
                    row["retention_interval"] = metrics.interval(resampled[i][name] / resampled[teacher][name])
            if base is not None and name in values[base]:
                row["difference"] = values[i][name] - values[base][name]
                row["difference_interval"] = metrics.interval(resampled[i][name] - resampled[base][name])
            found.append(row)
    return found


def wide(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Names and lines for the screen: one line a label and temperature, one column a metric."""
    lines: dict[tuple[str, float | None], dict[str, Any]] = {}
    for row in found:
        line = {
            "model": row["label"],
            "temperature": row["temperature"],
            "runs": row["runs"],
            "answers": row["answers"],
        }
        lines.setdefault((row["label"], row["temperature"]), line)[row["metric"]] = row["value"]
    names = ["model", "temperature", *ordered({row["metric"] for row in found}), "runs", "answers"]
    return names, [[line.get(name) for name in names] for line in lines.values()]


def long(found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Names and lines for the screen: one line a metric, label and temperature, with what was made of it."""
    kinds = [kind for kind in ("value", "retention", "difference") if any(kind in row for row in found)]
    lines = []
    for metric in ordered({row["metric"] for row in found}):
        for row in (row for row in found if row["metric"] == metric):
            line = [metric, row["temperature"], row["label"]]
            lines.append([*line, *(with_interval(row.get(k), row.get(_interval_of(k))) for k in kinds)])
    return ["metric", "temperature", "model", *(f"{kind} (95%)" for kind in kinds)], lines


def _interval_of(kind: str) -> str:
    return "interval" if kind == "value" else f"{kind}_interval"


def with_interval(value: float | None, within: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if within is None else f"{value:.3g} ({within[0]:.3g} to {within[1]:.3g})"


def write(found: Sequence[dict[str, Any]], out: Path) -> tuple[Path, Path]:
    """comparison.json and comparison.csv in ``out``."""
    folders.check_writable(out, folders.COMPARISON)
    flat = [_flat(row) for row in found]
    names = list(dict.fromkeys(name for row in flat for name in row))
    with lock.held(out, ".lock-comparison", wait=True):  # both files of one comparison
        atomic.write_json(out / "comparison.json", list(found))
        atomic.write_csv(out / "comparison.csv", names, [[row.get(name) for name in names] for row in flat])
    return out / "comparison.json", out / "comparison.csv"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("interval"):
            prefix = name.removesuffix("interval")
            flat[f"{prefix}low"], flat[f"{prefix}high"] = value or (None, None)
        else:
            flat[name] = value
    return flat


def ordered(names: Any) -> list[str]:
    """Metrics in the order in which they are shown; those that are not shown are left out."""
    return [n for n in SHOWN if n in names] + sorted(
        (n for n in names if n.startswith("pass@")), key=lambda n: int(n.removeprefix("pass@"))
    )


def _value(part: Part) -> dict[str, float]:
    found = metrics.values({name: s.mean(axis=0).sum(axis=0) for name, s in part.sums.items()})
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


# --- reading ----------------------------------------------------------------------------------------------------------


def _parts(folders: Sequence[Path]) -> list[Part]:
    """What the folders hold, a part a label and temperature; all on the same samples and prompts, else KDError."""
    entries: list[tuple[str, pa.Table, pa.Table]] = []
    settings: list[dict[str, Any]] = []
    for folder in folders:
        try:
            evaluation = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            inside = folder / "evaluation"
            hint = f"is {inside} meant?" if (inside / EVALUATION_FILE).is_file() else "make one with: kd evaluate"
            raise KDError(f"{folder} holds no evaluation (no {EVALUATION_FILE}); {hint}") from None
        settings.append(evaluation["settings"])
        if differing := [name for name in COMPARED if settings[0].get(name) != settings[-1].get(name)]:
            raise KDError(
                f"{folder} was measured otherwise than {folders[0]} ({', '.join(differing)} differ), so they cannot be compared: "
                "evaluate all models on one cache and split, with one set of prompts"
            )
        for entry in evaluation["entries"]:
            if entry["label"] == TEACHER and any(label == TEACHER for label, *_ in entries):
                # One teacher serves all; that of a second folder must have answered the same.
                _same(TEACHER, *_read(folder / entry["folder"]), *entries[0][1:])
                continue
            entries.append((entry["label"], *_read(folder / entry["folder"])))
    for label, forced, answers in entries[1:]:
        _same(label, forced, answers, *entries[0][1:])
    groups = sorted({g for _, forced, answers in entries for t in (forced, answers) for g in t["group_id"].to_pylist()})
    index = {group: number for number, group in enumerate(groups)}

    parts = []
    for label in dict.fromkeys(label for label, *_ in entries):
        runs = [(forced, answers) for name, forced, answers in entries if name == label]
        temperatures = sorted({t for _, answers in runs for t in answers["temperature"].to_pylist()}) or [None]
        for temperature in temperatures:
            answered = [_at(answers, temperature) for _, answers in runs]
            sums = [_sums(forced, answers, index) for (forced, _), answers in zip(runs, answered)]
            common = [name for name in sums[0] if all(name in other for other in sums)]
            if not common:
                continue
            parts.append(
                Part(
                    label,
                    temperature,
                    len(runs),
                    sum(map(len, answered)),
                    {name: np.stack([s[name] for s in sums]) for name in common},
                )
            )
    return parts


def _read(folder: Path) -> tuple[pa.Table, pa.Table]:
    return pq.read_table(folder / "forced.parquet"), pq.read_table(folder / "answers.parquet")


def _same(label: str, forced: pa.Table, answers: pa.Table, other_forced: pa.Table, other_answers: pa.Table) -> None:
    """Refuse a model that was measured on something else than the teacher."""
    for what, column, mine, theirs in (
        ("samples", "sample_id", forced, other_forced),
        ("prompts", "prompt_id", answers, other_answers),
    ):
        a, b = set(mine[column].to_pylist()), set(theirs[column].to_pylist())
        if a and b and a != b:
            raise KDError(
                f"{label} was not measured on the {what} that the teacher was: {len(b - a)} are missing and {len(a - b)} are "
                "others, so there is no retention. Evaluate them together, on one cache and split"
            )


def _at(answers: pa.Table, temperature: float | None) -> pa.Table:
    return answers.filter(pa.array([t == temperature for t in answers["temperature"].to_pylist()], pa.bool_()))


def _sums(forced: pa.Table, answers: pa.Table, index: dict[str, int]) -> dict[str, np.ndarray]:
    """Everything summed by group: (G,), and (G, BINS) for the bins of ECE."""
    sums: dict[str, np.ndarray] = {}

    def add(name: str, groups: Sequence[str], values: Any) -> None:
        values = np.asarray(values, dtype=np.float64)
        sums.setdefault(name, np.zeros((len(index), *values.shape[1:])))
        np.add.at(sums[name], [index[group] for group in groups], values)

    if len(forced):
        groups = forced["group_id"].to_pylist()
        for name in ("tokens", "kl", "agreement", "ce", "confident", "right"):
            add(name, groups, forced[name].to_pylist())
    for name, count in (
        ("rougeL", "referenced"),
        ("rougeL_paper", ""),
        ("exact", ""),
        ("rougeL_teacher", "with_teacher"),
    ):
        there = [(g, v) for g, v in zip(answers["group_id"].to_pylist(), answers[name].to_pylist()) if v is not None]
        if there:
            add(name, [g for g, _ in there], [v for _, v in there])
            if count:
                add(count, [g for g, _ in there], np.ones(len(there)))
    rewards: dict[tuple[str, str], list[float]] = {}
    for row in answers.select(["group_id", "prompt_id", "reward"]).to_pylist():
        if row["reward"] is not None:
            rewards.setdefault((row["group_id"], row["prompt_id"]), []).append(row["reward"])
    if rewards:
        samples = min(len(found) for found in rewards.values())
        add("verified", [group for group, _ in rewards], np.ones(len(rewards)))
        for k in sorted({1, samples}):
            passed = [metrics.pass_at_k(len(r), sum(x >= 1 for x in r), k) for r in rewards.values()]
            add(f"pass@{k}", [group for group, _ in rewards], passed)
    return sums
