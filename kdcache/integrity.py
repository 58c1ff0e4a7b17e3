"""Is this cache whole and true? Find what is not, name it, set it aside, so that the next capture redoes just that.

    kd cache verify data/cache --repair

Every byte is covered: pages by their checksums, footers by the manifest's sha256, and what the numbers must fulfil
(sorted, inside the vocabulary, candidates + tail = 1, ...) by looking at each of them. One row group is in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import format, lock, manifest, sparsify, storage
from kdcache.errors import KDError, first_line
from kdcache.storage import Location

#: How far candidates + tail may be from 1: what rounding does to a position's total (docs/format.md).
MASS_TOLERANCE = {"q8": 0.02, "f32": 1e-5}


@dataclass
class Report:
    """What was found: ``problems`` by the name of the file that has them, in words."""

    cache: Location
    shards: int = 0  # looked at
    rows: int = 0
    completion_tokens: int = 0
    unvouched: int = 0  # shards that no manifest had recorded: their footers could not be compared
    missing: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems and not self.missing

    def add(self, name: str, problem: str) -> None:
        self.problems.setdefault(name, []).append(problem)


def verify(cache: Location, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Look at everything in a cache. Shards in which nothing is wrong are recorded as verified in manifest.json."""
    plan = manifest.read_plan(cache)
    report = Report(cache)
    if format.fingerprint(plan.get("fields", {})) != plan["fingerprint"]:
        report.add("plan.json", "its fields do not hash to its fingerprint: it was changed by hand, or is damaged")
    _check_vocabulary(cache, plan, report)
    known = manifest.recorded(cache)
    if not known and (cache / "manifest.json").exists():
        report.add("manifest.json", "it cannot be read")
    planned = [shard["name"] for shard in plan["shards"]]
    there = {f"data/{name}" for name in storage.files(cache / "data")}
    for name in sorted({f"data/{p.name}" for p in (cache / "data").glob("[!.]*")} - set(planned)):
        report.add(name, "the plan knows no such file")
    for done, name in enumerate(planned):
        progress(done, len(planned))
        if name not in there:
            report.missing.append(name)
            continue
        report.shards += 1
        report.unvouched += name not in known
        for problem in _shard_problems(cache / name, name, plan, known.get(name), report):
            report.add(name, problem)
    progress(len(planned), len(planned))
    _check_duplicates(cache, [name for name in planned if name in there and name not in report.problems], report)
    if not report.problems:
        with contextlib.suppress(
            OSError, storage.WriteError
        ):  # a cache that cannot be written to can still be verified
            manifest.write(cache, verified=set(planned) - set(report.missing))
    return report


def repair(report: Report) -> None:
    """Move the files that have problems to CACHE/set-aside and rebuild the manifest. Nothing is deleted."""
    cache = report.cache
    if "plan.json" in report.problems:
        raise KDError(
            f"{cache}/plan.json is damaged: without it no shard can be told from another; make the cache anew", 3
        )
    with lock.held(cache):
        for name in report.problems:
            if name == "manifest.json":
                (cache / name).unlink()
                continue
            target = cache / "set-aside" / Path(name).name
            while target.exists():
                target = target.with_name(target.name + ".again")
            target.parent.mkdir(exist_ok=True)
            (cache / name).rename(target)  # type: ignore[arg-type]
            report.set_aside.append(name)
        manifest.forget(cache, report.problems.keys())
        manifest.write(cache)


def _check_vocabulary(cache: Location, plan: dict[str, Any], report: Report) -> None:
    try:
        table = pq.read_table(storage.whole(cache / "vocab.parquet"), page_checksum_verification=True)
        ids = table["token_id"].to_numpy()
    except (OSError, pa.ArrowException, KeyError) as error:
        if (cache / "vocab.parquet").exists():
            report.add("vocab.parquet", f"it cannot be read: {first_line(error)}")
        else:
            report.missing.append("vocab.parquet")
        return
    if not np.array_equal(ids, np.arange(plan["vocab_size"])):
        report.add("vocab.parquet", f"expected the token ids 0 .. {plan['vocab_size'] - 1}, one row each")


def _check_duplicates(cache: Location, shards: list[str], report: Report) -> None:
    connection = duckdb.connect()
    folder = storage.duckdb_folder(connection, cache)
    files = {f"{folder}/{name}": name for name in shards}
    if not files:
        return
    try:
        found = connection.execute(
            "SELECT sample_id, count(*), max(filename) FROM read_parquet(?, filename = true) GROUP BY sample_id "
            "HAVING count(*) > 1 ORDER BY sample_id",
            [list(files)],
        ).fetchall()
    except duckdb.Error as error:
        storage.raise_remote_error(error)
        report.add("data", f"DuckDB cannot read the shards together: {first_line(error)}")
        return
    for sample_id, count, file in found:
        report.add(files[file], f"sample_id {sample_id!r} stands {count} times in the cache")


def _shard_problems(
    path: Location, name: str, plan: dict[str, Any], known: dict[str, Any] | None, report: Report
) -> Iterator[str]:
    """Everything that is wrong with one shard, in words."""
    rows = tokens = 0
    try:
        source = storage.whole(path)
        if known is not None and storage.sha256(source) != known["sha256"]:
            yield "its bytes are not those that manifest.json recorded (sha256)"
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            metadata = json.loads((schema.metadata or {})[b"kdcache"])
            if metadata["fingerprint"] != plan["fingerprint"]:
                yield f"it belongs to another cache (fingerprint {metadata['fingerprint']})"
            wrong = [
                f"{f.name} is {schema.field(f.name).type if f.name in schema.names else 'missing'}, expected {f.type}"
                for f in format.SCHEMA
                if f.name not in schema.names or not schema.field(f.name).type.equals(f.type)
            ]
            if wrong:
                yield "its columns are not the format's: " + "; ".join(wrong)
                return
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=format.SCHEMA.names)
                rows, tokens = rows + len(table), tokens + sum(table["completion_tokens"].to_pylist())
                for problem in _row_problems(table, plan, metadata, format.split_of_shard(name)):
                    yield f"row group {group}: {problem}"
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        yield f"it cannot be read: {first_line(error)}"
        return
    report.rows, report.completion_tokens = report.rows + rows, report.completion_tokens + tokens
    if known is not None and (known.get("rows"), known.get("completion_tokens")) != (rows, tokens):
        yield (
            f"manifest.json says {known.get('rows')} rows and {known.get('completion_tokens')} tokens, "
            f"the shard has {rows} and {tokens}"
        )


def _row_problems(table: pa.Table, plan: dict[str, Any], metadata: dict[str, Any], split: str) -> Iterator[str]:
    """What the numbers of one row group do not fulfil."""
    column = {name: table[name].combine_chunks() for name in table.column_names}
    if any(value != split for value in column["split"].to_pylist()):
        yield f"a row whose split is not {split}"
    lengths = {"prompt_ids": column["prompt_tokens"].to_numpy()}
    per_token = ("completion_ids", "token_logprobs", "token_ranks", "tail_logprobs", "entropies")
    lengths |= {
        name: column["completion_tokens"].to_numpy() for name in (*per_token, "candidate_ids", "candidate_logprobs")
    }
    for name, wanted in lengths.items():
        if column[name].null_count or not np.array_equal(np.diff(column[name].offsets.to_numpy()), wanted):
            yield f"{name} is not as long as its row says"
            return
    ids, logprobs = column["candidate_ids"].flatten(), column["candidate_logprobs"].flatten()
    counts = np.diff(ids.offsets.to_numpy())  # [T]
    if not np.array_equal(counts, np.diff(logprobs.offsets.to_numpy())):
        yield "candidate_ids and candidate_logprobs are not equally long"
        return
    values = {name: column[name].flatten().to_numpy(zero_copy_only=False) for name in ("prompt_ids", *per_token)}
    values["candidate_ids"] = ids.flatten().to_numpy(zero_copy_only=False)
    values["candidate_logprobs"] = logprobs.flatten().to_numpy(zero_copy_only=False)

    for name in ("prompt_ids", "completion_ids", "candidate_ids"):
        outside = (values[name] < 0) | (values[name] >= plan["vocab_size"])
        if outside.any():
            yield f"{name} has {outside.sum()} ids outside the vocabulary of {plan['vocab_size']}"
            return
    if (counts < 1).any():
        yield f"{(counts < 1).sum()} positions without a candidate"
        return
    for name in ("token_logprobs", "candidate_logprobs", "entropies"):
        if not np.isfinite(values[name]).all():
            yield f"{name} has values that are not finite"
    for name in ("token_logprobs", "candidate_logprobs", "tail_logprobs"):
        if not (values[name] <= 1e-3).all():  # rounding may lift a certain token's a little
            yield f"{name} has values that are no log-probabilities"
    if (values["token_ranks"] < 1).any():
        yield "token_ranks has ranks below 1"
    if (values["entropies"] < 0).any():
        yield "entropies has negative values"
    if not len(counts):
        return

    starts = np.cumsum(counts) - counts
    first = np.zeros(len(values["candidate_ids"]), bool)
    first[starts] = True
    rising = (np.diff(values["candidate_logprobs"]) > 0) & ~first[1:]
    if rising.any():
        yield f"{rising.sum()} candidates are not sorted, best first"
    keys = np.repeat(np.arange(len(counts)), counts) * plan["vocab_size"] + values["candidate_ids"]
    twice = len(keys) - len(np.unique(keys))
    if twice:
        yield f"{twice} candidates stand twice at their position"
    policy = sparsify.parse(metadata["sparsify"])
    tolerance = MASS_TOLERANCE[metadata["precision"]] + policy.mass_error
    mass = np.add.reduceat(np.exp(values["candidate_logprobs"].astype(np.float64)), starts)
    wrong = np.abs(mass + np.exp(values["tail_logprobs"].astype(np.float64)) - 1) > tolerance
    if wrong.any():
        yield f"{wrong.sum()} positions whose candidates and tail do not sum to 1 within {tolerance:g}"
