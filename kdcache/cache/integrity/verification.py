"""``kd cache verify``: read everything in a cache anew, say what is wrong with which file, and set bad files aside.

    kd cache verify data/cache --repair

Invariant: files that can prove themselves are checked first, so that no shard is blamed for an error in another file::

    plan.json      --damaged--> nothing can be said of any shard
    manifest.json  --damaged--> the shards are checked without it
    vocab.parquet, rewards.parquet, files in data/ that the plan does not know
    each shard     (shard_checks.py)
    rejected.jsonl, once no other file has a problem
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import manifest, shard
from kdcache.cache.documents import DamagedDocument, entries_by_shard, is_protected, read_manifest, read_plan
from kdcache.cache.integrity.old_policy import OldPolicy, is_old
from kdcache.cache.integrity.shard_checks import examine
from kdcache.cache.layout import (
    MANIFEST_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    REWARDS_FILE,
    SET_ASIDE_FOLDER,
    VOCAB_FILE,
    stored_files,
)
from kdcache.errors import first_line
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.storage import Location, digests, lock, seal

#: Files that only repeat what the shards say: they are repaired by rebuilding them, not by setting them aside.
REBUILT_FILES = (MANIFEST_FILE, REJECTED_FILE)


@dataclass
class Verification:
    """What ``verify`` saw in a cache; ``problems`` holds sentences by the name of the file that has them."""

    cache: Location
    shards: int = 0  # examined
    rows: int = 0
    completion_tokens: int = 0
    unvouched: int = 0  # shards that no manifest has recorded
    unprotected: list[str] = field(default_factory=list)  # files from before there were checksums and seals
    missing: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)  # files that ``repair`` has moved
    notes: list[str] = field(default_factory=list)  # what is no fault of any file

    @property
    def sound(self) -> bool:
        return not self.problems and not self.missing

    def add(self, name: str, problem: str) -> None:
        self.problems.setdefault(name, []).append(problem)


def verify(cache: Location, show: ShowProgress = silent) -> Verification:
    """Check every byte and every number of a cache. KDError if it cannot be listed, else all is in the result.

    If nothing is wrong, the manifest is rebuilt, and each shard is recorded in it as verified.
    """
    verification = Verification(cache)
    plan, old_manifest = _check_documents(cache, verification)
    if plan is None or not _check_vocabulary(cache, plan, verification):
        return verification
    _check_rewards(cache, plan, verification)
    files = stored_files(cache)
    planned = [entry["name"] for entry in plan["shards"]]
    for name in sorted(files.keys() - set(planned)):
        verification.add(name, "the plan does not name this file")
    rejected = _check_shards(cache, plan, old_manifest, files, verification, show)
    if not verification.problems:
        _check_rejected(cache, rejected, verification)
    if not verification.problems:
        # A read-only cache can be verified too.
        with contextlib.suppress(OSError, storage.WriteError):
            manifest.rebuild(cache, verified=set(planned) - set(verification.missing))
    return verification


def repair(verification: Verification) -> None:
    """Move the files that have problems to CACHE/set-aside, and rebuild manifest.json and rejected.jsonl.

    Only single files are moved, each for its own problems; nothing is deleted that cannot be rebuilt. Without a plan
    nothing can be rebuilt: the command that made the cache writes the plan again.
    """
    cache = verification.cache
    with lock.held(cache):
        for name in verification.problems:
            if not (cache / name).is_file():
                continue
            if name in REBUILT_FILES:
                (cache / name).unlink()
                continue
            target = cache / SET_ASIDE_FOLDER / Path(name).name
            while target.exists():
                target = target.with_name(target.name + ".again")
            target.parent.mkdir(exist_ok=True)
            (cache / name).rename(target)  # type: ignore[arg-type]
            verification.set_aside.append(name)
        if PLAN_FILE not in verification.problems:
            manifest.remove_entries(cache, {*verification.problems, *verification.missing})
            manifest.rebuild(cache)


# --- plan.json and manifest.json --------------------------------------------------------------------------------------


def _check_documents(
    cache: Location, verification: Verification
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Read plan and manifest; None for one that is missing or has a problem, which is then in the verification."""
    plan = old_manifest = None
    try:
        plan = read_plan(cache)
    except DamagedDocument as error:
        verification.add(PLAN_FILE, error.problem)
    try:
        old_manifest = read_manifest(cache)
    except DamagedDocument as error:
        verification.add(MANIFEST_FILE, error.problem)
    if plan and old_manifest and plan["fingerprint"] != old_manifest["fingerprint"]:
        verification.add(MANIFEST_FILE, "it belongs to another cache (its fingerprint is different)")
        old_manifest = None
    for name, content in ((PLAN_FILE, plan), (MANIFEST_FILE, old_manifest)):
        if content is not None and not is_protected(content):
            verification.unprotected.append(name)
    return plan, old_manifest


# --- vocab.parquet and rewards.parquet --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SmallTable:
    """A small Parquet file as it was read: its table, or the problem that it has."""

    table: pa.Table | None
    problem: str | None
    sealed: bool


def _read_small_table(path: Location, needs_seal: bool) -> _SmallTable:
    try:
        source = storage.fetched(path)
        digest = seal.digest(source)
        if digest.sealed is False:
            return _SmallTable(None, "its bytes are not those that were written", sealed=True)
        table = pq.read_table(source, page_checksum_verification=True)
    except shard.UNREADABLE as error:
        return _SmallTable(None, f"it cannot be read: {first_line(error)}", sealed=False)
    if digest.sealed is None and needs_seal:
        return _SmallTable(None, "it carries no seal: it is not what was written", sealed=False)
    return _SmallTable(table, None, sealed=digest.sealed is True)


def _check_vocabulary(cache: Location, plan: Mapping[str, Any], verification: Verification) -> bool:
    """Check vocab.parquet. Return False if it proves the plan wrong: then nothing can be said of a shard."""
    if not (cache / VOCAB_FILE).exists():
        verification.missing.append(VOCAB_FILE)
        return True
    vocabulary = _read_small_table(cache / VOCAB_FILE, is_protected(plan))
    problem = vocabulary.problem
    if vocabulary.table is not None:
        columns = vocabulary.table.column_names
        ids = vocabulary.table["token_id"].to_numpy() if "token_id" in columns else np.empty(0)
        if not np.array_equal(ids, np.arange(len(ids))):
            problem = "expected the token ids from 0 on, one row each"
        elif len(ids) != plan["vocab_size"]:
            problem = f"expected the token ids 0 .. {plan['vocab_size'] - 1}, found {len(ids)}"
            if not is_protected(plan):  # the pages of the vocabulary have checksums, an early plan has none
                verification.add(PLAN_FILE, f"its vocabulary has {plan['vocab_size']} tokens, {VOCAB_FILE} {len(ids)}")
                return False
    _add_table(VOCAB_FILE, problem, vocabulary.sealed, verification)
    return True


def _check_rewards(cache: Location, plan: Mapping[str, Any], verification: Verification) -> None:
    if not (cache / REWARDS_FILE).exists():
        return
    rewards = _read_small_table(cache / REWARDS_FILE, is_protected(plan))
    problem = rewards.problem
    if rewards.table is not None and not {"sample_id", "reward", "reason"} <= set(rewards.table.column_names):
        problem = f"its columns are {', '.join(rewards.table.column_names)}, expected sample_id, reward, reason"
    _add_table(REWARDS_FILE, problem, rewards.sealed, verification)


def _add_table(name: str, problem: str | None, sealed: bool, verification: Verification) -> None:
    if problem is not None:
        verification.add(name, problem)
    elif not sealed:
        verification.unprotected.append(name)


# --- the shards -------------------------------------------------------------------------------------------------------


def _check_shards(
    cache: Location,
    plan: Mapping[str, Any],
    old_manifest: Mapping[str, Any] | None,
    files: Mapping[str, Location],
    verification: Verification,
    show: ShowProgress,
) -> list[dict[str, Any]]:
    """Examine each planned shard, and return the rejected rows of all."""
    entries = entries_by_shard(old_manifest)
    old_policy = OldPolicy() if is_old(plan) else None
    rejected: list[dict[str, Any]] = []
    records: dict[str, digests.Record] = {}
    sample_ids: dict[str, np.ndarray] = {}  # by shard, hashed
    for number, name in enumerate(entry["name"] for entry in plan["shards"]):
        show(Progress(number, len(plan["shards"]), "shards"))
        if name not in files:
            verification.missing.append(name)
            continue
        examination = examine(files[name], name, plan, entries.get(name), old_policy)
        problems = examination.problems
        if problems and examination.only_the_manifest_differs and not is_protected(old_manifest or {}):
            # An early manifest can be damaged without a sign, and the shard proves itself sound.
            verification.add(MANIFEST_FILE, f"its sha256 of {name} is wrong, because the shard is sound")
            problems = []
        for problem in problems:
            verification.add(name, problem)
        if not problems:
            sample_ids[name] = examination.sample_ids
            if examination.record is not None:
                records[name] = examination.record
        if examination.sealed is None and not is_protected(plan):
            verification.unprotected.append(name)
        verification.shards += 1
        verification.unvouched += name not in entries
        verification.rows += examination.rows
        verification.completion_tokens += examination.tokens
        rejected += examination.rejected
    show(Progress(len(plan["shards"]), len(plan["shards"]), "shards"))
    for name, sample_id, count in _duplicates(files, sample_ids):
        verification.add(name, f"sample_id {sample_id!r} occurs {count} times in the cache")
    if old_policy is not None:
        verification.notes += old_policy.sentences()
    if isinstance(cache, Path):
        digests.replace(cache, records)
    return rejected


def _duplicates(files: Mapping[str, Location], hashes: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str, int]]:
    """Yield (shard, sample id, how often) of each id that stands more than once; the shard is the last that has it.

    ``hashes`` holds a 64-bit hash of each sample id, by shard: only shards in which a hash repeats are read again.
    """
    if not hashes:
        return
    values, counts = np.unique(np.concatenate(list(hashes.values())), return_counts=True)
    repeated = values[counts > 1]
    shards_of_id: dict[str, list[str]] = {}
    for name, shard_hashes in hashes.items():
        if len(repeated) and np.isin(shard_hashes, repeated).any():  # ids may differ where their hashes do not
            with shard.opened(files[name]) as file:
                for sample_id in file.read(["sample_id"])["sample_id"].to_pylist():
                    shards_of_id.setdefault(str(sample_id), []).append(name)
    for sample_id, names in sorted(shards_of_id.items()):
        if len(names) > 1:
            yield max(names), sample_id, len(names)


def _check_rejected(cache: Location, rejected: list[dict[str, Any]], verification: Verification) -> None:
    """rejected.jsonl must repeat what the shards say; where shards are missing, that cannot be told."""
    path = cache / REJECTED_FILE
    if verification.missing or not path.is_file():
        return
    if path.read_bytes() != manifest.rejected_text(rejected).encode():
        verification.add(REJECTED_FILE, "it is not what the shards say")
