"""Which plots a report has: report.json's numbers -> figures. How one is drawn is in plots.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trainer.evaluate import compare
from trainer.report import plots
from trainer.report.plots import Curve, Figure

AXES = {"step": "optimizer step", "tokens": "completion tokens trained on", "seconds": "seconds of training"}
CURVES = {
    "kl": "KL to the teacher, nats a token",
    "ce": "cross-entropy, nats a token",
}
COMPARED = {
    "kl": "KL to the teacher, nats a token (less is nearer)",
    "agreement": "share of positions that agree with the teacher's first choice",
    "rougeL": "Rouge-L F1 with the reference",
    "pass@1": "share of answers that are right",
}
REWARDS = {
    "reward": ("Reward", "mean reward"),
    "rewards/correctness/mean": ("Correctness", "share of answers that are right"),
    "rewards/form/mean": ("Form", "share in the form asked for"),
    "completions/mean_length": ("Length", "tokens an answer"),
    "entropy": ("Entropy", "nats a token"),
}


def of(data: dict[str, Any]) -> list[Figure]:
    """Every figure that there are numbers for, in the order of the page."""
    colours = _colours(data)
    return [
        *_compared(data["comparison"], colours),
        *_curves([run for run in data["runs"] if run["method"] != "grpo"], colours),
        *_rewards([run for run in data["runs"] if run["method"] == "grpo"], colours),
        *_by_entropy(data["by_entropy"], colours),
        *(_cached(data["cache"]) if data["cache"] else ()),
    ]


def _colours(data: dict[str, Any]) -> dict[str, str]:
    """One colour a label, on all plots; the teacher is grey."""
    labels = [row["label"] for row in data["comparison"]] + [run["label"] for run in data["runs"]]
    students = [label for label in dict.fromkeys(labels) if label not in (compare.TEACHER, compare.COPY)]
    found = {label: plots.SERIES[i % 7] for i, label in enumerate(students)}
    return found | {compare.TEACHER: plots.MUTED, compare.COPY: plots.MUTED}


def _compared(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Iterator[Figure]:
    several = len({row["temperature"] for row in rows}) > 1
    for metric, said in COMPARED.items():
        mine = [
            row
            for row in rows
            if row["metric"] == metric and not (metric in ("kl", "agreement") and row["label"] == compare.TEACHER)
        ]
        if metric in ("kl", "agreement"):  # measured once, whatever was answered
            mine = list({row["label"]: row for row in mine}.values())
        if not mine:
            continue
        named = several and metric not in ("kl", "agreement")
        yield plots.intervals(
            f"compared-{metric.replace('@', '-')}",
            {"kl": "Distance to the teacher", "agreement": "Agreement", "rougeL": "Rouge-L", "pass@1": "Right answers"}[
                metric
            ],
            "Dots are means over the held-out split, bars 95% intervals over problems and runs.",
            said,
            [
                (
                    f"{r['label']}, T={r['temperature']:g}" if named else r["label"],
                    r["value"],
                    r["interval"],
                    colours[r["label"]],
                )
                for r in mine
            ],
        )


def _curves(runs: Sequence[dict[str, Any]], colours: dict[str, str]) -> Iterator[Figure]:
    for metric, y_label in CURVES.items():
        for axis, x_label in AXES.items():
            drawn = []
            for run in runs:
                for key, dashed in ((metric, True), (f"eval_{metric}", False)):
                    points = [(e[axis], e[key]) for e in run["history"] if key in e and axis in e]
                    if points:
                        label = f"{run['label']}, {'train' if dashed else 'held out'}"
                        drawn.append(Curve(label, points, colours[run["label"]], dashed, marked=not dashed))
            if drawn:
                note = "Dashed: the batches trained on. Dots: the validation split."
                if metric == "kl":
                    note += " KL to what was stored: on a threshold cache it is too high by one constant for all."
                title = {"kl": "KL", "ce": "Cross-entropy"}[metric]
                yield plots.curves(f"{metric}-by-{axis}", title, note, x_label, y_label, drawn)


def _rewards(runs: Sequence[dict[str, Any]], colours: dict[str, str]) -> Iterator[Figure]:
    for key, (title, y_label) in REWARDS.items():
        drawn = []
        for run in runs:
            points = [(e["step"], float(e[key])) for e in run["history"] if key in e]
            if points:
                drawn.append(Curve(run["label"], points, colours[run["label"]]))
        if drawn:
            name = f"grpo-{title.lower().replace(' ', '-')}"
            yield plots.curves(name, title, "Means over the answers of each step.", AXES["step"], y_label, drawn)


def _by_entropy(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> Iterator[Figure]:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    order = {
        name: place
        for place, name in enumerate(
            sorted({r["entropy"] for r in rows}, key=lambda name: float(name.split("–")[0].rstrip("+")))
        )
    }
    for metric, title in (("kl", "KL by the teacher's entropy"), ("agreement", "Agreement by the teacher's entropy")):
        if rows:
            yield plots.bars(
                f"{metric}-by-entropy",
                title,
                "Held-out positions in buckets of how unsure the teacher is.",
                "entropy of the teacher, nats",
                {"kl": "KL, nats a token", "agreement": "share that agrees"}[metric],
                {
                    label: {
                        r["entropy"]: r[metric]
                        for r in sorted(rows, key=lambda r: order[r["entropy"]])
                        if r["label"] == label
                    }
                    for label in labels
                },
                [colours[label] for label in labels],
            )


def _cached(cache: dict[str, Any]) -> Iterator[Figure]:
    def by_origin(rows: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, dict[str, float]]:
        origins = dict.fromkeys(row["origin"] for row in rows)
        return {origin: {str(row[x]): row[y] for row in rows if row["origin"] == origin} for origin in origins}

    if cache["entropies"]:
        rows = [
            row | {"entropy": f"{row['entropy']:g}"}
            for row in sorted(cache["entropies"], key=lambda row: row["entropy"])
        ]
        yield plots.bars(
            *(
                "cache-entropies",
                "How sure the teacher is",
                "Completion tokens by the entropy of the teacher's distribution.",
            ),
            *("entropy, nats (lower edge of a quarter)", "share of positions"),
            by_origin(rows, "entropy", "share"),
        )
    if cache["captured_mass"]:
        curve = Curve("mass", [(row["k"], row["mass"]) for row in cache["captured_mass"]], plots.SERIES[0], marked=True)
        yield plots.curves(
            "cache-captured-mass",
            "What the best k candidates hold",
            "Mean over positions of the stored candidates' mass; what is missing to 1 is stored as the tail.",
            *("k (logarithmic)", "probability"),
            [curve],
            log_x=True,
        )
    if cache["ranks"]:
        yield plots.bars(
            *(
                "cache-ranks",
                "Rank of the completion's token",
                "Where the token that was given, or sampled, ranks with the teacher.",
            ),
            *("rank", "share of positions"),
            by_origin(cache["ranks"], "rank", "share"),
        )
