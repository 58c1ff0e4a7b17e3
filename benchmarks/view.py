"""How long does `kd view` make its user wait, and how much memory does it take, on a cache of 100,000 samples?

    python benchmarks/view.py                      # two minutes and 300 MB of disk
    python benchmarks/view.py --samples 10000 --out data/view-cache

The cache is made up (16 candidates, about 40 tokens per completion, a vocabulary of 49,152, a reward for half of the
samples), and the real writer writes it. Every sample has its own text and numbers. The real command is timed in a process of
its own. It gets the HTTP requests that the page sends, each on a fresh connection. Its memory is VmHWM, which the operating
system keeps. The load average shows what else the machine was busy with (this benchmark alone makes about 1).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from shared import hardware, made_up_fields, write_plan

from kdcache.cache import writer
from kdcache.cache.format import CacheRow, fingerprint
from kdcache.cache.layout import shard_name
from kdcache.cache.sparsify import parse
from kdcache.machine import cpu, versions
from kdcache.storage import atomic

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, K, ROWS = 49_152, 16, 1024
SYLLABLES = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]


def made_up_words(random: np.random.Generator) -> list[str]:
    """Return a token for each id of the vocabulary: one to three syllables, most of them after a space."""
    picks = random.integers(0, len(SYLLABLES), (VOCABULARY, 3))
    lengths = random.integers(1, 4, VOCABULARY)
    joins = random.random(VOCABULARY) < 0.3
    return [
        ("" if joined else " ") + "".join(SYLLABLES[i] for i in row[:n])
        for row, n, joined in zip(picks, lengths, joins)
    ]


def made_up_candidates(random: np.random.Generator, count: int) -> list[Any]:
    """Return the candidates of ``count`` completions of 10 to 70 tokens."""
    sparsifier, completions = parse(f"topk:{K}"), []
    for _ in range(count):
        length = int(random.integers(10, 71))
        logits = random.normal(0, 1, (length, K)) * random.uniform(0.5, 4, (length, 1))
        logprobs = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) - 0.1), axis=1)
        ids = np.argsort(random.random((length, 200)), axis=1)[:, :K] + random.integers(
            0, VOCABULARY - 200, (length, 1)
        )
        completions.append(sparsifier(ids, logprobs.astype(np.float32)))
    return completions


def make_cache(folder: Path, samples: int) -> None:
    """Write a made-up cache of so many samples, in shards of 1,024; the last two shards are validation and test."""
    random = np.random.default_rng(0)
    words, pool = made_up_words(random), made_up_candidates(random, 128)
    fields = made_up_fields(parse(f"topk:{K}")) | {"weights": "", "sampling": None, "samples": None}
    meta = {"format_version": 1, "fingerprint": fingerprint(fields), "rejected": []}
    (folder / "data").mkdir(parents=True)
    counts = [min(ROWS, samples - first) for first in range(0, samples, ROWS)]
    shards = []
    for number, count in enumerate(counts):
        split = {len(counts) - 1: "test", len(counts) - 2: "validation"}.get(number, "train")
        rows = []
        for i in range(number * ROWS, number * ROWS + count):
            candidates = pool[random.integers(len(pool))]
            length = len(candidates.counts)
            prompt, completion = random.integers(0, VOCABULARY, 30), random.integers(0, VOCABULARY, length)
            entropies = random.gamma(2.0, random.uniform(0.2, 1), length).astype(np.float32)
            token_logprobs = -random.gamma(2.0, random.uniform(0.2, 1), length).astype(np.float32)
            ranks = random.integers(1, 9, length).astype(np.int32)
            row = CacheRow(
                sample_id=f"made-up:{i}:g",
                prompt_id=f"{i:032x}",
                group_id=str(i),
                source="made-up",
                split=split,
                task="t",
                language="en",
                origin="given",
                prompt="".join(words[t] for t in prompt),
                completion="".join(words[t] for t in completion),
                reward=float(i % 4 > 0) if i % 2 else None,
                prompt_ids=prompt.tolist(),
                completion_ids=completion.tolist(),
                token_logprobs=token_logprobs,
                token_ranks=ranks,
                entropies=entropies,
                candidates=candidates,
            )
            rows.append(row)
        shards.append({"name": shard_name(split, number), "examples": count})
        writer.write_shard(folder / shards[-1]["name"], rows, "q8", meta)
    plan = {"format_version": 1, "fingerprint": meta["fingerprint"], "fields": fields, "teacher_revision": None}
    plan |= {"vocab_size": VOCABULARY, "end_of_turn": 2, "tokenizer": {}, "shards": shards}
    write_plan(folder, plan)
    ids = pa.array(range(VOCABULARY), pa.int32())
    vocabulary = {"token_id": ids, "token": words, "bytes": [word.encode() for word in words]}
    writer.write_table(folder / "vocab.parquet", pa.table(vocabulary))


def get(address: str, what: str, **parameters: Any) -> tuple[dict[str, Any], float]:
    """Return an answer of the server, and the seconds that it took."""
    begun = time.perf_counter()
    with urllib.request.urlopen(f"{address}api/{what}?{urllib.parse.urlencode(parameters)}") as answer:
        content = json.load(answer)
    return content, time.perf_counter() - begun


def first_page(cache: Path) -> tuple[subprocess.Popen, str, dict[str, float]]:
    """Start `kd view`; return the process, its address, and the seconds until the address, the page and the first list."""
    command = [sys.executable, "-m", "kdcache", "view", str(cache), "--no-browser", "--port", "0"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    address = process.stdout.readline().strip()
    seconds = {"command_to_address": time.perf_counter() - begun}
    urllib.request.urlopen(address).read()
    seconds["command_to_page"] = time.perf_counter() - begun
    _, seconds["about"] = get(address, "about")
    _, seconds["first_list"] = get(address, "samples")
    seconds["command_to_first_list"] = time.perf_counter() - begun
    return process, address, seconds


def measured(address: str, samples: int) -> dict[str, float]:
    """Return the seconds of what a reader does; each request is sent twice."""
    seconds = {}
    middle = f"made-up:{samples // 2}:g"
    requests: dict[str, tuple[str, dict[str, Any]]] = {
        "search": ("samples", {"search": "bala"}),
        "search_of_nothing": ("samples", {"search": "no such text"}),
        "last_page": ("samples", {"offset": samples - 50}),
        "split": ("samples", {"split": "test"}),
        **{f"sort_{sort}": ("samples", {"sort": sort}) for sort in ("uncertain", "worst", "longest", "failed")},
        "sample_in_the_middle": ("sample", {"id": middle}),
        "its_candidates": ("candidates", {"id": middle, "first": 0}),
    }
    for name, (what, parameters) in requests.items():
        for time_of in ("first", "second"):
            begun = time.perf_counter()
            while "measuring" in get(address, what, **parameters)[0]:
                time.sleep(0.02)
            seconds[f"{name}_{time_of}"] = time.perf_counter() - begun
    return seconds


def peak_resident_bytes(process: subprocess.Popen) -> int:
    """Return the peak resident memory of a process that runs."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def run(cache: Path, samples: int, starts: int) -> dict[str, Any]:
    """Start the command several times and measure the last one; return medians over the starts, and the measurements."""
    begun: list[dict[str, float]] = []
    for start in range(starts):
        process, address, seconds = first_page(cache)
        begun.append(seconds)
        at_first = peak_resident_bytes(process)
        if start == starts - 1:
            measurements = measured(address, samples)
            peak = peak_resident_bytes(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    medians = {name: statistics.median(seconds[name] for seconds in begun) for name in begun[0]}
    return {
        "seconds": {name: round(value, 4) for name, value in (medians | measurements).items()},
        "peak_resident_bytes_after_the_first_list": at_first,
        "peak_resident_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--starts", type=int, default=5, help="of the command; the figures are their medians")
    parser.add_argument(
        "--out", type=Path, help="folder of the cache, which is written unless it exists [default: a temporary folder]"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cache = options.out or Path(scratch) / "cache"
        if not (cache / "plan.json").is_file():
            make_cache(cache, options.samples)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        results = run(cache, options.samples, options.starts)
    for name, value in results["seconds"].items():
        print(f"{name:28} {value:8.3f} s")
    print(f"peak resident memory {results['peak_resident_bytes'] / 1e6:,.0f} MB, cache {size / 1e6:,.0f} MB on disk")
    facts = {"date": str(date.today()), "machine": cpu(), "versions": versions("duckdb", "pyarrow", "numpy")}
    facts |= {"load_average": round(os.getloadavg()[0], 1), "samples": options.samples, "cache_bytes": size}
    options.results.mkdir(exist_ok=True)
    atomic.write_json(options.results / f"view-{hardware()}-{date.today()}.json", facts | results)


if __name__ == "__main__":
    main()
