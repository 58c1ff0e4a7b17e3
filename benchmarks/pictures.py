"""Draw the pictures of README.md from the demo's output and from a result in benchmarks/results.

    python benchmarks/pictures.py data/demo                # all three, into docs/images
    python benchmarks/pictures.py data/demo --only plot    # recovered.svg alone, which needs no demo

The screenshots are of the real pages in a real Chromium (``apt install chromium``; playwright comes with the packages of
``make test``), in their light theme: `kd view` with one token's candidates open, and the top of `kd report`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECOVERED = ROOT / "benchmarks/results/recovered-dolly-2-core-epyc-2026-11-24.json"
MOST_BYTES = 200_000  # of a picture
WIDTH, HEIGHT = 1180, 640  # pixels of a screenshot
#: The targets of the plot: name, color, marker.
TARGETS = {
    "threshold:0.02": ("threshold 0.02 (default)", "#1f5fa8", "o"),
    "threshold:0.01": ("threshold 0.01", "#6aa3dd", "o"),
    "draws:50": ("RS-KD, 50 draws", "#c2571a", "D"),
    "topk:16": ("top-16, bucket", "#9a9a9a", "s"),
    "topk:64": ("top-64, bucket", "#555555", "s"),
    "topk:64-scaled": ("top-64, scaled to 1", "#555555", "^"),
}
STUDENTS = {"pruned": "a student of 10 of 30 layers", "scratch": "a small student from scratch"}


def recovered(result: Path, out: Path) -> None:
    """Plot what each kept target recovers of full distillation against the bytes that it takes per token."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "kdcache", "svg.fonttype": "none"}  # the same small file every time
    import matplotlib.pyplot as plt

    runs = json.loads(result.read_text(encoding="utf-8"))["runs"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for panel, (student, title) in zip(panels, STUDENTS.items()):
        for name, bytes_per_token, shares in recovered_shares(runs, student):
            mean, (label, color, marker) = statistics.fmean(shares), TARGETS[name]
            bars = [[mean - min(shares)], [max(shares) - mean]]  # the lowest and the highest seed
            panel.errorbar(
                bytes_per_token, mean, yerr=bars, fmt=marker, color=color, capsize=3, linewidth=1, label=label
            )
        panel.axhline(100, color="#2a7d4f", linewidth=1)
        panel.set(title=title, xlabel="bytes per token", xlim=(20, 160), ylim=(0, 115))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("% of full distillation's gain in cross-entropy")
    panels[0].annotate("the whole vocabulary: 98,304 bytes", (22, 103), fontsize=8, color="#2a7d4f")
    panels[1].legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(out, metadata={"Date": None})


def recovered_shares(runs: Sequence[dict[str, Any]], student: str) -> Iterator[tuple[str, float, list[float]]]:
    """Yield each target's name, its bytes per token, and the share recovered by each seed in percent."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run["student"] == student:
            by_seed.setdefault(run["seed"], {})[run["variant"]] = run
    first = next(iter(by_seed.values()))
    for variant, run in first.items():
        if variant in ("before", "ce", "full"):
            continue
        shares = [
            100 * (seed["ce"]["ce"] - seed[variant]["ce"]) / (seed["ce"]["ce"] - seed["full"]["ce"])
            for seed in by_seed.values()
        ]
        yield variant, run["bytes_per_token"], shares


@contextmanager
def viewer(demo: Path) -> Iterator[str]:
    """Serve `kd view` of the demo's cache and student; yield its address."""
    command = [sys.executable, "-m", "kdcache", "view", demo / "cache", "--student", demo / "kd", "--no-browser"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield next(line.split()[-1] for line in process.stdout if "http://" in line)
        finally:
            process.terminate()


def screenshots(demo: Path, out: Path) -> None:
    """Take a picture of `kd view` at an uncertain token, and of the first screen of `kd report`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, viewer(demo) as address:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(address)
        point_at_uncertain_token(page)
        page.screenshot(path=out / "view.png")
        page.goto((demo / "report/report.html").absolute().as_uri())
        page.screenshot(path=out / "report.png")
        browser.close()


def point_at_uncertain_token(page: Any) -> None:
    """Point at a token of the first sample where the teacher was in doubt, with the student's probabilities beside it."""
    page.get_by_role("button", name="Teacher's entropy").click()
    page.locator(".token[data-shade='4']").first.hover()
    page.locator(".bar.student").first.wait_for()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of the demo's output")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images")
    parser.add_argument("--only", choices=("plot", "screenshots"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.only != "screenshots":
        recovered(RECOVERED, options.out / "recovered.svg")
    if options.only != "plot":
        screenshots(options.demo, options.out)
    for picture in sorted(options.out.iterdir()):
        size = picture.stat().st_size
        print(f"{picture.name}  {size:,} bytes" + ("  TOO LARGE" if size > MOST_BYTES else ""))


if __name__ == "__main__":
    main()
