"""How fast does a cache become batches? Tokens per second from Parquet shards to packed tensors, on one core.

    kd cache-teacher --limit 200 --sparsify threshold:0.02 --out data/c
    python benchmarks/loader.py data/c                   # about a minute

trainer.data.stream.Stream (shuffled, page checksums on) is compared with `datasets.load_dataset(..., streaming=True)` of
the same shards (in file order, no checksums). numpy and the same `pack` turn the rows of `datasets` into batches, and
the first batch must equal ours. `datasets` gives rows as Python lists, rows as numpy arrays (`with_format("numpy")`), or
Arrow tables, which this package's own reader then decodes.

The process and all its threads are kept on one core. The files are read many times over, as copies under other names,
from the operating system's cache. Variants alternate within a round, in an order that rotates; medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from shared import hardware, interval
from size import completion_tokens, repeat

from kdcache.cache import documents, reader, samples
from kdcache.cache.candidates import Candidates
from kdcache.machine import cpu, versions
from kdcache.storage import atomic
from trainer.data.pack import IGNORE, Batch, pack
from trainer.data.select import select
from trainer.data.stream import Stream

HERE = Path(__file__).parent
STREAM, LISTS, NUMPY, ARROW = "trainer.data.stream.Stream", "datasets, lists", "datasets, numpy", "datasets, arrow"
GOALS = {"threshold:0.02": 200_000, "topk:64": 100_000}  # completion tokens/s
GOAL_OVER_DATASETS = 5


def pin() -> int | None:
    """Keep all threads of this process, also later ones, on one core, and return it; None where the system cannot."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    return core


# --- the same batches, from datasets ----------------------------------------------------------------------------------


def open_dataset(files: list[Path]) -> Any:
    names, columns = [str(path) for path in files], list(reader.TENSOR_COLUMNS)
    return datasets.load_dataset("parquet", data_files=names, columns=columns, split="train", streaming=True)


def flat_lists(nested: list[list[Any]], dtype: Any) -> np.ndarray:
    return np.fromiter(chain.from_iterable(nested), dtype)


def flat_arrays(nested: np.ndarray, dtype: Any) -> np.ndarray:
    return np.concatenate(nested).astype(dtype, copy=False)


def to_sample(row: dict[str, Any], flat: Callable[[Any, Any], np.ndarray]) -> reader.Sample:
    """Turn a row of `datasets` into the arrays that `pack` takes; ``flat`` joins the candidates of all positions."""
    mask, tails = row["completion_mask"], np.asarray(row["tail_logprobs"], np.float32)
    counts = np.fromiter(map(len, row["candidate_ids"]), np.int32)
    return reader.Sample(
        sample_id=row["sample_id"],
        prompt_ids=np.asarray(row["prompt_ids"], np.int32),
        completion_ids=np.asarray(row["completion_ids"], np.int32),
        supervised=np.ones(len(counts), bool) if mask is None else np.asarray(mask, bool),
        candidates=Candidates(
            flat(row["candidate_ids"], np.int32),
            reader.normalise(flat(row["candidate_logprobs"], np.float32), counts, tails),
            counts,
            tails,
        ),
    )


def by_rows(dataset: Any, flat: Callable[[Any, Any], np.ndarray], size: int, head_rows: int) -> Iterator[Batch]:
    waiting: list[reader.Sample] = []
    for row in dataset:
        waiting.append(to_sample(row, flat))
        if len(waiting) == size:
            yield pack(waiting, head_rows)
            waiting = []
    if waiting:
        yield pack(waiting, head_rows)


def by_tables(dataset: Any, size: int, head_rows: int) -> Iterator[Batch]:
    for table in dataset.with_format("arrow").iter(batch_size=size):
        yield pack(samples.unpack(table, range(len(table))), head_rows)


def check_same(expected: Batch, batch: Batch, name: str) -> None:
    for key, value in expected.items():
        # The log-probabilities are summed in another order.
        same = torch.allclose(value, batch[key], rtol=1e-5, atol=1e-6) if value.shape == batch[key].shape else False
        if not same:
            raise SystemExit(
                f"{name}: {key} of the first batch is not the batch that trainer.data.pack makes of the same samples"
            )


# --- measuring --------------------------------------------------------------------------------------------------------


def go_through(batches: Iterable[Batch]) -> tuple[int, int, float]:
    """Return the number of completion tokens (those with a loss), of all tokens, and the seconds."""
    completion = tokens = 0
    start = time.perf_counter()
    for batch in batches:
        completion += int((batch["shift_labels"] != IGNORE).sum())
        tokens += batch["input_ids"].numel()
    return completion, tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=200_000, help="completion tokens to read per round")
    parser.add_argument("--samples", type=int, default=16, help="samples per batch")
    parser.add_argument("--hardware", default=hardware())
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    core = pin()
    plan = documents.read_plan(options.cache)
    sparsify, head_rows, size = plan["fields"]["sparsify"], plan["vocab_size"], options.samples
    train = [options.cache / shard["name"] for shard in plan["shards"] if shard["name"].startswith("data/train")]

    with tempfile.TemporaryDirectory() as scratch:
        cache, files = repeat(options.cache, Path(scratch) / "cache", options.tokens, completion_tokens(train))
        stream = Stream(select([cache], "train"), head_rows, size)
        dataset = open_dataset(files)
        variants: dict[str, Callable[[], Iterable[Batch]]] = {
            STREAM: lambda: stream,  # every iteration is an epoch
            LISTS: lambda: by_rows(dataset, flat_lists, size, head_rows),
            NUMPY: lambda: by_rows(dataset.with_format("numpy"), flat_arrays, size, head_rows),
            ARROW: lambda: by_tables(dataset, size, head_rows),
        }
        first = pack(cache.read(files[0].name, 0, range(min(size, cache.row_groups(files[0].name)[0]))), head_rows)
        for name in (LISTS, NUMPY, ARROW):
            check_same(first, next(iter(variants[name]())), name)
        rates: dict[str, list[list[float]]] = {name: [] for name in variants}  # completion tokens/s, all tokens/s
        names = list(variants)
        for number in range(options.rounds + 1):  # the first warms up
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                completion, tokens, seconds = go_through(variants[name]())
                if number:
                    rates[name].append([completion / seconds, tokens / seconds])
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)

    where = "one thread, not pinned" if core is None else "one core"
    print(f"{sparsify}, {completion:,} completion tokens per round, {size} samples per batch, {where}")
    print(f"{cpu()}, {date.today()}\n")
    print(f"{'':<24}  completion tokens/s  all tokens/s   Stream over it (95% interval)")
    medians = {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in rates.items()}
    over: dict[str, Any] = {}
    for name, (completion_rate, token_rate) in medians.items():
        ratios = [ours[0] / other[0] for ours, other in zip(rates[STREAM], rates[name])]
        low, high = interval(ratios)
        over[name] = {"median": statistics.median(ratios), "interval": [low, high]}
        against = "" if name == STREAM else f"{over[name]['median']:6.2f} ({low:.2f} to {high:.2f})"
        print(f"{name:<24}  {completion_rate:19,.0f}  {token_rate:12,.0f}   {against}".rstrip())
    if sparsify in GOALS:
        met = "met" if medians[STREAM][0] >= GOALS[sparsify] else "not met"
        print(f"\ngoal: {GOALS[sparsify]:,} completion tokens/s with {sparsify}: {met}")
    for name in (LISTS, NUMPY):
        met = "met" if over[name]["median"] >= GOAL_OVER_DATASETS else "not met"
        print(f"goal: {GOAL_OVER_DATASETS} times the speed of {name}: {met}")

    results = {
        "date": str(date.today()),
        "machine": cpu(),
        "pinned_to_one_core": core is not None,
        "versions": versions("kdcache", "torch", "pyarrow", "numpy", "datasets"),
        "sparsify": sparsify,
        "precision": plan["fields"]["precision"],
        "samples_per_batch": size,
        "completion_tokens_a_round": completion,
        "completion_tokens_per_second": {name: median[0] for name, median in medians.items()},
        "tokens_per_second": {name: median[1] for name, median in medians.items()},
        "stream_over": {name: ratio for name, ratio in over.items() if name != STREAM},
        "goals": {"completion_tokens_per_second": GOALS.get(sparsify), "over_datasets": GOAL_OVER_DATASETS},
        "rounds": rates,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"loader-{re.sub(r'[^a-z0-9.]+', '-', sparsify)}-{options.hardware}-{results['date']}.json"
    atomic.write_json(options.results / name, results)


if __name__ == "__main__":
    main()
