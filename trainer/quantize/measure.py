"""What quantizing saved and what it cost: every figure of the student before and after, as quantization.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from kdcache import machine, models
from kdcache.models import identity
from kdcache.progress import ShowProgress
from kdcache.storage import Location
from trainer.data.select import Selection
from trainer.evaluate import compare, metrics
from trainer.evaluate.bootstrap import Estimate
from trainer.evaluate.compare import Comparison
from trainer.evaluate.run import EvaluateConfig, evaluate
from trainer.quantize import footprint

MAX_LENGTH = 2048
ANSWERS = 256  # prompts to answer at most, greedily


@dataclass(frozen=True)
class Change:
    """One figure before and after. Footprints have a ratio, metrics have a difference."""

    metric: str
    unit: str
    before: float
    after: float
    ratio: Estimate | None = None  # after / before: the median over rounds, and the range of rounds
    difference: Estimate | None = None  # after - before, with its 95% interval

    def as_json(self) -> dict[str, Any]:
        """Return the row of quantization.json."""
        row: dict[str, Any] = {"metric": self.metric, "unit": self.unit, "before": self.before, "after": self.after}
        if self.ratio is not None:
            row |= {"ratio": self.ratio.value, "ratio_range": self.ratio.interval}
        if self.difference is not None:
            row |= {"difference": self.difference.value, "interval": self.difference.interval}
        return row


@dataclass(frozen=True)
class Measurement:
    """All figures of one quantization, and what they were measured with."""

    device: str
    date: str
    versions: dict[str, str]
    rounds: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    quality_on: list[str] | None  # fingerprints of the caches
    verdict: str
    changes: list[Change]

    def as_json(self) -> dict[str, Any]:
        """Return what quantization.json has under ``measured``."""
        names = (
            "device",
            "date",
            "versions",
            "rounds",
            "prompt_tokens",
            "new_tokens",
            "batch",
            "quality_on",
            "verdict",
        )
        return {**{name: getattr(self, name) for name in names}, "rows": [change.as_json() for change in self.changes]}


def measure(
    before: str, after: Path, from_cache: tuple[Location, ...], test: Selection | None, rounds: int, show: ShowProgress
) -> Measurement:
    """Measure both students: their footprint in turns and, on the ``test`` samples of a cache, their quality."""
    changes = footprints(before, str(after), prompt_of(before, test), rounds, show)
    if test is not None:
        config = EvaluateConfig(
            models=(("before", before), ("after", str(after))),
            from_cache=from_cache,
            out=after / "evaluation",
            max_length=MAX_LENGTH,
            generate=ANSWERS,
            temperatures=(0.0,),  # greedy, so that answers differ by the weights alone
        )
        changes += quality(compare.rows([evaluate(config, show)], against="before"))
    return Measurement(
        device=machine.device_name(),
        date=date.today().isoformat(),
        versions=machine.versions(),
        rounds=rounds,
        prompt_tokens=footprint.PROMPT_TOKENS,
        new_tokens=footprint.NEW_TOKENS,
        batch=1,
        quality_on=[cache.fingerprint for cache in test.caches] if test else None,
        verdict=verdict(changes, machine.device_name()),
        changes=changes,
    )


def footprints(before: str, after: str, prompt_ids: Sequence[int], rounds: int, show: ShowProgress) -> list[Change]:
    """Return the medians of each figure of the footprint, and its ratios within the rounds."""
    of_model = footprint.in_turns(before, after, prompt_ids, rounds, show)
    changes = []
    for name, unit in footprint.UNITS.items():
        pairs = [(old[name], new[name]) for old, new in zip(of_model[before], of_model[after])]
        ratios = [new / old for old, new in pairs]
        medians = [float(np.median(values)) for values in zip(*pairs)]
        ratio = Estimate(float(np.median(ratios)), (min(ratios), max(ratios)))
        changes.append(Change(name, unit, medians[0], medians[1], ratio=ratio))
    return changes


def prompt_of(student: str, test: Selection | None) -> list[int]:
    """Return PROMPT_TOKENS ids: prompts of the test split end to end, or random tokens where there is no cache."""
    if test is None:
        size = models.config(identity.model_folder(student)).get_text_config().vocab_size
        return np.random.default_rng(0).integers(size, size=footprint.PROMPT_TOKENS).tolist()
    samples = test.load(np.arange(min(len(test), footprint.PROMPT_TOKENS)))
    ids = np.concatenate([sample.prompt_ids for sample in samples])
    return np.resize(ids, footprint.PROMPT_TOKENS).tolist()


def quality(comparisons: Sequence[Comparison]) -> list[Change]:
    """Return each metric before and after, with the paired difference."""
    before = {row.metric: row.value.value for row in comparisons if row.label == "before"}
    return [
        Change(
            row.metric,
            metrics.metric_of(row.metric).unit,
            before[row.metric],
            row.value.value,
            difference=row.difference,
        )
        for row in comparisons
        if row.label == "after" and row.difference is not None
    ]


# --- for people -------------------------------------------------------------------------------------------------------


def table(changes: Sequence[Change]) -> tuple[list[str], list[list[Any]]]:
    """Return names and lines for the screen."""
    lines = [[c.metric, c.unit, c.before, c.after, _ratio(c), str(c.difference or "")] for c in changes]
    return ["metric", "unit", "before", "after", "after / before (range)", "difference (95%)"], lines


def csv_table(changes: Sequence[Change]) -> tuple[list[str], list[list[Any]]]:
    """Return names and lines for quantization.csv, with all digits."""
    lines = []
    for change in changes:
        estimate = change.ratio or change.difference
        interval = (None, None) if estimate is None or estimate.interval is None else estimate.interval
        values = [None if each is None else each.value for each in (change.ratio, change.difference)]
        lines.append([change.metric, change.unit, change.before, change.after, *values, *interval])
    return ["metric", "unit", "before", "after", "ratio", "difference", "low", "high"], lines


def _ratio(change: Change) -> str:
    """Return the ratio with its range, unless all rounds gave the same one."""
    if change.ratio is None:
        return ""
    interval = change.ratio.interval
    is_one_value = interval is None or interval[0] == interval[1]
    return str(Estimate(change.ratio.value) if is_one_value else change.ratio)


def verdict(changes: Sequence[Change], device: str) -> str:
    """Return what was saved and what it cost, in a sentence or two."""
    by_metric = {change.metric: change for change in changes}
    disk, memory = by_metric["disk"], by_metric["weights in memory"]
    assert disk.ratio is not None  # every footprint has one
    saved = (
        f"Weights on disk {disk.before:.0f} to {disk.after:.0f} MB ({1 / disk.ratio.value:.2f} times smaller), "
        f"in memory {memory.before:.0f} to {memory.after:.0f} MB. "
        f"On this machine ({device}), one sequence at a time, it reads prompts at {_ratio(by_metric['prefill'])} and writes "
        f"answers at {_ratio(by_metric['decode'])} times the speed of before (range over rounds). "
    )
    kl = by_metric.get("kl")
    if kl is None or kl.difference is None:
        return saved + "What it costs in quality was not measured: that needs --from-cache."
    interval = kl.difference.interval
    is_unsure = interval is None or interval[0] <= 0 <= interval[1]
    return (
        f"{saved}KL to the teacher goes from {kl.before:.3f} to {kl.after:.3f} nats per token, a difference of {kl.difference}"
        f"{', which these samples cannot tell from zero.' if is_unsure else '.'}"
    )
