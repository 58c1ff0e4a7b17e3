"""report.html: what was trained, what it kept and what it cost, on one page that opens anywhere; report.json and CSVs beside it.

    kd report data/demo

Takes the folders of runs, evaluations and quantized students, or one that holds them, and their cache. Nothing is measured
here: every number was written by the command that measured it, or is asked of the cache in SQL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kdcache import __version__
from kdcache.cache import manifest, query
from kdcache.errors import KDError
from kdcache.storage import atomic, folders
from kdcache.view import server
from trainer.evaluate import compare, metrics
from trainer.run import checkpoints
from trainer.run.record import CONFIG_FILE, RUN_FILE

WORST = 20  # samples shown side by side
LONGEST_TEXT = 20_000  # characters of a text on the page

Progress = Callable[[str], None]


@dataclass
class Found:
    """What the folders hold."""

    cache: Path | None
    runs: list[Path] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    quantized: list[Path] = field(default_factory=list)


def find(folders: Sequence[Path], cache: Path | None) -> Found:
    """Sort folders by what they hold; one that holds nothing itself is looked into. KDError if there is nothing to report."""
    found = Found(cache)
    for folder in folders:
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        if not any([_take(found, part) for part in ([folder] if _take(found, folder) else inside)]):
            raise KDError(f"{folder} holds no run, no evaluation, no quantized student and no cache to report on")
    return found


def _take(found: Found, folder: Path) -> bool:
    """Whether a folder is something to report on; it is then in ``found``."""
    if (folder / "plan.json").is_file():
        found.cache = found.cache or folder
        return True
    for file, kind in (
        ("quantization.json", found.quantized),
        (compare.EVALUATION_FILE, found.evaluations),
        (RUN_FILE, found.runs),
    ):
        if (folder / file).is_file():
            if folder not in kind:
                kind.append(folder)
            return True
    return False


# --- the numbers ------------------------------------------------------------------------------------------------------


def gather(found: Found, progress: Progress = lambda _: None) -> dict[str, Any]:
    """Everything the page shows, as report.json holds it."""
    labels = _labels(found.evaluations)
    runs = [_run(folder, labels) for folder in found.runs]
    methods = {run["label"]: run["method"] for run in runs}
    against = next((label for label, method in methods.items() if method == "sft"), None)
    compared: list[dict[str, Any]] = []
    if found.evaluations:
        progress("comparing what was evaluated")
        measured = {label for label, _ in labels}
        compared = compare.rows(found.evaluations, against if against in measured else None)
    asked = None
    if found.cache is not None:
        progress(f"asking {found.cache}")
        asked = _cache(found.cache)
    progress("looking for the worst samples")
    return {
        "made": date.today().isoformat(),
        "kdcache": __version__,
        "folders": [str(path) for path in (*found.runs, *found.evaluations, *found.quantized)],
        "against": against,
        "findings": _findings([row for row in compared if row["label"] in methods], against),
        "comparison": compared,
        "measured_on": [_json(folder / compare.EVALUATION_FILE)["settings"] for folder in found.evaluations],
        "runs": runs,
        "by_entropy": _by_entropy(found.evaluations),
        "worst": _worst(found, methods),
        "cache": asked,
        "cost": _cost(asked, runs),
        "quantized": [_json(folder / "quantization.json") | {"folder": str(folder)} for folder in found.quantized],
    }


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KDError(f"{path} is damaged ({error})") from None


def _labels(evaluations: Sequence[Path]) -> list[tuple[str, str]]:
    """(label, name of the folder) of each model that was evaluated."""
    entries = [entry for folder in evaluations for entry in _json(folder / compare.EVALUATION_FILE)["entries"]]
    return [(entry["label"], Path(entry["model"]).name) for entry in entries]


def _run(folder: Path, labels: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """One training run: what was asked for, and its history."""
    record = _json(folder / RUN_FILE)
    saved = [checkpoint for checkpoint in checkpoints.listed(folder) if not checkpoints.is_half(checkpoint)]
    states = [place / "trainer_state.json" for place in (folder, *saved) if (place / "trainer_state.json").is_file()]
    history = _json(states[0])["log_history"] if states else []
    method = record.get("method", record["config"].get("method"))
    finished = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    timed = [entry["seconds"] for entry in history if "seconds" in entry]
    config = folder / CONFIG_FILE
    return {
        "folder": str(folder),
        "name": folder.name,
        "label": next((label for label, name in labels if name == folder.name), folder.name),
        "method": method,
        "student": record["config"]["student"],
        "finished": record["finished"],
        "steps": max((entry["step"] for entry in history), default=0),
        "seconds": timed[-1] if timed else sum(entry.get("step_time", 0.0) for entry in history) or sum(finished),
        "tokens": max((entry.get("tokens", 0.0) for entry in history), default=0.0),
        "history": history,
        "command": f"kd {'grpo' if method == 'grpo' else 'train'} --config {config}",
        "config": config.read_text(encoding="utf-8") if config.is_file() else json.dumps(record["config"], indent=1),
        "made_with": record.get("made_with", {}),
        "caches": record["caches"],
    }


def _findings(compared: Sequence[dict[str, Any]], against: str | None) -> list[str]:
    """The differences to plain fine-tuning in sentences, with what the measurement cannot tell."""
    said = {
        "kl": "nats a token of KL to the teacher",
        "agreement": "of agreement with its first choice",
        "rougeL": "of Rouge-L",
    }
    sentences = []
    for row in compared:
        if row["metric"] not in said or "difference" not in row:
            continue
        within = row["difference_interval"]
        sure = within is not None and (within[0] > 0 or within[1] < 0)
        told = f"{row['label']} against {against}: {row['difference']:+.3f} {said[row['metric']]}"
        told += (
            f" (95% interval {within[0]:+.3f} to {within[1]:+.3f})" if within else " (too few problems for an interval)"
        )
        sentences.append(
            told + ("." if sure or within is None else ", which is no difference that this measurement can tell.")
        )
    return sentences


def _by_entropy(evaluations: Sequence[Path]) -> list[dict[str, Any]]:
    """KL and agreement of each label where the teacher is sure, and where it is not."""
    edges = (0.0, *metrics.ENTROPY_EDGES_NATS)
    sums: dict[str, dict[str, list[float]]] = {}
    for folder in evaluations:
        for entry in _json(folder / compare.EVALUATION_FILE)["entries"]:
            table = pq.read_table(folder / entry["folder"] / "forced.parquet")
            if entry["label"] == compare.TEACHER or "kl_by_entropy" not in table.column_names or not len(table):
                continue
            mine = sums.setdefault(entry["label"], {})
            for name in ("tokens", "kl", "agreement"):
                added = [sum(bucket) for bucket in zip(*table[f"{name}_by_entropy"].to_pylist())]
                mine[name] = [a + b for a, b in zip(mine.get(name, [0.0] * len(added)), added)]
    return [
        {
            "label": label,
            "entropy": f"{low:g}–{edges[i + 1]:g}" if i + 1 < len(edges) else f"{low:g}+",
            "tokens": mine["tokens"][i],
            "kl": mine["kl"][i] / mine["tokens"][i],
            "agreement": mine["agreement"][i] / mine["tokens"][i],
        }
        for label, mine in sums.items()
        for i, low in enumerate(edges)
        if mine["tokens"][i]
    ]


def _worst(found: Found, methods: dict[str, str]) -> list[dict[str, Any]]:
    """The held-out samples that the distilled student (else the last one measured) is farthest from, with what all answered."""
    if found.cache is None or not found.evaluations:
        return []
    folder = found.evaluations[0]
    evaluation = _json(folder / compare.EVALUATION_FILE)
    students = [e for e in evaluation["entries"] if e["label"] not in (compare.TEACHER, compare.COPY)]
    if not students or manifest.read_plan(found.cache)["fingerprint"] not in evaluation["settings"]["caches"]:
        return []
    looked_at = next((e for e in students if methods.get(e["label"]) == "kd"), students[-1])
    forced = pq.read_table(
        folder / looked_at["folder"] / "forced.parquet", columns=["sample_id", "tokens", "kl"]
    ).to_pylist()
    worst = sorted((row for row in forced if row["tokens"] >= 4), key=lambda row: -row["kl"] / row["tokens"])[:WORST]
    texts = _texts(found.cache, evaluation["settings"]["split"], [row["sample_id"] for row in worst])
    answers: dict[str, dict[str, str]] = {}
    for entry in evaluation["entries"]:
        for row in pq.read_table(
            folder / entry["folder"] / "answers.parquet", columns=["prompt_id", "answer"]
        ).to_pylist():
            answers.setdefault(row["prompt_id"], {}).setdefault(entry["label"], row["answer"])
    return [
        {
            "sample_id": row["sample_id"],
            "student": looked_at["label"],
            "kl": row["kl"] / row["tokens"],
            "tokens": row["tokens"],
        }
        | texts[row["sample_id"]]
        | {"answers": answers.get(texts[row["sample_id"]]["prompt_id"], {})}
        for row in worst
    ]


def _texts(cache: Path, split: str, sample_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    columns = "sample_id, prompt_id, origin, prompt, completion, reference"
    wanted = {"ids": list(sample_ids)}
    rows = query.select(
        cache, columns, None, split, "AND list_contains($ids::VARCHAR[], sample_id)", parameters=wanted
    ).to_pylist()
    return {row.pop("sample_id"): row for row in rows}


#: Name in report.json -> the shipped view it is read from.
VIEWS = {
    "entropies": "entropy_histogram",
    "captured_mass": "captured_mass_curve",
    "ranks": "token_ranks",
    "lengths": "lengths",
    "sources": "sources",
}


def _cache(cache: Path) -> dict[str, Any]:
    summary = manifest.summary(cache)
    asked: dict[str, Any] = {"summary": summary, "fields": manifest.read_plan(cache)["fields"]}
    for name, view in VIEWS.items():
        columns, rows = query.run(cache, f"SELECT * FROM {view}")
        asked[name] = [dict(zip(columns, row)) for row in rows]
    rejected = cache / "rejected.jsonl"
    lines = rejected.read_text(encoding="utf-8").splitlines() if rejected.is_file() else []
    reasons: dict[str, list[str]] = {}  # alike but for the numbers in them
    for line in lines:
        reason = json.loads(line)["reason"]
        reasons.setdefault(re.sub(r"\d+", "N", reason), []).append(reason)
    asked["rejected"] = [{"rows": len(alike), "first": alike[0]} for alike in reasons.values()]
    return asked


def _cost(asked: dict[str, Any] | None, runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the teacher took once, and what each run would have taken of it again: scored live, at the cache's own speed."""
    if asked is None or not asked["summary"]["completion_tokens"]:
        return None
    teacher_seconds, tokens = asked["summary"]["teacher_seconds"], asked["summary"]["completion_tokens"]
    learnt = [run for run in runs if run["method"] == "kd" and run["tokens"]]
    live = [run["tokens"] * teacher_seconds / tokens for run in learnt]
    return {
        "teacher_seconds": teacher_seconds,
        "teacher_tokens_per_second": tokens / teacher_seconds if teacher_seconds else None,
        "runs": [{"name": run["name"], "method": run["method"], "seconds": run["seconds"]} for run in runs],
        "saved_seconds": dict(zip([run["name"] for run in learnt], live)),
        "break_even_runs": teacher_seconds / (sum(live) / len(live)) if live and sum(live) else None,
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def write(found: Found, out: Path, progress: Progress = lambda _: None) -> Path:
    """report.html, report.json and plots/*.csv in ``out``; the page last."""
    from trainer.report import figures as drawn

    with folders.held(out, folders.REPORT):
        folders.check_writable(out, folders.REPORT)
        data = gather(found, progress)
        progress("drawing")
        figures = drawn.of(data)
        (out / "plots").mkdir(exist_ok=True)
        for figure in figures:
            atomic.write_csv(out / "plots" / f"{figure.name}.csv", figure.columns, figure.rows)
        atomic.write_json(out / "report.json", data)
        atomic.write_text(out / "report.html", _render(data, {figure.name: figure for figure in figures}))
    return out / "report.html"


def _render(data: dict[str, Any], figures: dict[str, Any]) -> str:
    import jinja2

    pages = Path(__file__).parent / "page"
    base = Path(server.__file__).parent / "page/base.css"  # as the page of kd view has it
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pages),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    environment.filters["number"] = _number
    styles = "\n".join(path.read_text(encoding="utf-8") for path in (base, pages / "report.css"))
    return environment.get_template("report.html").render(
        data=data, figures=figures, styles=styles, table=_table(data["comparison"]), teacher=compare.TEACHER
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _short(text: str | None) -> str:
    """A text that the page can bear; the whole is in report.json and in the cache."""
    text = text or ""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters in all)"


def _table(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison, a line a model and temperature, a column a metric."""
    names = [name for name in compare.ordered({row["metric"] for row in compared}) if name != "perplexity"]
    lines: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in compared:
        lines.setdefault((row["label"], row["temperature"]), {})[row["metric"]] = row
    return {
        "metrics": names,
        "lines": [{"label": key[0], "temperature": key[1], "cells": cells} for key, cells in lines.items()],
    }
