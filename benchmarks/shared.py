"""What several benchmarks share: names of machines, ratios with intervals, peak memory, figures. Not a benchmark itself."""

from __future__ import annotations

import json
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

import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache.format import parquet_options
from kdcache.cache.sparsify import Policy
from kdcache.machine import cpu
from kdcache.storage import atomic, seal


def made_up_fields(policy: Policy) -> dict[str, Any]:
    """Return the fields of a made-up cache's plan."""
    fields = {"teacher": "made-up", "engine": "none", "dtype": "none", "mode": "score", "precision": "q8"}
    return fields | {"sparsify": str(policy), "capture_k": policy.capture_k}


def write_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write plan.json of a made-up cache and a manifest of its shards, which may be copies of one file under many names."""
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


def copy_shard(source: Path, target: Path, precision: str) -> None:
    """Write a shard again under another name. A plain copy would be refused, because a shard records its own name."""
    with pq.ParquetFile(source) as shard, open(target, "w+b") as sink:
        metadata = json.loads(shard.schema_arrow.metadata[b"kdcache"]) | {"name": f"data/{target.name}"}
        schema = shard.schema_arrow.with_metadata({b"kdcache": json.dumps(metadata, ensure_ascii=False).encode()})
        with pq.ParquetWriter(sink, schema, **parquet_options(precision)) as writer:
            for row_group in range(shard.num_row_groups):
                writer.write_table(shard.read_row_group(row_group).cast(schema))
        seal.seal(sink)


def hardware() -> str:
    """Return what a file name says of this machine, such as ``2-core-epyc``."""
    names = re.findall(r"epyc|ryzen|xeon|apple|graviton|core", cpu().partition(",")[2].lower())
    return f"{os.cpu_count()}-core-{names[0] if names else platform.machine()}"


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """Return the bootstrap 95% interval of the median."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def ratio(ratios: list[float]) -> dict[str, Any]:
    """Return the median over rounds, and its interval."""
    return {"median": round(statistics.median(ratios), 4), "interval": [round(x, 4) for x in interval(ratios)]}


def peak_bytes(command: Sequence[object], **options: Any) -> int:
    """Run a command; return its peak resident memory as the operating system reports it. SystemExit if it fails."""
    words = [*map(str, command)]
    process = subprocess.Popen(words, **options)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} failed with status {status}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure as .svg or .png, with the same bytes for the same figure, and close it."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)
