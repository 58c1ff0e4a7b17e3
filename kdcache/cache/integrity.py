"""Is this cache whole and true? What every reader checks before it reads, and what ``kd cache verify`` looks at.

    kd cache verify data/cache --repair

A reader calls ``readable_shards`` (and ``check_table`` for vocab.parquet and rewards.parquet): plan and manifest have
their checksums, and each shard is the one that the manifest recorded, or carries a seal that holds. All bytes are read
for that once, and remembered (digests.py). ``verify`` reads all of them anew, and looks at every number besides (sorted,
inside the vocabulary, candidates + tail = 1, ...), with one row group in memory at a time.

Invariant: files that vouch for themselves are checked first, and a shard is never blamed for what another file says wrongly.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import manifest, sparsify
from kdcache.cache.format import SCHEMA
from kdcache.cache.layout import REWARDS_FILE, split_of_shard
from kdcache.cache.manifest import WAY_OUT
from kdcache.cache.old_policy import OldPolicy, is_old
from kdcache.errors import KDError, first_line
from kdcache.printable import printable
from kdcache.storage import Location, digests, lock, seal

#: How far candidates + tail may be from 1: what rounding does to a position's total (docs/format.md).
MASS_TOLERANCE = {"q8": 0.02, "f32": 1e-5}

#: What reading a damaged Parquet file may raise.
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError)

VOCAB_FILE = "vocab.parquet"
REWARDS_WAY_OUT = "run: kd cache verify --repair on the cache, then kd verify-answers"


# --- before a file is read --------------------------------------------------------------------------------------------


def readable_shards(
    cache: Location, split: str | None = None, progress: digests.Progress = lambda done, total: None
) -> list[str]:
    """The shards that are there (of one split), by name and in the order of their names, each proved to be what was written.

    The plan says which there are: a file that it does not know is not among them. KDError (3) for one that is damaged or
    another one, or that the manifest has and the folder has not; what was not captured yet is just not there. Of a remote
    cache only the sizes are compared: its readers check what they fetch.
    """
    plan = manifest.read_plan(cache)
    found = manifest.read_manifest(cache)
    if found is not None and found["fingerprint"] != plan["fingerprint"]:
        raise manifest.Damaged(cache, "manifest.json", "it is that of another cache (its fingerprint is another one)")
    recorded = {shard["name"]: shard for shard in found["shards"]} if found else {}
    there = storage.files(cache / "data")
    planned = [s for s in plan["shards"] if split is None or split_of_shard(s["name"]) == split]
    present = sorted(s["name"] for s in planned if s["name"].removeprefix("data/") in there)
    gone = [s["name"] for s in planned if s["name"] in recorded and s["name"].removeprefix("data/") not in there]
    if gone:
        strange = unplanned_files(plan, there)
        seen = f" (data/ holds {strange[0]}, which the plan does not know)" if strange else ""
        raise KDError(f"{cache}/{gone[0]} is gone, and manifest.json records it{seen}; {WAY_OUT}", 3)
    if not isinstance(cache, Path):
        for name in present:
            size = there[name.removeprefix("data/")].size
            if name in recorded and size != recorded[name]["bytes"]:
                what = f"{size} bytes, {recorded[name]['bytes']} were written"
                raise KDError(f"{cache}/{name} is not what was written ({what}); {WAY_OUT}", 3)
        return present
    try:
        made = digests.of_files(cache, present, progress=progress)
    except OSError as error:
        raise KDError(f"{cache}: its shards could not be read: {first_line(error)}; {WAY_OUT}", 3) from None
    for name in present:
        problem = _problem(cache, name, made[name], recorded.get(name), plan)
        if problem is not None:
            raise KDError(f"{cache}/{name} {problem}; {WAY_OUT}", 3)
    return present


def unplanned_files(plan: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What is in data/ and in no plan, printable."""
    planned = {shard["name"] for shard in plan["shards"]}
    return [printable(f"data/{name}") for name in sorted(there) if f"data/{name}" not in planned]


def check_table(cache: Location, name: str) -> None:
    """KDError (3) unless vocab.parquet or rewards.parquet is as it was written. Nothing is read of a remote one."""
    if not isinstance(cache, Path):
        return
    way_out = WAY_OUT if name == VOCAB_FILE else REWARDS_WAY_OUT
    try:
        problem = _own_problem(
            cache / name,
            digests.of_files(cache, [name])[name],
            needs_seal=manifest.is_protected(manifest.read_plan(cache)),
        )
    except OSError as error:
        problem = f"cannot be read ({error.strerror or first_line(error)})"
    if problem is not None:
        raise KDError(f"{cache}/{name} {problem}; {way_out}", 3)


def _problem(
    cache: Path, name: str, digest: seal.Digest, recorded: Mapping[str, Any] | None, plan: Mapping[str, Any]
) -> str | None:
    """Why a shard is not the one that was written, or None."""
    if recorded is not None and digest.sha256 == recorded["sha256"]:
        return None
    path = cache / name
    problem = _own_problem(path, digest, needs_seal=manifest.is_protected(plan))
    problem = problem or _wrong_place(path, name, tuple(digests.identity(path)), plan["fingerprint"])
    if problem is None and recorded is not None:
        problem = "is not what was written (manifest.json has another sha256)"
    return problem


def _own_problem(path: Path, digest: seal.Digest, needs_seal: bool) -> str | None:
    """What a Parquet file's own seal, or its pages where it is from before there were seals, show to be wrong."""
    if digest.sealed:
        return None
    if digest.sealed is False:
        return "is damaged (its bytes are not those that were written)"
    if needs_seal:
        return "is not what was written (it carries no seal)"
    return _pages_problem(path, tuple(digests.identity(path)))


@functools.lru_cache(4096)
def _pages_problem(path: Path, identity: tuple[int, ...]) -> str | None:
    """The pages' own checksums, each looked at once for every state of the file."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                file.read_row_group(group)
    except UNREADABLE as error:
        return f"is damaged ({first_line(error)})"
    return None


@functools.lru_cache(4096)
def _wrong_place(path: Path, name: str, identity: tuple[int, ...], fingerprint: str) -> str | None:
    """Whether a shard says itself that it belongs to another cache, or under another name."""
    try:
        with pq.ParquetFile(path) as file:
            metadata = shard_metadata(file)
    except UNREADABLE as error:
        return f"is damaged ({first_line(error)})"
    if metadata.get("fingerprint") != fingerprint:
        return f"belongs to another cache (fingerprint {metadata.get('fingerprint')}, expected {fingerprint})"
    if metadata.get("name", name) != name:
        return f"is the shard {metadata['name']}, under another name"
    return None


def shard_metadata(file: pq.ParquetFile) -> dict[str, Any]:
    """What a shard says of itself; ValueError if it says nothing."""
    metadata = json.loads((file.schema_arrow.metadata or {}).get(b"kdcache", b"{}"))
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is no JSON object")
    return metadata


# --- verify -----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was found: ``problems`` by the name of the file that has them, in words."""

    cache: Location
    shards: int = 0  # looked at
    rows: int = 0
    completion_tokens: int = 0
    unvouched: int = 0  # shards that no manifest had recorded
    unprotected: list[str] = field(default_factory=list)  # files from before there were checksums and seals
    missing: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on what is no fault of any file

    @property
    def sound(self) -> bool:
        return not self.problems and not self.missing

    def add(self, name: str, problem: str) -> None:
        self.problems.setdefault(name, []).append(problem)


def verify(cache: Location, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Look at everything in a cache. Shards in which nothing is wrong are recorded as verified in manifest.json.

    Plan, manifest and vocabulary come first: where the plan is damaged, nothing can be said of a shard.
    """
    report = Report(cache)
    plan, found = _read_both(cache, report)
    if plan is None:
        return report
    needs_seal = manifest.is_protected(plan)
    recorded = {shard["name"]: shard for shard in found["shards"]} if found else {}
    if not _check_vocabulary(cache, plan, report):
        return report
    _check_rewards(cache, needs_seal, report)
    planned = [shard["name"] for shard in plan["shards"]]
    there = storage.files(cache / "data")
    for name in sorted(there):
        if f"data/{name}" not in planned:
            report.add(f"data/{name}", "the plan knows no such file")
    ids = _SampleIds()
    old = OldPolicy() if is_old(plan) else None
    rejected: list[dict[str, Any]] = []
    records: dict[str, digests.Record] = {}
    for done, name in enumerate(planned):
        progress(done, len(planned))
        if name.removeprefix("data/") not in there:
            report.missing.append(name)
            continue
        report.shards += 1
        report.unvouched += name not in recorded
        look = _Shard(there[name.removeprefix("data/")], name, plan, recorded.get(name), needs_seal, old)
        problems = list(look.problems())
        if problems and look.manifest_is_wrong and not manifest.is_protected(found or {}):
            report.add("manifest.json", f"its sha256 of {name} is another one, and the shard is sound")
            problems = []
        for problem in problems:
            report.add(name, problem)
        if not problems:
            ids.add(name, look.sample_ids)
            if look.record is not None:
                records[name] = look.record
        if look.sealed is None and not needs_seal:
            report.unprotected.append(name)
        report.rows, report.completion_tokens = report.rows + look.rows, report.completion_tokens + look.tokens
        rejected += look.rejected
    progress(len(planned), len(planned))
    report.notes = old.sentences() if old is not None else []
    for name, sample_id, count in ids.duplicates(cache):
        report.add(name, f"sample_id {sample_id!r} stands {count} times in the cache")
    if isinstance(cache, Path):
        digests.replace(cache, records)
    if not report.problems:
        _check_rejected(cache, rejected, complete=not report.missing, report=report)
    if not report.problems:
        with contextlib.suppress(
            OSError, storage.WriteError
        ):  # a cache that cannot be written to can still be verified
            manifest.write(cache, verified=set(planned) - set(report.missing))
    return report


def repair(report: Report) -> None:
    """Move the files that have problems to CACHE/set-aside, and rebuild what is made of the shards. Nothing is deleted.

    Only single files are moved, each because of what was found in it. Without a plan nothing can be rebuilt:
    the command that made the cache writes it again.
    """
    cache = report.cache
    with lock.held(cache):
        for name in report.problems:
            if not (cache / name).is_file():
                continue
            if name in _REBUILT:
                (cache / name).unlink()
                continue
            target = cache / "set-aside" / Path(name).name
            while target.exists():
                target = target.with_name(target.name + ".again")
            target.parent.mkdir(exist_ok=True)
            (cache / name).rename(target)  # type: ignore[arg-type]
            report.set_aside.append(name)
        if "plan.json" not in report.problems:
            manifest.forget(cache, {*report.problems, *report.missing})
            manifest.write(cache)


#: What the shards say, summed: made again of them.
_REBUILT = ("manifest.json", "rejected.jsonl")


def _read_both(cache: Location, report: Report) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Plan and manifest; None for one that is not there or has a problem, which is then in the report."""
    plan = found = None
    try:
        plan = manifest.read_plan(cache)
    except manifest.Damaged as error:
        report.add("plan.json", error.problem)
    try:
        found = manifest.read_manifest(cache)
    except manifest.Damaged as error:
        report.add("manifest.json", error.problem)
    if plan and found and plan["fingerprint"] != found["fingerprint"]:
        report.add("manifest.json", "it is that of another cache (its fingerprint is another one)")
        found = None
    for name, content in (("plan.json", plan), ("manifest.json", found)):
        if content is not None and not manifest.is_protected(content):
            report.unprotected.append(name)
    return plan, found


def _table_problem(path: Location, needs_seal: bool) -> tuple[pa.Table | None, str | None, bool]:
    """A small Parquet file, what is wrong with it, and whether it carries a seal."""
    try:
        source = storage.fetched(path)
        digest = seal.digest(source)
        if digest.sealed is False:
            return None, "its bytes are not those that were written", True
        table = pq.read_table(source, page_checksum_verification=True)
    except UNREADABLE as error:
        return None, f"it cannot be read: {first_line(error)}", False
    if digest.sealed is None and needs_seal:
        return None, "it carries no seal: it is not what was written", False
    return table, None, digest.sealed is True


def _check_vocabulary(cache: Location, plan: dict[str, Any], report: Report) -> bool:
    """False if the plan turns out to be wrong: its vocabulary is not that of a file that is sound."""
    if not (cache / VOCAB_FILE).exists():
        report.missing.append(VOCAB_FILE)
        return True
    table, problem, sealed = _table_problem(cache / VOCAB_FILE, manifest.is_protected(plan))
    if table is not None:
        ids = table["token_id"].to_numpy() if "token_id" in table.column_names else np.empty(0)
        if not np.array_equal(ids, np.arange(len(ids))):
            problem = "expected the token ids from 0 on, one row each"
        elif len(ids) != plan["vocab_size"]:
            problem = f"expected the token ids 0 .. {plan['vocab_size'] - 1}, found {len(ids)}"
            if not manifest.is_protected(plan):  # the file's pages have checksums, the plan has none
                report.add("plan.json", f"its vocabulary has {plan['vocab_size']} tokens, vocab.parquet {len(ids)}")
                return False
    if problem is not None:
        report.add(VOCAB_FILE, problem)
    elif not sealed:
        report.unprotected.append(VOCAB_FILE)
    return True


def _check_rewards(cache: Location, needs_seal: bool, report: Report) -> None:
    if not (cache / REWARDS_FILE).exists():
        return
    table, problem, sealed = _table_problem(cache / REWARDS_FILE, needs_seal)
    if table is not None and not {"sample_id", "reward", "reason"} <= set(table.column_names):
        problem = f"its columns are {', '.join(table.column_names)}, expected sample_id, reward, reason"
    if problem is not None:
        report.add(REWARDS_FILE, problem)
    elif not sealed:
        report.unprotected.append(REWARDS_FILE)


def _check_rejected(cache: Location, rejected: list[dict[str, Any]], complete: bool, report: Report) -> None:
    """rejected.jsonl must say what the shards say; not where shards are missing, or there is none yet."""
    path = cache / "rejected.jsonl"
    if complete and path.is_file() and path.read_bytes() != manifest.rejected_text(rejected).encode():
        report.add("rejected.jsonl", "it is not what the shards say")


class _SampleIds:
    """Which samples were met: a 64-bit hash of each id, by shard."""

    def __init__(self) -> None:
        self._hashes: dict[str, np.ndarray] = {}  # int64

    def add(self, name: str, hashes: np.ndarray) -> None:
        self._hashes[name] = hashes

    def duplicates(self, cache: Location) -> Iterator[tuple[str, str, int]]:
        """(shard, id, how often) of each id that stands more than once; the shard is the last that has it."""
        if not self._hashes:
            return
        values, counts = np.unique(np.concatenate(list(self._hashes.values())), return_counts=True)
        twice = values[counts > 1]
        where: dict[str, list[str]] = {}
        for name, hashes in self._hashes.items():
            if len(twice) and np.isin(hashes, twice).any():  # equal hashes are no equal ids yet
                with pq.ParquetFile(storage.opened(cache / name), page_checksum_verification=True) as file:
                    for sample_id in file.read(columns=["sample_id"])["sample_id"].to_pylist():
                        where.setdefault(str(sample_id), []).append(name)
        for sample_id, names in sorted(where.items()):
            if len(names) > 1:
                yield max(names), sample_id, len(names)


class _Shard:
    """One shard, looked at whole."""

    def __init__(
        self,
        path: Location,
        name: str,
        plan: dict[str, Any],
        recorded: dict[str, Any] | None,
        needs_seal: bool,
        old: OldPolicy | None = None,  # is shown its rows, where the cache is of the old policy
    ):
        self.old = old
        self.path, self.name, self.plan, self.recorded, self.needs_seal = path, name, plan, recorded, needs_seal
        self.rows = self.tokens = 0
        self.rejected: list[dict[str, Any]] = []
        self.sample_ids = np.empty(0, np.int64)  # hashes
        self.sealed: bool | None = None
        self.record: digests.Record | None = None  # of a folder's file
        self.manifest_is_wrong = False  # another sha256, and nothing else is wrong

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with it, in words."""
        try:
            state = digests.identity(self.path) if isinstance(self.path, Path) else None
            source = storage.fetched(self.path)
            digest = seal.digest(source)
        except OSError as error:
            yield f"it cannot be read: {first_line(error)}"
            return
        self.sealed = digest.sealed
        self.record = digests.record(state, digest) if state else None
        if digest.sealed is False:
            yield "it is damaged: its bytes are not those that were written (sha256)"
            return
        own = list(self._own_problems(source))
        if self.needs_seal and digest.sealed is None:
            own.append("it carries no seal: it is not what was written")
        if self.recorded is not None:
            rows, tokens = self.recorded["rows"], self.recorded["completion_tokens"]
            if digest.sha256 != self.recorded["sha256"]:
                yield "its bytes are not those that manifest.json recorded (sha256)"
            if not own and (rows, tokens) != (self.rows, self.tokens):
                yield (
                    f"manifest.json says {rows} rows and {tokens} tokens, the shard has {self.rows} and {self.tokens}"
                )
            elif not own:
                self.manifest_is_wrong = self.recorded["bytes"] == _size(source)
        yield from own

    def _own_problems(self, source: Any) -> Iterator[str]:
        """What its pages, its metadata and its numbers show to be wrong."""
        plan = self.plan
        try:
            with pq.ParquetFile(source, page_checksum_verification=True) as file:
                schema = file.schema_arrow
                metadata = shard_metadata(file)
                if metadata["fingerprint"] != plan["fingerprint"]:
                    yield f"it belongs to another cache (fingerprint {metadata['fingerprint']})"
                if metadata.get("name", self.name) != self.name:
                    yield f"it is the shard {metadata['name']}, under another name"
                wrong = [
                    f"{f.name} is {schema.field(f.name).type if f.name in schema.names else 'missing'}, expected {f.type}"
                    for f in SCHEMA
                    if f.name not in schema.names or not schema.field(f.name).type.equals(f.type)
                ]
                if wrong:
                    yield "its columns are not the format's: " + "; ".join(wrong)
                    return
                ids: Counter[str] = Counter()
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=SCHEMA.names)
                    self.rows += len(table)
                    self.tokens += sum(table["completion_tokens"].to_pylist())
                    ids.update(map(str, table["sample_id"].to_pylist()))
                    found = list(_row_problems(table, plan, metadata, split_of_shard(self.name)))
                    yield from (f"row group {group}: {problem}" for problem in found)
                    if self.old is not None and not found:
                        self.old.add(table, plan["fields"].get("reasoning") is not None)
                self.rejected = metadata.get("rejected", [])
                for sample_id, count in ids.items():
                    if count > 1:
                        yield f"sample_id {sample_id!r} stands {count} times in it"
                self.sample_ids = np.fromiter(map(hash, ids), np.int64, len(ids))
        except UNREADABLE as error:
            yield f"it cannot be read: {first_line(error)}"


def _size(source: Any) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes


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
