"""manifest.json, rejected.jsonl and README.md: what the shards say, summed. Always rebuilt from the shards' footers.

Written by the driver when a capture ends, or by the first ``kd cache info``; never by parallel workers.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import card, format, storage, writer
from kdcache.errors import KDError
from kdcache.storage import Location

WAY_OUT = "run: kd cache verify --repair on the cache, then the same kd cache-teacher command again"


def read_plan(cache: Location) -> dict[str, Any]:
    """plan.json of a cache; KDError in a sentence if the folder is none."""
    if not cache.is_dir():
        raise KDError(f"{cache}: no such folder; make a cache with: kd cache-teacher --out {cache}")
    try:
        plan = json.loads((cache / "plan.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KDError(f"{cache} is not a cache (it has no plan.json){_meant(cache)}") from None
    except ValueError as error:
        raise KDError(f"{cache}/plan.json is not JSON ({error}); is this a cache?") from None
    if plan.get("format_version") != format.FORMAT_VERSION:
        raise KDError(
            f"{cache} has cache format {plan.get('format_version')}; this version of kdcache reads {format.FORMAT_VERSION}"
        )
    return plan


def write(cache: Location, verified: Collection[str] = ()) -> dict[str, Any]:
    """Sum the shards, write manifest.json, rejected.jsonl and README.md, and return the manifest.

    The shards named in ``verified`` are recorded as verified now.
    """
    plan, manifest, rejected = _sum(cache)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    for shard in manifest["shards"]:
        if shard["name"] in verified:
            shard["verified"] = now
    _save(cache, plan, manifest, rejected)
    return manifest


def _meant(folder: Location) -> str:
    """What a folder is instead of a cache, where that can be seen."""
    if (folder / "config.json").is_file():
        return "; it is a model: where a student is expected, name it as the student"
    inside = [path for path in folder.iterdir() if (path / "plan.json").is_file()]
    return f"; is {inside[0]} meant?" if inside else ""


def _save(cache: Location, plan: dict[str, Any], manifest: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    writer.write_text(cache / "rejected.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
    writer.write_json(cache / "manifest.json", manifest)
    writer.write_text(cache / "README.md", card.render(plan, manifest))


def _sum(cache: Location) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The plan, the manifest and the rejected rows, from the shards."""
    plan = read_plan(cache)
    known = recorded(cache)
    there = storage.files(cache / "data")
    shards, rejected = [], []
    for planned in plan["shards"]:
        if planned["name"].removeprefix("data/") not in there:
            continue
        path = there[planned["name"].removeprefix("data/")]
        shard, bad = _read_shard(path, planned["name"], plan["fingerprint"], known.get(planned["name"], {}))
        shards.append(shard)
        rejected.extend(bad)
    manifest = {
        "format_version": format.FORMAT_VERSION,
        "fingerprint": plan["fingerprint"],
        "complete": len(shards) == len(plan["shards"]),
        "shards_planned": len(plan["shards"]),
        "rows": sum(s["rows"] for s in shards),
        "completion_tokens": sum(s["completion_tokens"] for s in shards),
        "candidates": sum(s["candidates"] for s in shards),
        "candidate_bytes": sum(s["candidate_bytes"] for s in shards),
        "bytes": sum(s["bytes"] for s in shards),
        "rejected": len(rejected),
        "differs": dict(sum((Counter(s["differs"]) for s in shards), Counter())),
        "seconds": round(sum(s["seconds"] for s in shards), 1),
        "shards": shards,
    }
    return plan, manifest, rejected


def _is_written(cache: Location, manifest: dict[str, Any]) -> bool:
    try:
        same = json.loads((cache / "manifest.json").read_text(encoding="utf-8")) == json.loads(json.dumps(manifest))
        return same and all((cache / name).is_file() for name in ("rejected.jsonl", "README.md"))
    except (OSError, ValueError):
        return False


def _missing(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The shards that are not there, the first three by name."""
    there = {shard["name"] for shard in manifest["shards"]}
    names = [shard["name"] for shard in plan["shards"] if shard["name"] not in there]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}; the same kd cache-teacher command fills them"


def recorded(cache: Location) -> dict[str, dict[str, Any]]:
    """What manifest.json says of each shard, by name; nothing where it cannot be read."""
    try:
        found = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
        return {shard["name"]: shard for shard in found["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def unchanged(path: Location, known: dict[str, Any]) -> bool:
    """Whether a file has the size and time of change that the manifest recorded of it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return (known.get("bytes"), known.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)


def column_chunks(footer: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """What the footer of a shard says of each column in each row group."""
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            yield footer.row_group(group).column(column)


def forget(cache: Location, shards: Collection[str]) -> None:
    """Strike shards that are to be written anew from the manifest: what it says of them no longer holds."""
    known = recorded(cache)
    if known.keys() & set(shards):
        manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
        manifest["shards"] = [shard for name, shard in known.items() if name not in shards]
        writer.write_json(cache / "manifest.json", manifest | {"complete": False})


def _read_shard(
    path: Location, name: str, fingerprint: str, known: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One shard's line of the manifest, from its footer and one column; and its rejected rows."""
    status = path.stat()
    try:
        with pq.ParquetFile(storage.opened(path), page_checksum_verification=True) as file:
            footer = file.metadata
            metadata = json.loads((file.schema_arrow.metadata or {})[b"kdcache"])
            tokens = sum(file.read(columns=["completion_tokens"])[0].to_pylist()) if footer.num_row_groups else 0
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise KDError(f"{path} is damaged ({error}); {WAY_OUT}", 3) from None
    if metadata.get("fingerprint") != fingerprint:
        raise KDError(f"{path} belongs to another cache; {WAY_OUT}", 3)
    chunks = [chunk for chunk in column_chunks(footer) if chunk.path_in_schema in format.CANDIDATE_LEAVES]
    sha256 = known["sha256"] if unchanged(path, known) else storage.sha256(path)
    if known and sha256 != known["sha256"]:
        raise KDError(f"{path} is not what was written (manifest.json has another sha256); {WAY_OUT}", 3)
    shard = {
        "name": name,
        "split": format.split_of_shard(name),
        "rows": footer.num_rows,
        "completion_tokens": tokens,
        "candidates": sum(c.num_values for c in chunks if c.path_in_schema == format.CANDIDATE_LEAVES[0]),
        "candidate_bytes": sum(c.total_compressed_size for c in chunks),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "seconds": metadata.get("seconds", 0.0),
        "engine": metadata.get("engine"),
        "rejected": len(metadata.get("rejected", [])),
        "differs": metadata.get("differs", {}),
        "sha256": sha256,
        "verified": known.get("verified"),
    }
    return shard, metadata.get("rejected", [])


def summary(cache: Location) -> dict[str, Any]:
    """``kd cache info``: the manifest made anew from the shards, with what people ask first worked out.

    It is written where it is not that already: looking at a cache that nothing happened to changes nothing.
    """
    plan, manifest, rejected = _sum(cache)
    if not _is_written(cache, manifest):
        # A cache that cannot be written to can still be summed up.
        with contextlib.suppress(OSError, storage.WriteError):
            _save(cache, plan, manifest, rejected)
    tokens = manifest["completion_tokens"]
    splits = Counter[str]()
    for shard in manifest["shards"]:
        splits[shard["split"]] += shard["rows"]
    fields = plan["fields"]
    return {
        "cache": str(cache),
        "complete": manifest["complete"],
        "shards": f"{len(manifest['shards'])} of {manifest['shards_planned']}",
        **({} if manifest["complete"] else {"missing": _missing(plan, manifest)}),
        "teacher": fields["teacher"],
        "teacher_revision": plan["teacher_revision"],
        "engine": fields["engine"],
        "dtype": fields["dtype"],
        "mode": fields["mode"],
        "sparsify": fields["sparsify"],
        "precision": fields["precision"],
        "samples": manifest["rows"],
        **{f"samples_{split}": splits[split] for split in format.SPLITS},
        "rejected": manifest["rejected"],
        "differs_from_template": manifest["differs"] or None,
        "completion_tokens": tokens,
        "bytes": manifest["bytes"],
        "bytes_per_token": round(manifest["bytes"] / tokens, 1) if tokens else None,
        "candidate_bytes_per_token": round(manifest["candidate_bytes"] / tokens, 1) if tokens else None,
        "teacher_seconds": manifest["seconds"],
        "fingerprint": manifest["fingerprint"],
    }
