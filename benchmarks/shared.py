"""What several benchmarks need: the machine in a file name, a ratio with its interval, a peak, a saved figure. Not one to run."""

from __future__ import annotations

import os
import platform
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache import storage
from kdcache.machine import cpu
from kdcache.storage import atomic, seal


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """plan.json of a made-up cache, and a manifest that records its shards as they are: one may be there under many names."""
    shards = [
        {
            "name": shard["name"],
            "rows": 0,
            "completion_tokens": 0,
            "bytes": (folder / shard["name"]).stat().st_size,
            "sha256": storage.sha256(folder / shard["name"]),
        }
        for shard in plan["shards"]
    ]
    manifest = {"format_version": 1, "fingerprint": plan["fingerprint"], "shards": shards}
    atomic.write_json(folder / "plan.json", seal.with_checksum(plan))
    atomic.write_json(folder / "manifest.json", seal.with_checksum(manifest))


def hardware() -> str:
    """``2-core-epyc``: the machine in a file name."""
    names = re.findall(r"epyc|ryzen|xeon|apple|graviton|core", cpu().partition(",")[2].lower())
    return f"{os.cpu_count()}-core-{names[0] if names else platform.machine()}"


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The bootstrap 95% interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def ratio(ratios: list[float]) -> dict[str, Any]:
    """The median over rounds, and its interval."""
    return {"median": round(statistics.median(ratios), 4), "interval": [round(x, 4) for x in interval(ratios)]}


def peak_bytes(command: Sequence[object], **options: Any) -> int:
    """Peak resident memory of a process, by the operating system's account."""
    words = [*map(str, command)]
    process = subprocess.Popen(words, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save_figure(figure: Any, path: Path) -> None:
    """As .svg or .png, the same bytes for the same figure; closes it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
