"""manifest.json, rejected.jsonl and README.md of a cache, rebuilt from its shards.

The manifest holds what the shards' footers and metadata say, and their totals. The driver rebuilds it when a capture
ends, or the first ``kd cache info`` does; parallel workers never write it.

Invariant: the manifest can always be rebuilt from plan.json and the shards, so deleting it loses nothing but the proof
that a shard is still the one that was written.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kdcache import storage
from kdcache.cache import card, shard
from kdcache.cache.documents import (
    DamagedDocument,
    read_manifest,
    read_plan,
    recorded,
)
from kdcache.cache.format import CANDIDATE_LEAVES, FORMAT_VERSION, SPLITS
from kdcache.cache.layout import CARD_FILE, MANIFEST_FILE, REJECTED_FILE, split_of_shard, stored_files
from kdcache.cache.shard import WAY_OUT
from kdcache.errors import KDError
from kdcache.storage import Location, atomic, digests, seal

__all__ = [
    "rebuild",
    "recorded",
    "rejected_text",
    "remove_entries",
    "shards_metadata",
    "summary",
]


@dataclass(frozen=True)
class Rebuilt:
    """What the shards of a cache say, and the plan that says which shards there are."""

    plan: dict[str, Any]
    manifest: dict[str, Any]
    rejected: list[dict[str, Any]]  # the rows that could not be used, in the order of the shards


def rebuild(cache: Location, verified: Collection[str] = ()) -> dict[str, Any]:
    """Write manifest.json, rejected.jsonl and README.md from the shards, and return the manifest.

    The shards named in ``verified`` are recorded as verified at this moment. KDError (3) for a damaged shard.
    """
    rebuilt = _rebuilt(cache)
    moment = datetime.now().astimezone().isoformat(timespec="seconds")
    for entry in rebuilt.manifest["shards"]:
        if entry["name"] in verified:
            entry["verified"] = moment
    _save(cache, rebuilt)
    return rebuilt.manifest


def remove_entries(cache: Location, shards: Collection[str]) -> None:
    """Remove the entries of shards that will be written anew from manifest.json: they no longer hold."""
    try:
        manifest = read_manifest(cache)
    except DamagedDocument:
        return  # No reader believes a damaged manifest, and the next rebuild replaces it.
    if manifest and {entry["name"] for entry in manifest["shards"]} & set(shards):
        manifest["shards"] = [entry for entry in manifest["shards"] if entry["name"] not in shards]
        atomic.write_json(cache / MANIFEST_FILE, seal.with_checksum(manifest | {"complete": False}))


def shards_metadata(cache: Location) -> Iterator[dict[str, Any]]:
    """Return the metadata of each shard in the folder, planned or not. KDError (3) for one that cannot be read."""
    for path in stored_files(cache).values():
        with shard.opened(path) as file:
            yield file.metadata


def rejected_text(rejected: list[dict[str, Any]]) -> str:
    """Return the content of rejected.jsonl."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)


def _rebuilt(cache: Location) -> Rebuilt:
    plan = read_plan(cache)
    old_entries = recorded(cache)
    files = stored_files(cache)
    names = [planned["name"] for planned in plan["shards"] if planned["name"] in files]
    # Digests are remembered per file of a folder; a remote shard is read only where the old entry does not fit it.
    shard_digests = digests.of_files(cache, names) if isinstance(cache, Path) else {}
    entries, rejected = [], []
    for name in names:
        sha256 = _sha256(files[name], old_entries.get(name, {}), shard_digests.get(name))
        entry, rejected_rows = _entry(files[name], name, plan["fingerprint"], sha256)
        entries.append(entry | {"verified": old_entries.get(name, {}).get("verified")})
        rejected.extend(rejected_rows)
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": plan["fingerprint"],
        "complete": len(entries) == len(plan["shards"]),
        "shards_planned": len(plan["shards"]),
        "rows": sum(entry["rows"] for entry in entries),
        "completion_tokens": sum(entry["completion_tokens"] for entry in entries),
        "candidates": sum(entry["candidates"] for entry in entries),
        "candidate_bytes": sum(entry["candidate_bytes"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "rejected": len(rejected),
        "differs": dict(sum((Counter(entry["differs"]) for entry in entries), Counter())),
        "seconds": round(sum(entry["seconds"] for entry in entries), 1),
        "shards": entries,
    }
    return Rebuilt(plan, manifest, rejected)


def _sha256(path: Location, old_entry: dict[str, Any], digest: seal.Digest | None) -> str:
    """Return the sha256 of a shard; KDError (3) if it is damaged, or not the one that its old entry recorded."""
    if digest is not None:
        if digest.sealed is False:
            raise KDError(f"{path} is damaged (its bytes are not those that were written); {WAY_OUT}", 3)
        sha256 = digest.sha256
    else:
        status = path.stat()
        same = (old_entry.get("bytes"), old_entry.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
        sha256 = old_entry["sha256"] if same else storage.sha256(path)
    if old_entry and sha256 != old_entry["sha256"]:
        raise KDError(f"{path} is not what was written (manifest.json has another sha256); {WAY_OUT}", 3)
    return sha256


def _entry(path: Location, name: str, fingerprint: str, sha256: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a shard's entry in the manifest, from its footer, metadata and one column; and its rejected rows."""
    status = path.stat()
    with shard.opened(path) as file:
        footer, metadata = file.file.metadata, file.metadata
        if metadata.get("fingerprint") != fingerprint:
            raise KDError(f"{path} belongs to another cache; {WAY_OUT}", 3)
        tokens = sum(file.read(["completion_tokens"])[0].to_pylist()) if footer.num_row_groups else 0
        chunks = [chunk for chunk in shard.column_chunks(footer) if chunk.path_in_schema in CANDIDATE_LEAVES]
    rejected = metadata.get("rejected", [])
    entry = {
        "name": name,
        "split": split_of_shard(name),
        "rows": footer.num_rows,
        "completion_tokens": tokens,
        "candidates": sum(chunk.num_values for chunk in chunks if chunk.path_in_schema == CANDIDATE_LEAVES[0]),
        "candidate_bytes": sum(chunk.total_compressed_size for chunk in chunks),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "seconds": metadata.get("seconds", 0.0),
        "engine": metadata.get("engine"),
        "rejected": len(rejected),
        "differs": metadata.get("differs", {}),
        "sha256": sha256,
    }
    return entry, rejected


def _save(cache: Location, rebuilt: Rebuilt) -> None:
    atomic.write_text(cache / REJECTED_FILE, rejected_text(rebuilt.rejected))
    atomic.write_json(cache / MANIFEST_FILE, seal.with_checksum(rebuilt.manifest))
    atomic.write_text(cache / CARD_FILE, card.render(rebuilt.plan, rebuilt.manifest))


def _is_saved(cache: Location, rebuilt: Rebuilt) -> bool:
    try:
        manifest = json.loads((cache / MANIFEST_FILE).read_text(encoding="utf-8"))
        rejected = (cache / REJECTED_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError, RecursionError):
        return False
    saved = (seal.with_checksum(rebuilt.manifest), rejected_text(rebuilt.rejected))
    return (manifest, rejected) == saved and (cache / CARD_FILE).is_file()


def _missing_shards(rebuilt: Rebuilt) -> str:
    """Name the first three missing shards, and say how they come to be."""
    entries = {entry["name"] for entry in rebuilt.manifest["shards"]}
    names = [planned["name"] for planned in rebuilt.plan["shards"] if planned["name"] not in entries]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}; the same kd cache-teacher command fills them"


def summary(cache: Location) -> dict[str, Any]:
    """Return what ``kd cache info`` prints: the rebuilt manifest, with the answers to what people ask first.

    The manifest is saved only if it differs from the one in the folder, so that looking at a cache changes nothing.
    """
    rebuilt = _rebuilt(cache)
    plan, manifest = rebuilt.plan, rebuilt.manifest
    if not _is_saved(cache, rebuilt):
        # A read-only cache has a summary too.
        with contextlib.suppress(OSError, storage.WriteError):
            _save(cache, rebuilt)
    tokens = manifest["completion_tokens"]
    samples_per_split = Counter[str]()
    for entry in manifest["shards"]:
        samples_per_split[entry["split"]] += entry["rows"]
    fields = plan["fields"]
    return {
        "cache": str(cache),
        "complete": manifest["complete"],
        "shards": f"{len(manifest['shards'])} of {manifest['shards_planned']}",
        **({} if manifest["complete"] else {"missing": _missing_shards(rebuilt)}),
        "teacher": fields["teacher"],
        "teacher_revision": plan.get("teacher_revision"),
        "engine": fields["engine"],
        "dtype": fields["dtype"],
        "mode": fields["mode"],
        "sparsify": fields["sparsify"],
        "precision": fields["precision"],
        "samples": manifest["rows"],
        **{f"samples_{split}": samples_per_split[split] for split in SPLITS},
        "rejected": manifest["rejected"],
        "differs_from_template": manifest["differs"] or None,
        "completion_tokens": tokens,
        "bytes": manifest["bytes"],
        "bytes_per_token": round(manifest["bytes"] / tokens, 1) if tokens else None,
        "candidate_bytes_per_token": round(manifest["candidate_bytes"] / tokens, 1) if tokens else None,
        "teacher_seconds": manifest["seconds"],
        "fingerprint": manifest["fingerprint"],
    }
