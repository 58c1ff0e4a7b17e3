"""What does a cache cost, and how fast is it read? Bytes per token by column, and tokens/s on one thread.

    kd cache-teacher --limit 200 --sparsify threshold:0.02 --out data/c
    python benchmarks/size.py data/c                     # about a minute
    python benchmarks/size.py data/c --exact data/f      # data/f is the same cache made with --precision f32

kdcache.cache.reader reads the columns that a trainer needs (row groups to Samples, page checksums on). It is compared with
the same samples in plain Parquet (nested lists, zstd, pyarrow's own choice of encodings, no checksums) and through
`datasets.load_dataset`. Plain Parquet would hold exact log-probabilities. With --exact, they come from a cache of the same
rows that holds them. Without it the rounded ones are written, which compress better than exact ones would.

The files are read many times, as copies under other names, so that a round takes long enough. They are in the operating
system's cache. Variants alternate within a round, and the figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from shared import copy_shard, hardware, write_plan

from kdcache.cache import documents, reader, writer
from kdcache.cache.format import SCHEMA
from kdcache.cache.layout import shard_name
from kdcache.cache.shard import column_chunks
from kdcache.machine import cpu, versions
from kdcache.storage import atomic

HERE = Path(__file__).parent


# --- bytes ------------------------------------------------------------------------------------------------------------


def bytes_by_column(files: list[Path]) -> dict[str, int]:
    """Return the compressed bytes of each column, from the footers; all other bytes count as ``footers``."""
    sizes: dict[str, int] = dict.fromkeys(SCHEMA.names, 0)
    for path in files:
        for chunk in column_chunks(pq.read_metadata(path)):
            name = chunk.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    sizes["footers"] = sum(path.stat().st_size for path in files) - sum(sizes.values())
    return sizes


def completion_tokens(files: list[Path]) -> int:
    return sum(int(np.sum(pq.read_table(path, columns=["completion_tokens"])[0].to_numpy())) for path in files)


def print_columns(sizes: dict[str, int], tokens: int) -> None:
    total = sum(sizes.values())
    print(f"{'column':<20}  bytes/token  share")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size:
            print(f"{name:<20}  {size / tokens:11.2f}  {size / total:5.1%}")
    print(f"{'all':<20}  {total / tokens:11.2f}")


# --- reading: each function returns the number of completion tokens that it read --------------------------------------


def read_cache(cache: reader.Cache) -> int:
    tokens = 0
    for shard in cache.plan["shards"]:
        name = Path(shard["name"]).name
        for group, rows in enumerate(cache.row_groups(name)):
            for sample in cache.read(name, group, range(rows)):
                tokens += len(sample.candidates)
    return tokens


def flat(table: pa.Table) -> int:
    """Turn every column into flat numpy arrays; return the number of tokens in ``completion_ids``."""
    tokens = 0
    for name in table.column_names:
        for chunk in table[name].chunks:
            lengths = []
            while pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                lengths.append(np.diff(chunk.offsets.to_numpy()))
                chunk = chunk.flatten()
            chunk.to_numpy(zero_copy_only=False)
            tokens += int(lengths[0].sum()) if name == "completion_ids" else 0
    return tokens


def read_plain(files: list[Path]) -> int:
    tokens = 0
    for path in files:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                tokens += flat(file.read_row_group(group, use_threads=False))
    return tokens


def read_dataset_arrow(dataset: Any) -> int:
    return sum(flat(table) for table in dataset.with_format("arrow").iter(batch_size=writer.ROW_GROUP_ROWS))


def read_dataset_numpy(dataset: Any) -> int:
    return sum(len(row["completion_ids"]) for row in dataset.with_format("numpy"))


# --- what is read -----------------------------------------------------------------------------------------------------


def repeat(cache: Path, folder: Path, tokens_wanted: int, tokens: int) -> tuple[reader.Cache, list[Path]]:
    """Copy the cache's train shards under many names; return them as a cache, and their paths."""
    plan = documents.read_plan(cache)
    sources = [cache / shard["name"] for shard in plan["shards"] if shard["name"].startswith("data/train")]
    (folder / "data").mkdir(parents=True)
    names = []
    for _ in range(max(1, round(tokens_wanted / tokens))):
        for source in sources:
            names.append(shard_name("train", len(names)))
            copy_shard(source, folder / names[-1], plan["fields"]["precision"])
    write_plan(folder, plan | {"shards": [{"name": name} for name in names]})
    return reader.Cache(folder), [folder / name for name in names]


def write_plain(sources: list[Path], folder: Path, copies: int) -> list[Path]:
    """Write the tensor columns as anybody would, in row groups of the same length; ``copies`` of each file."""
    folder.mkdir()
    paths = []
    for number, source in enumerate(sources):
        table = pq.read_table(source, columns=list(reader.TENSOR_COLUMNS)).replace_schema_metadata(None)
        for copy in range(copies):
            paths.append(folder / f"{number}-{copy}.parquet")
            if copy:
                shutil.copy(folder / f"{number}-0.parquet", paths[-1])
            else:
                pq.write_table(table, paths[-1], compression="zstd", row_group_size=writer.ROW_GROUP_ROWS)
    return paths


def load_dataset(files: list[Path], cache_folder: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    names = [str(path) for path in files]
    columns = list(reader.TENSOR_COLUMNS)
    return datasets.load_dataset(
        "parquet", data_files=names, columns=columns, split="train", cache_dir=str(cache_folder)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--exact", type=Path, help="a cache of the same rows made with --precision f32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=500_000, help="completion tokens to read per round")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    plan = documents.read_plan(options.cache)
    files = [options.cache / shard["name"] for shard in plan["shards"]]
    tokens = completion_tokens(files)
    train = [path for path in files if path.name.startswith("train")]
    train_tokens = completion_tokens(train)
    sizes = bytes_by_column(files)
    candidates = sizes["candidate_ids"] + sizes["candidate_logprobs"]
    sparsify, precision = plan["fields"]["sparsify"], plan["fields"]["precision"]
    print(f"{sparsify}, {precision}, {tokens:,} completion tokens; {cpu()}, {date.today()}")
    print_columns(sizes, tokens)
    print(f"candidates (ids and log-probabilities): {candidates / tokens:.1f} bytes per token\n")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cache, copies = repeat(options.cache, folder / "cache", options.tokens, train_tokens)
        exact = [(options.exact or options.cache) / path.relative_to(options.cache) for path in train]
        plain = write_plain(exact, folder / "plain", len(copies) // len(train))
        plain_sizes = bytes_by_column(plain)
        plain_tokens = train_tokens * len(plain) // len(train)
        begun = time.perf_counter()
        dataset = load_dataset(copies, folder / "datasets")
        preparing = time.perf_counter() - begun
        first_rows = dataset.select(range(min(len(dataset), 200)))  # more would take too long
        variants: dict[str, Callable[[], int]] = {
            "kdcache.cache.reader, to Samples": lambda: read_cache(cache),
            "plain Parquet, to flat numpy": lambda: read_plain(plain),
            "load_dataset, arrow to flat numpy": lambda: read_dataset_arrow(dataset),
            "load_dataset, numpy rows": lambda: read_dataset_numpy(first_rows),
        }
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 1):  # the first round warms up
            for name, read in variants.items():
                begun = time.perf_counter()
                count = read()
                if number:
                    rates[name].append(count / (time.perf_counter() - begun))
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
        prepared = sum(path.stat().st_size for path in (folder / "datasets").rglob("*.arrow"))
    medians = {name: statistics.median(rounds) for name, rounds in rates.items()}
    first = next(iter(medians.values()))
    stored = {name: candidates / tokens for name in variants}
    plain_name = "plain Parquet, to flat numpy"
    stored[plain_name] = (plain_sizes["candidate_ids"] + plain_sizes["candidate_logprobs"]) / plain_tokens
    print(f"{'one thread':<34}  candidate bytes/token  tokens/s   against the first")
    for name, rate in medians.items():
        print(f"{name:<34}  {stored[name]:21.1f}  {rate:9,.0f}  {rate / first:5.2f}")
    values = "exact" if options.exact or precision == "f32" else "rounded (no --exact)"
    print(f"plain Parquet holds {values} log-probabilities")
    print(
        f"load_dataset first writes its own copy: {plain_tokens / preparing:,.0f} tokens/s once, {prepared / plain_tokens:.0f} bytes per token"
    )
    results = {
        "date": str(date.today()),
        "machine": cpu(),
        "versions": versions("kdcache", "pyarrow", "numpy", "datasets"),
        "sparsify": sparsify,
        "precision": precision,
        "completion_tokens": tokens,
        "bytes_per_token": {name: round(size / tokens, 3) for name, size in sizes.items()},
        "candidate_bytes_per_token": candidates / tokens,
        "plain": {"values": values, "candidate_bytes_per_token": stored[plain_name]},
        "load_dataset": {
            "prepare_tokens_per_second": plain_tokens / preparing,
            "bytes_per_token": prepared / plain_tokens,
        },
        "tokens_per_second": medians,
        "rounds": rates,
    }
    options.results.mkdir(exist_ok=True)
    name = f"size-{re.sub(r'[^a-z0-9.]+', '-', sparsify)}-{precision}-{hardware()}-{results['date']}.json"
    atomic.write_json(options.results / name, results)


if __name__ == "__main__":
    main()
