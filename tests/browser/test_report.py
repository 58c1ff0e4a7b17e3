"""report.html in a real browser, made by the real command of real (tiny) runs; it opens as a file and asks for nothing."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from helpers import capture_plan, run_kd
from kdcache.capture import run as capture
from trainer.distill import plan as run
from trainer.distill import trainer as distill
from trainer.distill.config import TrainConfig
from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.run import evaluate
from trainer.student.make import init_student

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&amp; a \u202egnihtemos\u202c \u200fc"
)
LONG = "word" * 25_000  # on one line


@pytest.fixture(scope="module")
def work(tiny_model, tmp_path_factory) -> Path:
    """A folder as a recipe leaves it: cache, student, a KD and an SFT run, and their evaluation."""
    folder = tmp_path_factory.mktemp("work")
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(40):
            row = {"id": f"<b>{i}'\"", "prompt": f"{i} {HOSTILE}", "completion": f"{HOSTILE} {i}", "reference": LONG}
            file.write(json.dumps(row | ({"prompt": None} if i == 7 else {})) + "\n")
    capture.run(
        capture_plan(
            *(tiny_model, folder / "rows.jsonl", folder / "cache"),
            **{"sparsify": "threshold:0.02", "capture_k": 64, "near_duplicates": "keep"},
        )
    )
    init_student(tiny_model, folder / "student", "1")
    for method in ("kd", "sft"):
        arguments = {"learning_rate": 1e-3, "max_steps": 6, "report_to": "none", "logging_steps": 1}
        config = TrainConfig(
            ((folder / "cache"),),
            str(folder / "student"),
            folder / method,
            method=method,
            arguments=arguments,
            evals_per_epoch=2,
        )
        distill.train(run.prepare(config), lambda *_: None)
    models = tuple((name, str(folder / name)) for name in ("student", "sft", "kd"))
    evaluate(
        EvaluateConfig(
            models, (folder / "cache",), folder / "evaluation", generate=6, max_new_tokens=8, engine="transformers"
        )
    )
    return folder


@pytest.fixture(scope="module")
def report(work) -> Path:
    facts = json.loads(run_kd(work, "report", work, "--out", work / "report", "--json").stdout)
    assert (facts["runs"], facts["evaluations"], facts["cache"]) == (2, 1, str(work / "cache"))
    return Path(facts["report"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_renders_with_data_in_every_plot_and_asks_for_nothing(visit, report, scheme):
    visited = visit(f"file://{report}", color_scheme=scheme)
    page = visited.page
    worst = page.locator("#worst .sample").count()
    assert 10 < worst <= 20
    assert page.locator("h2").all_inner_texts() == [
        *("What was kept", "Training", "The cache", f"The {worst} worst samples", "Cost", "Provenance")
    ]
    for figure in page.locator("figure").all():
        image = figure.locator("svg[role=img]")
        assert image.count() == 1 and len(image.get_attribute("aria-label")) > 20
        assert figure.locator("tbody tr").count() > 0
        drawn = image.locator("[style*='--series'], [style*='--ink-muted']")
        assert drawn.count() > 0, figure.get_attribute("id")
    names = {path.stem for path in (report.parent / "plots").glob("*.csv")}
    assert names == {f.get_attribute("id").removeprefix("figure-") for f in page.locator("figure").all()}
    assert {"kl-by-step", "kl-by-tokens", "ce-by-seconds", "compared-kl", "kl-by-entropy", "cache-entropies"} <= names
    assert [request for request in visited.requests if request != f"file://{report}"] == []


def test_numbers_on_the_page_are_those_of_the_files(visit, report):
    page = visit(f"file://{report}").page
    data = json.loads((report.parent / "report.json").read_text(encoding="utf-8"))
    value = next(row["value"] for row in data["comparison"] if (row["label"], row["metric"]) == ("kd", "kl"))
    row = page.locator("#kept table.wide tr", has=page.locator("th", has_text=re.compile("^kd$")))
    assert f"{value:#.3g}" in row.inner_text()
    legend = page.locator("#kept .legend dt").all_text_contents()
    assert legend == page.locator("#kept table.wide thead th").all_text_contents()[2:-1]
    lines = list(csv.DictReader((report.parent / "plots" / "compared-kl.csv").read_text().splitlines()))
    line = next(line for line in lines if line["model"] == "kd")
    assert float(line["low"]) <= value <= float(line["high"])
    tokens = {
        row["label"]: sum(r["tokens"] for r in data["by_entropy"] if r["label"] == row["label"])
        for row in data["by_entropy"]
    }
    assert len(set(tokens.values())) == 1 and tokens["kd"] > 0
    trained = [entry for run in data["runs"] if run["name"] == "kd" for entry in run["history"] if "kl" in entry]
    assert len(trained) == 6 and trained[-1]["tokens"] > trained[0]["tokens"] > 0 and trained[-1]["seconds"] > 0
    assert data["cost"]["break_even_runs"] > 0 and data["runs"][0]["made_with"]["torch"]


def test_a_hostile_text_is_shown_as_text(visit, report):
    visited = visit(f"file://{report}")
    page = visited.page
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = page.locator("#worst pre").all_inner_texts()
    assert any(HOSTILE in text for text in shown)
    assert any(f"({len(LONG):,} characters in all)" in text for text in shown)
    assert (
        page.evaluate("window.hacked") is None and page.locator("#worst img, #worst script, body script").count() == 0
    )
    assert page.locator("#worst bdi").first.inner_text().startswith("rows:<b>")
    assert len((report.parent / "report.html").read_bytes()) < 3_000_000


def test_the_page_fits_a_phone_and_the_keyboard_reaches_everything(visit, report):
    page = visit(f"file://{report}", viewport={"width": 390, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#axis-step").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#figure-kl-by-tokens")).to_be_visible()
    expect(page.locator("#figure-kl-by-step")).to_be_hidden()
    details = page.locator("#figure-kl-by-tokens details")
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(details.locator("table")).to_be_visible()


def test_what_cannot_be_reported_is_a_clear_sentence(work, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no run" in run_kd(tmp_path, "report", tmp_path / "empty", code=1).stderr
    assert "holds no run" in run_kd(tmp_path, "report", tmp_path / "nowhere", code=1).stderr
    alone = json.loads(run_kd(tmp_path, "report", work / "cache", "--out", tmp_path / "r", "--json").stdout)
    assert alone["runs"] == 0 and "What was kept" not in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
