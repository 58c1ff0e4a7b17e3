"""What grows with a cache? Time and peak memory of each operation, from 10 to 10,000 shards and 50 million tokens.

    python benchmarks/scale.py --plot docs/scale.svg                     # about an hour on two cores, 2 GB of disk
    python benchmarks/scale.py --shards 10 100 --rows 50 --show-only     # a quick look
    python benchmarks/scale.py --show benchmarks/results/scale-....json --plot docs/scale.svg

The teacher is made up, and the caches are real: two candidates per token over a vocabulary of 512, in shards that are written
with the format's own schema and encodings. All shards hold the same table with other ids. There are two axes: more shards of
the same size (50 samples of 100 tokens), and 100 shards of more samples. Each measurement is a process of its own. Its seconds
exclude the start of the process; its peak memory is what the operating system reports for the whole process, imports included.
The exponent of growth is the slope of log(seconds) over log(size) between the two largest sizes: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from memory import VOCABULARY, make_student
from shared import hardware, made_up_fields, save_figure, say

from kdcache.cache import manifest, sparsify, writer
from kdcache.cache.format import SCHEMA, SPLITS, CacheRow, fingerprint, parquet_options
from kdcache.cache.layout import shard_name, split_of_shard
from kdcache.cache.sparsify import parse
from kdcache.judge import rewards_file as judging
from kdcache.machine import cpu, peak_resident_bytes, versions
from kdcache.storage import atomic

HERE = Path(__file__).parent
K, TOKENS, PROMPT_TOKENS = 2, 100, 20
SHARDS, ROWS = (10, 100, 1_000, 10_000), 50
MORE_ROWS = (50, 500, 5_000)  # samples per shard, in AT_SHARDS shards
AT_SHARDS = 100
TIMEOUT_SECONDS = 240
SQL_MEMORY = "4GB"  # with this limit, a view that needs more fails before the machine runs out of memory
BYTES_PER_TOKEN = 20  # an estimate of the disk space that is needed; the true size is measured
#: How the names of an operation's results begin; `view NAME` has the result `sql: NAME`.
REPORTED = {
    "open": "open",
    "sum": "sum, f",
    "sum again": "sum a",
    "verify": "verify",
    "loader": "loader",
    "plan": "plan",
}
MACROS = {"captured_mass": "captured_mass(1)", "sample": "sample('made-up:7:g')"}
FIRST_TEN = ("uncertain_tokens", "disagreements")  # views of every token in order, of which users read the first rows
LOADER = {"samples_per_step": 16, "parts": 2}


# --- writing caches ---------------------------------------------------------------------------------------------------


def split_of(shard: int) -> str:
    return ("validation", "test")[shard % 2] if shard % 10 > 7 else "train"


def names_of(shards: int) -> list[str]:
    counts = dict.fromkeys(SPLITS, 0)
    names = []
    for shard in range(shards):
        split = split_of(shard)
        names.append(shard_name(split, counts[split]))
        counts[split] += 1
    return names


def base_table(rows: int) -> pa.Table:
    """Return a table of made-up samples, whose distributions are over a small vocabulary."""
    random = np.random.default_rng(0)
    sparsifier = parse(f"topk:{K}")
    samples = []
    for _ in range(rows):
        logits = random.normal(0, 3, (TOKENS, VOCABULARY)).astype(np.float32)
        full = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = np.argpartition(-full, K, axis=1)[:, :K]
        ids = np.take_along_axis(ids, np.argsort(-np.take_along_axis(full, ids, 1), axis=1), 1)
        logprobs = np.take_along_axis(full, ids, axis=1)
        completion = random.integers(2, VOCABULARY, TOKENS)
        token_logprobs = full[np.arange(TOKENS), completion]
        ranks = (full >= token_logprobs[:, None]).sum(axis=1).astype(np.int32)
        samples.append(
            CacheRow(
                sample_id="",  # ``with_ids`` writes the ids
                split="",
                source="made-up",
                task="none",
                language="en",
                origin="given",
                prompt="w2 " * PROMPT_TOKENS,
                completion="w3 " * TOKENS,
                prompt_ids=random.integers(2, VOCABULARY, PROMPT_TOKENS).tolist(),
                completion_ids=completion.tolist(),
                token_logprobs=token_logprobs,
                token_ranks=ranks,
                entropies=-(np.exp(full) * full).sum(axis=1),
                candidates=sparsifier(ids, logprobs),
            )
        )
    return writer.rows_to_table(samples, "q8")


def with_ids(table: pa.Table, first: int, split: str) -> pa.Table:
    """Return the table as other samples, with ids from ``first`` on."""
    numbers = range(first, first + len(table))
    columns = {
        "sample_id": [f"made-up:{i}:g" for i in numbers],
        "prompt_id": [f"{i:016x}" for i in numbers],
        "group_id": [f"{i:016x}" for i in numbers],
        "split": [split] * len(table),
    }
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def make_cache(folder: Path, shards: int, rows: int, tokenizer: Any) -> dict[str, Any]:
    """Write a cache of ``shards`` shards of ``rows`` samples; return its sizes."""
    fields = made_up_fields(parse(f"topk:{K}"))
    cache_fingerprint = fingerprint(fields)
    metadata = {
        "format_version": 1,
        "fingerprint": cache_fingerprint,
        "precision": "q8",
        "sparsify": fields["sparsify"],
    }
    metadata |= {"engine": "none", "seconds": 1.0, "rejected": []}
    schema = SCHEMA.with_metadata({b"kdcache": json.dumps(metadata).encode()})
    base = base_table(min(rows, 500))
    table = pa.concat_tables([base] * (rows // len(base))).combine_chunks()
    (folder / "data").mkdir(parents=True)
    names = names_of(shards)
    for number, name in enumerate(names):
        part = with_ids(table, number * rows, split_of_shard(name)).cast(schema)
        with pq.ParquetWriter(folder / name, schema, **parquet_options("q8")) as sink:
            sink.write_table(part, row_group_size=writer.ROW_GROUP_ROWS)
    plan = {"format_version": 1, "fingerprint": cache_fingerprint, "fields": fields, "vocab_size": VOCABULARY}
    plan |= {"end_of_turn": 1, "tokenizer": tokenizer, "teacher_revision": None}
    atomic.write_json(folder / "plan.json", plan | {"shards": [{"name": name, "examples": rows} for name in names]})
    words = pa.array([f"w{i}" for i in range(VOCABULARY)])
    ids = pa.array(range(VOCABULARY), pa.int32())
    writer.write_table(
        folder / "vocab.parquet", pa.table({"token_id": ids, "token": words, "bytes": words.cast(pa.binary())})
    )
    judging.prepare(folder)
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())
    tokens = shards * rows * TOKENS
    return {"shards": shards, "rows_a_shard": rows, "samples": shards * rows, "tokens": tokens, "bytes": size}


def make_examples(path: Path, samples: int) -> None:
    """Write as many examples as a cache has samples, to plan a capture of them."""
    random = np.random.default_rng(1)
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, samples, 1000):
            words = random.integers(2, VOCABULARY, (min(1000, samples - start), PROMPT_TOKENS + TOKENS - 1))
            for number, row in enumerate(words, start):
                prompt, completion = (
                    " ".join(f"w{w}" for w in part) for part in (row[:PROMPT_TOKENS], row[PROMPT_TOKENS:])
                )
                file.write(json.dumps({"id": number, "prompt": prompt, "completion": completion}) + "\n")


# --- what is measured: each operation runs in a process of its own, which reports the seconds -------------------------


def measure(what: str, folder: Path) -> dict[str, Any]:
    """Return the seconds and the peak memory of one operation on FOLDER/cache."""
    from kdcache.cache import integrity, query, reader

    if what == "plan":
        import transformers  # noqa: F401

        from kdcache.capture.config import CaptureConfig
        from kdcache.capture.resolve import resolve
    elif what == "loader":
        import trainer.data.select
        import trainer.data.stream
    cache = folder / "cache"
    before_bytes = peak_resident_bytes()
    seconds: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        begun = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - begun
        return result

    if what == "plan":
        config = CaptureConfig(
            out=folder / "planned",
            teacher=str(folder / "student"),
            examples=str(folder / "rows.jsonl"),
            engine="transformers",
            dtype="float32",
            sparsify=f"topk:{K}",
            rows_per_shard=json.loads((cache / "plan.json").read_text())["shards"][0]["examples"],
        )
        plan = timed("plan", lambda: resolve(config))
        (folder / "planned/data").mkdir(parents=True)
        for shard in plan.shards[:-1]:
            (folder / "planned" / shard.name).touch()
        todo = timed("resume: what is missing", plan.todo)
        assert len(todo) == 1
        shutil.rmtree(folder / "planned")
    elif what == "open":
        timed("open", lambda: reader.Cache(cache))
    elif what == "sum":
        timed("sum, first time", lambda: manifest.rebuild(cache))
    elif what == "sum again":
        timed("sum again, nothing changed", lambda: manifest.rebuild(cache))
    elif what == "verify":
        report = timed("verify", lambda: integrity.verify(cache))
        assert report.sound, report.problems
    elif what == "loader":
        units = timed("loader: select", lambda: trainer.data.select.select([reader.Cache(cache)], "train"))
        stream = trainer.data.stream.Stream(units, VOCABULARY, **LOADER)
        batches = iter(stream)
        timed("loader: first batch", lambda: next(batches))
        middle = iter(trainer.data.stream.Stream(units, VOCABULARY, step=stream.steps_per_epoch // 2, **LOADER))
        timed("loader: jump to the middle", lambda: next(middle))
    elif what.startswith("view "):
        view = what.removeprefix("view ")

        def ask() -> None:
            connection = query.connect(cache, memory_limit=SQL_MEMORY)
            statement = (
                f"FROM {view} LIMIT 10"
                if view in FIRST_TEN
                else f"SELECT count(COLUMNS(*)) FROM {MACROS.get(view, view)}"
            )
            connection.execute(statement).fetchall()

        timed(f"sql: {view}", ask)
    return {"seconds": seconds, "peak_bytes": peak_resident_bytes(), "imports_bytes": before_bytes}


def writing() -> dict[str, float]:
    """Return the tokens per second that one core sparsifies and writes, as a worker's background thread does."""
    rates = {}
    random = np.random.default_rng(0)
    for policy, capture_k in (("threshold:0.02", 256), ("topk:64", None)):
        sparsifier = parse(policy, capture_k)
        width = sparsifier.capture_k
        logits = -np.sort(random.exponential(1.5, (256, width)).cumsum(axis=1) / 20, axis=1).astype(np.float32)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) + np.float32(np.log(0.95))
        ids = np.stack([random.permutation(49_152)[:width] for _ in range(256)]).astype(np.int32)
        ranks = np.ones(256, np.int32)
        begun = time.thread_time()
        rows = [
            CacheRow(
                sample_id=str(i),
                split="train",
                prompt_ids=ids[0, :20].tolist(),
                completion_ids=ids[:, 0].tolist(),
                token_logprobs=logprobs[:, 0],
                token_ranks=ranks,
                entropies=sparsify.entropies(logprobs),
                candidates=sparsifier(ids, logprobs, 0, str(i)),
            )
            for i in range(128)
        ]
        with tempfile.TemporaryDirectory() as folder:
            writer.write_shard(Path(folder) / "shard.parquet", rows, "q8", {})
        rates[policy] = 128 * 256 / (time.thread_time() - begun)
    return rates


def in_new_process(what: str, folder: Path) -> dict[str, Any]:
    """Run ``measure`` in a process of its own; return its result, or why it failed."""
    command = [sys.executable, __file__, "--measure", what, str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"seconds": {}, "failed": f"not done after {TIMEOUT_SECONDS} s"}
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [f"status {process.returncode}"]
        return {"seconds": {}, "failed": last[0][:300]}
    return json.loads(process.stdout.splitlines()[-1])


def is_measured(what: str, results: dict[str, Any]) -> bool:
    """Return whether the results of an operation are among ``results``."""
    if what in REPORTED:
        return any(name.startswith(REPORTED[what]) for name in results)
    return f"sql: {what.removeprefix('view ')}" in results


def measure_cache(
    folder: Path, shards: int, rows: int, tokenizer: Any, views: list[str], with_plan: bool, previous: dict[str, Any]
) -> dict[str, Any]:
    """Return sizes and measurements of one made-up cache; what a ``previous`` run measured is not measured again."""
    whats = ["open", "sum", "sum again", "verify", "loader", *(f"view {view}" for view in views)]
    whats += ["plan"] if with_plan else []
    results: dict[str, Any] = previous.get("measured", {})
    whats = [what for what in whats if not is_measured(what, results)]
    if not whats:
        return previous
    need, free = shards * rows * TOKENS * BYTES_PER_TOKEN + 800 * shards * rows, shutil.disk_usage(folder).free
    if need > free / 2:
        raise SystemExit(
            f"{shards} shards of {rows} samples need about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
    begun = time.perf_counter()
    sizes = make_cache(folder / "cache", shards, rows, tokenizer)
    say(f"{sizes} written in {time.perf_counter() - begun:.0f} s")
    if "plan" in whats:
        make_examples(folder / "rows.jsonl", sizes["samples"])
    if "sum" not in whats:
        manifest.rebuild(folder / "cache")
    for what in whats:
        result = in_new_process(what, folder)
        failed = {REPORTED.get(what, "sql: " + what[5:]): None}
        for name, seconds in (result["seconds"] or failed).items():
            results[name] = {"seconds": seconds, "peak_bytes": result.get("peak_bytes")}
            results[name]["imports_bytes"] = result.get("imports_bytes")
            if "failed" in result:
                results[name]["failed"] = result["failed"]
            say(f"  {name}: {results[name]}")
    (folder / "rows.jsonl").unlink(missing_ok=True)
    sizes["manifest_bytes"] = (folder / "cache/manifest.json").stat().st_size
    sizes["plan_bytes"] = (folder / "cache/plan.json").stat().st_size
    shutil.rmtree(folder / "cache")
    return sizes | {"measured": results}


# --- tables and plot --------------------------------------------------------------------------------------------------


def exponent(sizes: list[float], values: list[float | None]) -> float | None:
    """Return the slope of log(values) over log(sizes) between the two largest sizes that were measured; None below two."""
    points = [(math.log(s), math.log(v)) for s, v in zip(sizes, values) if v]
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points[-2:]
    return (y1 - y0) / (x1 - x0)


def series(runs: list[dict[str, Any]], name: str, key: str) -> list[float | None]:
    """Return one measurement of each run; None where it is missing."""
    return [run["measured"].get(name, {}).get(key) for run in runs]


def show(results: dict[str, Any]) -> None:
    """Print the tables of docs/scale.md: seconds and peak memory at each size, and the exponents."""
    for policy, rate in results.get("writing_tokens_per_second", {}).items():
        print(f"sparsified and written by one core, {policy}: {rate:,.0f} tokens/s")
    for title, runs, unit in (
        ("shards", results["by_shards"], "shards"),
        ("samples", results["by_samples"], "samples"),
    ):
        if len(runs) < 2:
            continue
        sizes = [run[unit] for run in runs]
        print(
            f"\n| what | {' | '.join(f'{size:,} {title}' for size in sizes)} | exponent | peak MB, smallest and largest |"
        )
        print(f"|---|{'---|' * (len(runs) + 2)}")
        for name in dict.fromkeys(name for run in runs for name in run["measured"]):
            times, peaks = series(runs, name, "seconds"), series(runs, name, "peak_bytes")
            cells = ["-" if t is None else f"{t:.3g}" if t < 100 else f"{t:.0f}" for t in times]
            slope = exponent(sizes, times)
            memory = " .. ".join("-" if p is None else f"{p / 1e6:,.0f}" for p in (peaks[0], peaks[-1]))
            print(f"| {name} | {' | '.join(cells)} | {'-' if slope is None else f'{slope:.2f}'} | {memory} |")


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory over shards, and seconds over samples."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "kdcache"}
    )
    lines = {
        "plan": ("#6b4c9a", "o"),
        "resume: what is missing": ("#9a7fc0", "s"),
        "open": ("#3969b1", "o"),
        "sum, first time": ("#da7c30", "o"),
        "sum again, nothing changed": ("#e9b384", "s"),
        "verify": ("#cc2529", "o"),
        "loader: select": ("#3e9651", "o"),
        "loader: first batch": ("#77b886", "s"),
        "loader: jump to the middle": ("#a9d6b2", "^"),
    }
    panels = (
        ("seconds", "seconds", results["by_shards"], "shards", "shards of 50 samples of 100 tokens"),
        ("peak_bytes", "peak resident memory, MB", results["by_shards"], "shards", "the same"),
        ("seconds", "seconds", results["by_samples"], "samples", "samples in 100 shards"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), facecolor="white")
    for axis, (key, label, runs, unit, title) in zip(axes, panels):
        sizes = [run[unit] for run in runs]
        for name, (colour, marker) in lines.items():
            scale = 1e6 if key == "peak_bytes" else 1
            points = [(s, v / scale) for s, v in zip(sizes, series(runs, name, key)) if v]
            if points:
                axis.plot(*zip(*points), marker=marker, color=colour, markersize=4, linewidth=1.5, label=name)
        views = {name for run in runs for name in run["measured"] if name.startswith("sql: ")}
        for number, name in enumerate(sorted(views)):
            points = [(s, v / (1e6 if key == "peak_bytes" else 1)) for s, v in zip(sizes, series(runs, name, key)) if v]
            if points:
                label_once = {"label": "each view of sql/"} if not number else {}
                axis.plot(*zip(*points), color="#bbbbbb", linewidth=0.8, zorder=1, **label_once)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(unit)
        axis.set_ylabel(label)
        axis.set_title(title, loc="left", fontsize=9.5)
        axis.grid(which="major", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    handles, legends = axes[0].get_legend_handles_labels()
    figure.legend(handles, legends, loc="lower center", ncols=5, frameon=False, fontsize=8.5)
    figure.suptitle("What grows with a cache", x=0.02, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0.13, 1, 0.98))
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=SHARDS)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=MORE_ROWS, help=f"samples per shard, in {AT_SHARDS} shards"
    )
    parser.add_argument("--views", nargs="+", help="only these [default: all of sql/]")
    parser.add_argument("--folder", type=Path, help="folder for the made-up caches [default: a temporary one]")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--plot", type=Path, help="where to draw: an .svg or .png")
    parser.add_argument("--show", type=Path, help="print and plot these results instead of measuring")
    parser.add_argument("--show-only", action="store_true", help="measure, print, and keep no results")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    if options.show:
        results = json.loads(options.show.read_text())
    else:
        from kdcache.cache import query

        views = options.views or list(query.VIEWS)
        results = {"date": str(date.today()), "machine": cpu(), "load_at_start": os.getloadavg()[0]}
        results["versions"] = versions("kdcache", "pyarrow", "duckdb", "numpy", "torch")
        results |= {"tokens_a_sample": TOKENS, "candidates_a_token": K, "by_shards": [], "by_samples": []}
        name = f"scale-{hardware()}-{results['date']}.json"
        before: dict[tuple[int, int], dict[str, Any]] = {}
        if (options.results / name).is_file():  # written today: resume the interrupted run
            old = json.loads((options.results / name).read_text())
            before = {(r["shards"], r["rows_a_shard"]): r for axis in ("by_shards", "by_samples") for r in old[axis]}
        sizes = [("by_shards", shards, ROWS) for shards in options.shards]
        sizes += [("by_samples", AT_SHARDS, rows) for rows in options.rows]
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            tokenizer = make_student(Path(scratch) / "student")
            measured: dict[tuple[int, int], dict[str, Any]] = {}
            for axis, shards, rows in sorted(sizes, key=lambda size: (size[1] * size[2], size[1])):
                if (shards, rows) not in measured:
                    measured[shards, rows] = measure_cache(
                        Path(scratch),
                        shards,
                        rows,
                        tokenizer,
                        views,
                        axis == "by_shards",
                        before.get((shards, rows), {}),
                    )
                results[axis].append(measured[shards, rows])
                results["writing_tokens_per_second"] = results.get("writing_tokens_per_second") or writing()
                if not options.show_only:
                    options.results.mkdir(exist_ok=True)
                    atomic.write_json(options.results / name, results)
    show(results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
