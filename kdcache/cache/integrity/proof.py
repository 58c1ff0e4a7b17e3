"""What every reader checks before it reads a file of a cache: is this the file that was written?

A reader calls ``readable_shards``, and ``check_table`` for vocab.parquet and rewards.parquet. How a file proves it::

    plan.json, manifest.json    a checksum inside (documents.py), checked first
    a shard                     1. its sha256 is the one in manifest.json, or else
                                2. its own seal holds, and its metadata has the cache's fingerprint and its own name
    vocab, rewards              their own seal holds
    files from before seals     their pages' checksums hold

All bytes are read once for that, and the result is remembered (storage/digests.py). Of a remote cache only the sizes
are compared here: its readers check the pages that they fetch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdcache.cache import shard
from kdcache.cache.documents import DamagedDocument, entries_by_shard, is_protected, read_manifest, read_plan
from kdcache.cache.layout import MANIFEST_FILE, REWARDS_FILE, split_of_shard, stored_files
from kdcache.cache.shard import WAY_OUT
from kdcache.errors import KDError, first_line
from kdcache.printable import printable
from kdcache.progress import ShowProgress, silent
from kdcache.storage import Location, digests, seal

REWARDS_WAY_OUT = "run: kd cache verify --repair on the cache, then kd verify-answers"


def readable_shards(cache: Location, split: str | None = None, show: ShowProgress = silent) -> list[str]:
    """Return the names of the shards that are stored (of one split), in order, each proved to be what was written.

    Files that the plan does not name are ignored, and shards that are not captured yet are left out. KDError (3) for a
    shard that is damaged or not the one that was written, and for one that manifest.json records and the folder lacks.
    """
    plan = read_plan(cache)
    manifest = read_manifest(cache)
    if manifest is not None and manifest["fingerprint"] != plan["fingerprint"]:
        raise DamagedDocument(cache, MANIFEST_FILE, "it belongs to another cache (its fingerprint is different)")
    entries = entries_by_shard(manifest)
    files = stored_files(cache)
    planned = [entry["name"] for entry in plan["shards"] if split is None or split_of_shard(entry["name"]) == split]
    if lost := [name for name in planned if name in entries and name not in files]:
        unplanned = unplanned_files(plan, files)
        hint = f" (data/ holds {unplanned[0]}, which the plan does not know)" if unplanned else ""
        raise KDError(f"{cache}/{lost[0]} is gone, and manifest.json records it{hint}; {WAY_OUT}", 3)
    names = sorted(name for name in planned if name in files)
    if not isinstance(cache, Path):
        for name in names:
            size = files[name].stat().st_size  # known from the listing
            if name in entries and size != entries[name]["bytes"]:
                sizes = f"{size} bytes, {entries[name]['bytes']} were written"
                raise KDError(f"{cache}/{name} is not what was written ({sizes}); {WAY_OUT}", 3)
        return names
    try:
        shard_digests = digests.of_files(cache, names, show)
    except OSError as error:
        raise KDError(f"{cache}: its shards could not be read: {first_line(error)}; {WAY_OUT}", 3) from None
    for name in names:
        problem = _shard_problem(cache / name, name, shard_digests[name], entries.get(name), plan)
        if problem is not None:
            raise KDError(f"{cache}/{name} {problem}; {WAY_OUT}", 3)
    return names


def unplanned_files(plan: Mapping[str, Any], files: Iterable[str]) -> list[str]:
    """Return those of the files in data/ (by shard name) that the plan does not know, printable."""
    planned = {entry["name"] for entry in plan["shards"]}
    return [printable(name) for name in sorted(files) if name not in planned]


def check_table(cache: Location, name: str) -> None:
    """Raise KDError (3) unless vocab.parquet or rewards.parquet is as it was written. A remote one is not read."""
    if not isinstance(cache, Path):
        return
    way_out = REWARDS_WAY_OUT if name == REWARDS_FILE else WAY_OUT
    try:
        digest = digests.of_files(cache, [name])[name]
        problem = _seal_problem(cache / name, digest, needs_seal=is_protected(read_plan(cache)))
    except OSError as error:
        problem = f"cannot be read ({error.strerror or first_line(error)})"
    if problem is not None:
        raise KDError(f"{cache}/{name} {problem}; {way_out}", 3)


def _shard_problem(
    path: Path, name: str, digest: seal.Digest, entry: Mapping[str, Any] | None, plan: Mapping[str, Any]
) -> str | None:
    """Say why a shard is not the one that was written; None if it is."""
    if entry is not None and digest.sha256 == entry["sha256"]:
        return None
    problem = _seal_problem(path, digest, needs_seal=is_protected(plan))
    problem = problem or _place_problem(path, name, tuple(digests.identity(path)), plan["fingerprint"])
    if problem is None and entry is not None:
        problem = "is not what was written (manifest.json has another sha256)"
    return problem


def _seal_problem(path: Path, digest: seal.Digest, needs_seal: bool) -> str | None:
    """Say what a Parquet file's own seal shows to be wrong, or its pages where it is from before there were seals."""
    if digest.sealed:
        return None
    if digest.sealed is False:
        return "is damaged (its bytes are not those that were written)"
    if needs_seal:
        return "is not what was written (it carries no seal)"
    return _page_problem(path, tuple(digests.identity(path)))


@functools.lru_cache(4096)  # ``identity`` changes with the file: each version of it is read once
def _page_problem(path: Path, identity: tuple[int, ...]) -> str | None:
    """Say what the checksums of a file's pages show to be wrong."""
    try:
        with shard.opened(path) as file:
            for number in range(len(file.row_groups)):
                file.read_row_group(number, file.schema.names)
    except shard.DamagedShard as error:
        return f"is damaged ({error.problem})"
    return None


@functools.lru_cache(4096)
def _place_problem(path: Path, name: str, identity: tuple[int, ...], fingerprint: str) -> str | None:
    """Say why a shard, by its own metadata, belongs to another cache or under another name."""
    try:
        with shard.opened(path) as file:
            return shard.misplaced(file.metadata, name, fingerprint)
    except shard.DamagedShard as error:
        return f"is damaged ({error.problem})"
