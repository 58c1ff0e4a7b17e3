"""The numbers of a report, as report.json holds them.

Nothing is measured here: every number was written by the command that measured it, or is queried from the cache in SQL.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.cache import documents, manifest, query
from kdcache.errors import KDError
from kdcache.storage import Location, folders
from trainer.evaluate import compare, metrics
from trainer.evaluate import folder as evaluations
from trainer.evaluate.compare import Comparison
from trainer.evaluate.folder import TEACHER, Evaluation
from trainer.report.find import Sources
from trainer.report.worst import WorstSample, worst_samples
from trainer.run import checkpoints
from trainer.run.record import CONFIG_FILE, RUN_FILE


@dataclass(frozen=True)
class TrainingRun:
    """One run: its configuration, and how it went."""

    folder: str
    name: str
    label: str  # as it was evaluated, else the name
    method: str
    student: str
    finished: bool
    steps: int
    seconds: float
    tokens: float  # completion tokens trained on
    history: list[dict[str, Any]]  # what was logged at each step
    command: str  # that runs it again
    config: str
    made_with: dict[str, str]  # library -> version
    caches: list[dict[str, str]]


@dataclass(frozen=True)
class EntropyBucket:
    """What one label is at the positions where the teacher's entropy is in one range."""

    label: str
    entropy: str  # the range, nats
    tokens: float
    means: dict[str, float]  # per token, of each metric that is summed by entropy

    def as_json(self) -> dict[str, Any]:
        return {"label": self.label, "entropy": self.entropy, "tokens": self.tokens, **self.means}


@dataclass(frozen=True)
class CacheNumbers:
    """What a cache holds. Lists are the rows of a shipped view."""

    summary: dict[str, Any]
    fields: dict[str, Any]  # of its plan
    entropies: list[dict[str, Any]]
    captured_mass: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    lengths: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    rejected: list[dict[str, Any]]  # rows, and the first reason of those that are alike but for numbers


#: Field of CacheNumbers -> the shipped view that it is read from.
VIEWS = {
    "entropies": "entropy_histogram",
    "captured_mass": "captured_mass_curve",
    "ranks": "token_ranks",
    "lengths": "lengths",
    "sources": "sources",
}


@dataclass(frozen=True)
class Cost:
    """What the teacher took once, and what each run would have taken of it again."""

    teacher_seconds: float
    teacher_tokens_per_second: float | None
    runs: list[dict[str, Any]]
    saved_seconds: dict[str, float]  # name of a run -> the seconds that a live teacher would have added
    break_even_runs: float | None  # after so many the cache is paid for


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows."""

    folders: list[str]
    against: str | None  # label that differences are to: the run of plain fine-tuning
    findings: list[str]
    comparisons: list[Comparison]
    measured_on: list[dict[str, Any]]  # the settings of each evaluation
    runs: list[TrainingRun]
    by_entropy: list[EntropyBucket]
    worst: list[WorstSample]
    cache: CacheNumbers | None
    cost: Cost | None
    quantized: list[dict[str, Any]]  # the record of each, and its folder
    day: str
    version: str

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds."""
        return {
            "made": self.day,
            "kdcache": self.version,
            "folders": self.folders,
            "against": self.against,
            "findings": self.findings,
            "comparison": [row.as_json() for row in self.comparisons],
            "measured_on": self.measured_on,
            "runs": [asdict(run) for run in self.runs],
            "by_entropy": [bucket.as_json() for bucket in self.by_entropy],
            "worst": [asdict(sample) for sample in self.worst],
            "cache": None if self.cache is None else asdict(self.cache),
            "cost": None if self.cost is None else asdict(self.cost),
            "quantized": self.quantized,
        }


def gather(sources: Sources, say: Callable[[str], None] = lambda _: None) -> Contents:
    """Read every number of the report. ``say`` gets a sentence on each step."""
    evaluated = [evaluations.read(folder) for folder in sources.evaluations]
    runs = [training_run(folder, evaluated) for folder in sources.runs]
    methods = {run.label: run.method for run in runs}
    against = next((label for label, method in methods.items() if method == "sft"), None)
    comparisons: list[Comparison] = []
    if sources.evaluations:
        say("comparing what was evaluated")
        labels = {entry.label for evaluation in evaluated for entry in evaluation.entries}
        comparisons = compare.rows(sources.evaluations, against if against in labels else None)
    cache = None
    if sources.cache is not None:
        say(f"querying {sources.cache}")
        cache = _cache(sources.cache)
    say("looking for the worst samples")
    worst = worst_samples(sources.cache, evaluated[0], methods) if sources.cache is not None and evaluated else []
    return Contents(
        folders=[str(path) for path in (*sources.runs, *sources.evaluations, *sources.quantized)],
        against=against,
        findings=_findings([row for row in comparisons if row.label in methods], against),
        comparisons=comparisons,
        measured_on=[evaluation.settings for evaluation in evaluated],
        runs=runs,
        by_entropy=_by_entropy(evaluated),
        worst=worst,
        cache=cache,
        cost=_cost(cache, runs),
        quantized=[_json(path / folders.QUANTIZED.marker) | {"folder": str(path)} for path in sources.quantized],
        day=date.today().isoformat(),
        version=__version__,
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KDError(f"{path} is damaged ({error})") from None


# --- training ---------------------------------------------------------------------------------------------------------


def training_run(folder: Path, evaluated: Sequence[Evaluation]) -> TrainingRun:
    """Read one run: its record, and the history of its last whole checkpoint."""
    record = _json(folder / RUN_FILE)
    history = _history(folder)
    method = record.get("method", record["config"].get("method"))
    config = folder / CONFIG_FILE
    entries = [entry for evaluation in evaluated for entry in evaluation.entries]
    return TrainingRun(
        folder=str(folder),
        name=folder.name,
        label=next((entry.label for entry in entries if Path(entry.model).name == folder.name), folder.name),
        method=method,
        student=record["config"]["student"],
        finished=record["finished"],
        steps=max((entry["step"] for entry in history), default=0),
        seconds=_seconds(history),
        tokens=max((entry.get("tokens", 0.0) for entry in history), default=0.0),
        history=history,
        command=f"kd {'grpo' if method == 'grpo' else 'train'} --config {config}",
        config=config.read_text(encoding="utf-8") if config.is_file() else json.dumps(record["config"], indent=1),
        made_with=record.get("made_with", {}),
        caches=record["caches"],
    )


def _history(folder: Path) -> list[dict[str, Any]]:
    """Return what a finished run logged, or else an interrupted one until its last checkpoint that is whole."""
    saved = [checkpoint for checkpoint in checkpoints.listed(folder) if not checkpoints.is_half(checkpoint)]
    states = [place / "trainer_state.json" for place in (folder, *saved) if (place / "trainer_state.json").is_file()]
    return _json(states[0])["log_history"] if states else []


def _seconds(history: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of training; GRPO logs them by step, and older runs only at the end."""
    timed = [entry["seconds"] for entry in history if "seconds" in entry]
    if timed:
        return timed[-1]
    return sum(e.get("step_time", 0.0) for e in history) or sum(e.get("train_runtime", 0.0) for e in history)


# --- evaluation -------------------------------------------------------------------------------------------------------


def _findings(comparisons: Sequence[Comparison], against: str | None) -> list[str]:
    """Return the differences to plain fine-tuning in sentences, with what the measurement cannot tell."""
    sentences = []
    for row in comparisons:
        subject, difference = metrics.metric_of(row.metric).finding, row.difference
        if not subject or difference is None:
            continue
        sentence = f"{row.label} against {against}: {difference.value:+.3f} {subject}"
        if difference.interval is None:
            sentences.append(f"{sentence} (too few problems for an interval).")
            continue
        low, high = difference.interval
        verdict = "." if low > 0 or high < 0 else ", which is no difference that this measurement can tell."
        sentences.append(f"{sentence} (95% interval {low:+.3f} to {high:+.3f}){verdict}")
    return sentences


def _by_entropy(evaluated: Sequence[Evaluation]) -> list[EntropyBucket]:
    """Return each label's metrics where the teacher is sure, and where it is not."""
    edges = (0.0, *metrics.ENTROPY_EDGES_NATS)
    ranges = [*(f"{low:g}–{high:g}" for low, high in itertools.pairwise(edges)), f"{edges[-1]:g}+"]
    sums_of: dict[str, dict[str, list[float]]] = {}  # label -> metric -> a sum per bucket
    for evaluation in evaluated:
        for entry in evaluation.entries:
            table = evaluation.measurements(entry).forced
            if entry.label == TEACHER or not len(table):
                continue
            sums = sums_of.setdefault(entry.label, {})
            for part in metrics.SUMS_BY_ENTROPY:
                if part.name in table.column_names:  # an evaluation from before this metric has none
                    added = [sum(bucket) for bucket in zip(*table[part.name].to_pylist())]
                    before = sums.get(part.name, [0.0] * len(added))
                    sums[part.name] = [a + b for a, b in zip(before, added)]
    return [
        EntropyBucket(
            label,
            ranges[i],
            tokens,
            {m: sums[f"{m}_by_entropy"][i] / tokens for m in metrics.BY_ENTROPY if f"{m}_by_entropy" in sums},
        )
        for label, sums in sums_of.items()
        for i, tokens in enumerate(sums.get("tokens_by_entropy", []))
        if tokens
    ]


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache(cache: Location) -> CacheNumbers:
    summary = manifest.summary(cache)  # first, because it brings the manifest up to date
    rows_of = {}
    for name, view in VIEWS.items():
        columns, rows = query.run(cache, f"SELECT * FROM {view}")
        rows_of[name] = [dict(zip(columns, row)) for row in rows]
    return CacheNumbers(
        summary=summary,
        fields=documents.read_plan(cache)["fields"],
        rejected=_rejected(cache / "rejected.jsonl"),
        **rows_of,
    )


def _rejected(file: Location) -> list[dict[str, Any]]:
    """Return how many rows were rejected for each reason; reasons that differ only in their numbers count as one."""
    alike: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        reason = json.loads(line)["reason"]
        alike.setdefault(re.sub(r"\d+", "N", reason), []).append(reason)
    return [{"rows": len(reasons), "first": reasons[0]} for reasons in alike.values()]


def _cost(cache: CacheNumbers | None, runs: Sequence[TrainingRun]) -> Cost | None:
    """Return what a live teacher would have added to each run, scoring its tokens at the cache's own speed."""
    if cache is None or not cache.summary["completion_tokens"]:
        return None
    teacher_seconds, tokens = cache.summary["teacher_seconds"], cache.summary["completion_tokens"]
    distilled = [run for run in runs if run.method == "kd" and run.tokens]
    live_seconds = [run.tokens * teacher_seconds / tokens for run in distilled]
    return Cost(
        teacher_seconds=teacher_seconds,
        teacher_tokens_per_second=tokens / teacher_seconds if teacher_seconds else None,
        runs=[{"name": run.name, "method": run.method, "seconds": run.seconds} for run in runs],
        saved_seconds=dict(zip([run.name for run in distilled], live_seconds)),
        break_even_runs=teacher_seconds / (sum(live_seconds) / len(live_seconds)) if sum(live_seconds) else None,
    )
