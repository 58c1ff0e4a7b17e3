"""Which plots a report has, from its numbers. How one is drawn is in plots.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.evaluate import metrics
from trainer.evaluate.compare import Comparison
from trainer.evaluate.folder import COPY, TEACHER
from trainer.report import plots
from trainer.report.gather import CacheNumbers, Contents, EntropyBucket, TrainingRun
from trainer.report.plots import Curve, Dot, Figure

AXES = {"step": "optimizer step", "tokens": "completion tokens trained on", "seconds": "seconds of training"}
#: What is logged by kd train -> title and axis.
CURVES = {
    "kl": ("KL", "KL to the teacher, nats per token"),
    "ce": ("Cross-entropy", "cross-entropy, nats per token"),
}
#: What is logged by kd grpo -> title and axis.
REWARDS = {
    "reward": ("Reward", "mean reward"),
    "rewards/correctness/mean": ("Correctness", "share of answers that are right"),
    "rewards/form/mean": ("Form", "share of answers in the demanded form"),
    "completions/mean_length": ("Length", "tokens per answer"),
    "entropy": ("Entropy", "nats per token"),
}
ENTROPY_QUARTER = "entropy, nats (lower edge of a quarter)"

Colours = Mapping[str, str]  # label -> a variable of base.css


def figures_of(contents: Contents) -> list[Figure]:
    """Return every figure that there are numbers for, in the order of the page."""
    colours = _colours(contents)
    trained = [run for run in contents.runs if run.method != "grpo"]
    reinforced = [run for run in contents.runs if run.method == "grpo"]
    return [
        *_compared(contents.comparisons, colours),
        *_curves(trained, colours),
        *_rewards(reinforced, colours),
        *_by_entropy(contents.by_entropy, colours),
        *(_cached(contents.cache) if contents.cache else ()),
    ]


def _colours(contents: Contents) -> Colours:
    """Return one colour per label, the same on all plots; the teacher is grey."""
    labels = [row.label for row in contents.comparisons] + [run.label for run in contents.runs]
    students = [label for label in dict.fromkeys(labels) if label not in (TEACHER, COPY)]
    return {
        **{label: plots.SERIES[number % 7] for number, label in enumerate(students)},
        TEACHER: plots.MUTED,
        COPY: plots.MUTED,
    }


# --- evaluation -------------------------------------------------------------------------------------------------------


def _compared(comparisons: Sequence[Comparison], colours: Colours) -> Iterator[Figure]:
    has_temperatures = len({row.temperature for row in comparisons}) > 1
    for metric in metrics.METRICS:
        if not metric.plot_title:
            continue
        name = "pass@1" if metric is metrics.PASS else metric.name
        rows = [row for row in comparisons if row.metric == name]
        if (
            metric.by_entropy
        ):  # teacher-forced: one value whatever was answered, and nothing new about the teacher itself
            rows = list({row.label: row for row in rows if row.label != TEACHER}.values())
        if rows:
            is_named = has_temperatures and not metric.by_entropy
            yield plots.intervals(
                f"compared-{name.replace('@', '-')}",
                metric.plot_title,
                "Dots are means over the held-out split, bars 95% intervals over problems and runs.",
                metric.plot_axis,
                [
                    Dot(
                        f"{row.label}, T={row.temperature:g}" if is_named else row.label,
                        row.value,
                        colours[row.label],
                    )
                    for row in rows
                ],
            )


def _by_entropy(buckets: Sequence[EntropyBucket], colours: Colours) -> Iterator[Figure]:
    labels = list(dict.fromkeys(bucket.label for bucket in buckets))
    in_order = sorted(buckets, key=lambda bucket: float(bucket.entropy.split("–")[0].rstrip("+")))
    for name in metrics.BY_ENTROPY:
        heights = {
            label: {b.entropy: b.means[name] for b in in_order if b.label == label and name in b.means}
            for label in labels
        }
        if any(heights.values()):
            metric = metrics.metric_of(name)
            yield plots.bars(
                f"{name}-by-entropy",
                f"{metric.plot_title or name}, by the teacher's entropy",
                "Held-out positions in buckets of how unsure the teacher is.",
                "entropy of the teacher, nats",
                metric.plot_axis or name,
                heights,
                [colours[label] for label in labels],
            )


# --- training ---------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[TrainingRun], colours: Colours) -> Iterator[Figure]:
    for metric, (title, y_label) in CURVES.items():
        for axis, x_label in AXES.items():
            curves = []
            for run in runs:
                for key, is_train in ((metric, True), (f"eval_{metric}", False)):
                    points = [(entry[axis], entry[key]) for entry in run.history if key in entry and axis in entry]
                    if points:
                        label = f"{run.label}, {'train' if is_train else 'held out'}"
                        curves.append(Curve(label, points, colours[run.label], dashed=is_train, marked=not is_train))
            if curves:
                note = "Dashed: the batches trained on. Dots: the validation split."
                if metric == "kl":
                    note += (
                        " The KL is to what was stored: on a threshold cache it is too high by one constant for all."
                    )
                yield plots.curves(f"{metric}-by-{axis}", title, note, x_label, y_label, curves)


def _rewards(runs: Sequence[TrainingRun], colours: Colours) -> Iterator[Figure]:
    for key, (title, y_label) in REWARDS.items():
        curves = []
        for run in runs:
            points = [(entry["step"], float(entry[key])) for entry in run.history if key in entry]
            if points:
                curves.append(Curve(run.label, points, colours[run.label]))
        if curves:
            name = f"grpo-{title.lower().replace(' ', '-')}"
            yield plots.curves(name, title, "Means over the answers of each step.", AXES["step"], y_label, curves)


# --- the cache --------------------------------------------------------------------------------------------------------


def _cached(cache: CacheNumbers) -> Iterator[Figure]:
    if cache.entropies:
        in_order = sorted(cache.entropies, key=lambda row: row["entropy"])
        yield plots.bars(
            "cache-entropies",
            "How sure the teacher is",
            "Completion tokens by the entropy of the teacher's distribution.",
            ENTROPY_QUARTER,
            "share of positions",
            _by_origin([row | {"entropy": f"{row['entropy']:g}"} for row in in_order], "entropy", "share"),
        )
    if cache.captured_mass:
        points = [(row["k"], row["mass"]) for row in cache.captured_mass]
        yield plots.curves(
            "cache-captured-mass",
            "What the best k candidates hold",
            "Mean over positions of the stored candidates' mass; the rest up to 1 is stored as the tail.",
            "k (logarithmic)",
            "probability",
            [Curve("mass", points, plots.SERIES[0], marked=True)],
            log_x=True,
        )
    if cache.ranks:
        yield plots.bars(
            "cache-ranks",
            "Rank of the completion's token",
            "Where the token that was given, or sampled, ranks with the teacher.",
            "rank",
            "share of positions",
            _by_origin(cache.ranks, "rank", "share"),
        )


def _by_origin(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, dict[str, float]]:
    """Return origin (given or sampled) -> column ``x`` as text -> column ``y``."""
    origins = dict.fromkeys(row["origin"] for row in rows)
    return {origin: {str(row[x]): row[y] for row in rows if row["origin"] == origin} for origin in origins}
