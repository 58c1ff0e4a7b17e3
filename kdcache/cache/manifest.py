"""plan.json and manifest.json, read and checked; and manifest.json, rejected.jsonl and README.md, made of the shards.

The manifest says what is in the shards, summed. It is always rebuilt from their footers: by the driver when a capture
ends, or by the first ``kd cache info``, never by parallel workers. Invariant: what ``read_plan`` and ``read_manifest``
return has the checksum that it was written with (files from before there was one: none) and all that others look up in it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import card
from kdcache.cache.format import CANDIDATE_LEAVES, FORMAT_VERSION, SPLITS, fingerprint
from kdcache.cache.layout import split_of_shard
from kdcache.errors import KDError, first_line
from kdcache.storage import Location, atomic, digests, seal

WAY_OUT = "run: kd cache verify --repair on the cache, then the same kd cache-teacher command again"


class Damaged(KDError):
    """plan.json or manifest.json is not as it was written; ``name`` says which, ``problem`` in words what is wrong."""

    def __init__(self, cache: Location, name: str, problem: str):
        super().__init__(f"{cache}/{name} is damaged: {problem}; {WAY_OUT}", 3)
        self.name, self.problem = name, problem


#: What must be in plan.json: what the commands look up.
_PLAN: dict[str, type | tuple[type, ...]] = {
    "fingerprint": str,
    "fields": dict,
    "vocab_size": int,
    "end_of_turn": int,
    "tokenizer": dict,
    "shards": list,
}
_FIELDS = ("teacher", "engine", "dtype", "mode", "sparsify", "precision")
_SHARD_OF_PLAN: dict[str, type | tuple[type, ...]] = {"name": str}
_MANIFEST: dict[str, type | tuple[type, ...]] = {"fingerprint": str, "shards": list}
_SHARD_OF_MANIFEST: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "rows": int,
    "completion_tokens": int,
    "bytes": int,
    "sha256": str,
}
_SHARD_NAME = re.compile(rf"data/({'|'.join(SPLITS)})-\d{{5,}}\.parquet")

#: What was in these files before they had a checksum. Anything else beside a checksum that is missing is its name, damaged.
_BEFORE_CHECKSUMS = {
    "plan.json": {
        *("format_version", "fingerprint", "fields", "date", "teacher_revision", "end_of_turn", "vocab_size"),
        *("tokenizer", "near_duplicates_dropped", "shards"),
    },
    "manifest.json": {
        *("format_version", "fingerprint", "complete", "shards_planned", "rows", "completion_tokens", "candidates"),
        *("candidate_bytes", "bytes", "rejected", "seconds", "shards"),
    },
}


def read_plan(cache: Location) -> dict[str, Any]:
    """plan.json of a cache. ``Damaged`` in a sentence if it is not as it was written, KDError if the folder is no cache."""
    if not cache.is_dir():
        raise KDError(f"{cache}: no such folder; make a cache with: kd cache-teacher --out {cache}")
    try:
        plan = _read(cache, "plan.json")
    except FileNotFoundError:
        raise KDError(f"{cache} is not a cache (it has no plan.json){_meant(cache)}") from None
    _check_names(cache, "plan.json", plan, _PLAN, _SHARD_OF_PLAN)
    if missing := [name for name in _FIELDS if not isinstance(plan["fields"].get(name), str)]:
        raise Damaged(cache, "plan.json", f"its fields lack {', '.join(missing)}")
    if fingerprint(plan["fields"]) != plan["fingerprint"]:
        raise Damaged(
            cache, "plan.json", "its fields do not hash to its fingerprint: it was changed by hand, or by chance"
        )
    return plan


def read_manifest(cache: Location) -> dict[str, Any] | None:
    """manifest.json of a cache, None if there is none yet. ``Damaged`` if it is not as it was written."""
    try:
        manifest = _read(cache, "manifest.json")
    except FileNotFoundError:
        return None
    _check_names(cache, "manifest.json", manifest, _MANIFEST, _SHARD_OF_MANIFEST)
    return manifest


def is_protected(content: Mapping[str, Any]) -> bool:
    """Whether a plan or manifest carries a checksum, as all have that this version writes."""
    return "checksum" in content


def _read(cache: Location, name: str) -> dict[str, Any]:
    try:
        content = json.loads((cache / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise Damaged(cache, name, "it nests too deeply") from None
    except ValueError as error:
        raise Damaged(cache, name, f"it is not JSON ({first_line(error)})") from None
    except OSError as error:
        raise KDError(f"{cache}/{name} cannot be read: {error.strerror or first_line(error)}") from None
    if not isinstance(content, dict):
        raise Damaged(cache, name, f"expected a JSON object, found {_kind(content)}")
    altered = is_protected(content) and seal.checksum(content) != content["checksum"]
    if (version := content.get("format_version")) != FORMAT_VERSION:
        doubt = ", and its checksum is not that of its content" if altered else ""
        expected = f"{cache} has cache format {version}; this version of kdcache reads {FORMAT_VERSION}{doubt}"
        raise Damaged(cache, name, expected) if altered else KDError(expected)
    if altered:
        raise Damaged(cache, name, "its checksum is not that of its content")
    if not is_protected(content) and (unknown := sorted(content.keys() - _BEFORE_CHECKSUMS[name])):
        raise Damaged(cache, name, f"it has no checksum, and an unknown entry {unknown[0]!r}")
    return content


def _check_names(
    cache: Location,
    name: str,
    content: dict[str, Any],
    wanted: dict[str, type | tuple[type, ...]],
    of_shard: dict[str, type | tuple[type, ...]],
) -> None:
    """``Damaged`` unless everything is there that others look up, and of the right kind."""
    _check_kinds(cache, name, content, wanted)
    seen: set[str] = set()
    for number, shard in enumerate(content["shards"]):
        if not isinstance(shard, dict):
            raise Damaged(cache, name, f"shard {number} is {_kind(shard)}, expected an object")
        _check_kinds(cache, name, shard, of_shard, f"shard {number}: ")
        if not _SHARD_NAME.fullmatch(shard["name"]) or shard["name"] in seen:
            raise Damaged(cache, name, f"{shard['name']!r} cannot be the name of shard {number}")
        seen.add(shard["name"])


def _check_kinds(
    cache: Location, name: str, content: dict[str, Any], wanted: dict[str, type | tuple[type, ...]], where: str = ""
) -> None:
    for key, kind in wanted.items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f"is {_kind(value)}" if key in content else "is missing"
            raise Damaged(cache, name, f"{where}{key} {found}")


def _kind(value: Any) -> str:
    """What a JSON value is called."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
    }
    return names.get(type(value), "an object")


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
    if plan_was_set_aside(folder):
        return "; it was set aside: the same kd cache-teacher command writes it again"
    inside = [path for path in folder.iterdir() if (path / "plan.json").is_file()]
    return f"; is {inside[0]} meant?" if inside else ""


def plan_was_set_aside(cache: Location) -> bool:
    """Whether the folder is a cache whose plan.json was damaged, and waits for its command to write it again."""
    return not (cache / "plan.json").is_file() and any((cache / "set-aside").glob("plan.json*"))


def shards_metadata(cache: Location) -> Iterator[dict[str, Any]]:
    """What each shard in the folder says of itself, whatever is planned. KDError for one that cannot be read."""
    for path in storage.files(cache / "data").values():
        try:
            with pq.ParquetFile(storage.opened(path)) as file:
                yield json.loads((file.schema_arrow.metadata or {})[b"kdcache"])
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise KDError(f"{path} is damaged ({first_line(error)}); {WAY_OUT}", 3) from None


def _save(cache: Location, plan: dict[str, Any], manifest: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    atomic.write_text(cache / "rejected.jsonl", rejected_text(rejected))
    atomic.write_json(cache / "manifest.json", seal.with_checksum(manifest))
    atomic.write_text(cache / "README.md", card.render(plan, manifest))


def rejected_text(rejected: list[dict[str, Any]]) -> str:
    """rejected.jsonl, of what the shards say in their order."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)


def _sum(cache: Location) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The plan, the manifest and the rejected rows, from the shards."""
    plan = read_plan(cache)
    known = recorded(cache)
    there = storage.files(cache / "data")
    paths = {
        shard["name"]: there[shard["name"].removeprefix("data/")]
        for shard in plan["shards"]
        if shard["name"].removeprefix("data/") in there
    }
    found = digests.of_files(cache, list(paths)) if isinstance(cache, Path) else {}
    shards, rejected = [], []
    for name, path in paths.items():
        shard, bad = _read_shard(path, name, plan, known.get(name, {}), found.get(name))
        shards.append(shard)
        rejected.extend(bad)
    manifest = {
        "format_version": FORMAT_VERSION,
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


def _is_written(cache: Location, manifest: dict[str, Any], rejected: list[dict[str, Any]]) -> bool:
    try:
        same = json.loads((cache / "manifest.json").read_text(encoding="utf-8")) == seal.with_checksum(manifest)
        same = same and (cache / "rejected.jsonl").read_text(encoding="utf-8") == rejected_text(rejected)
        return same and (cache / "README.md").is_file()
    except (OSError, ValueError, RecursionError):
        return False


def _missing(plan: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The shards that are not there, the first three by name."""
    there = {shard["name"] for shard in manifest["shards"]}
    names = [shard["name"] for shard in plan["shards"] if shard["name"] not in there]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}; the same kd cache-teacher command fills them"


def recorded(cache: Location) -> dict[str, dict[str, Any]]:
    """What manifest.json says of each shard, by name; nothing where there is none, or it is damaged."""
    try:
        manifest = read_manifest(cache)
    except Damaged:
        return {}
    return {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}


def column_chunks(footer: pq.FileMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    """What the footer of a shard says of each column in each row group."""
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            yield footer.row_group(group).column(column)


def forget(cache: Location, shards: Collection[str]) -> None:
    """Strike shards that are to be written anew from the manifest: what it says of them no longer holds."""
    try:
        manifest = read_manifest(cache)
    except Damaged:
        return  # nobody believes it: it is rebuilt
    if manifest and {shard["name"] for shard in manifest["shards"]} & set(shards):
        manifest["shards"] = [shard for shard in manifest["shards"] if shard["name"] not in shards]
        atomic.write_json(cache / "manifest.json", seal.with_checksum(manifest | {"complete": False}))


def _read_shard(
    path: Location, name: str, plan: dict[str, Any], known: dict[str, Any], digest: seal.Digest | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One shard's line of the manifest, from its footer and one column; and its rejected rows.

    ``digest`` is that of a folder's file. A remote one is read whole only where the manifest does not know its size and time.
    """
    status = path.stat()
    if digest is not None:
        if digest.sealed is False:
            raise KDError(f"{path} is damaged (its bytes are not those that were written); {WAY_OUT}", 3)
        sha256 = digest.sha256
    else:
        same = (known.get("bytes"), known.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
        sha256 = known["sha256"] if same else storage.sha256(path)
    if known and sha256 != known["sha256"]:
        raise KDError(f"{path} is not what was written (manifest.json has another sha256); {WAY_OUT}", 3)
    try:
        with pq.ParquetFile(storage.opened(path), page_checksum_verification=True) as file:
            footer = file.metadata
            metadata = json.loads((file.schema_arrow.metadata or {})[b"kdcache"])
            tokens = sum(file.read(columns=["completion_tokens"])[0].to_pylist()) if footer.num_row_groups else 0
        if metadata["fingerprint"] != plan["fingerprint"]:
            raise KDError(f"{path} belongs to another cache; {WAY_OUT}", 3)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise KDError(f"{path} is damaged ({first_line(error)}); {WAY_OUT}", 3) from None
    chunks = [chunk for chunk in column_chunks(footer) if chunk.path_in_schema in CANDIDATE_LEAVES]
    shard = {
        "name": name,
        "split": split_of_shard(name),
        "rows": footer.num_rows,
        "completion_tokens": tokens,
        "candidates": sum(c.num_values for c in chunks if c.path_in_schema == CANDIDATE_LEAVES[0]),
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
    if not _is_written(cache, manifest, rejected):
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
        "teacher_revision": plan.get("teacher_revision"),
        "engine": fields["engine"],
        "dtype": fields["dtype"],
        "mode": fields["mode"],
        "sparsify": fields["sparsify"],
        "precision": fields["precision"],
        "samples": manifest["rows"],
        **{f"samples_{split}": splits[split] for split in SPLITS},
        "rejected": manifest["rejected"],
        "differs_from_template": manifest["differs"] or None,
        "completion_tokens": tokens,
        "bytes": manifest["bytes"],
        "bytes_per_token": round(manifest["bytes"] / tokens, 1) if tokens else None,
        "candidate_bytes_per_token": round(manifest["candidate_bytes"] / tokens, 1) if tokens else None,
        "teacher_seconds": manifest["seconds"],
        "fingerprint": manifest["fingerprint"],
    }
