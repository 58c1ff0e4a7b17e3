"""plan.json and manifest.json of a cache, read and checked.

Invariant: what ``read_plan`` and ``read_manifest`` return has the checksum it was written with, and holds every entry
that other modules look up, each of the right type. (Early caches have no checksum in these files.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdcache.cache.format import FORMAT_VERSION, fingerprint
from kdcache.cache.layout import MANIFEST_FILE, PLAN_FILE, SET_ASIDE_FOLDER, SHARD_NAME
from kdcache.cache.shard import WAY_OUT
from kdcache.errors import KDError, first_line
from kdcache.storage import Location, seal


class DamagedDocument(KDError):
    """plan.json or manifest.json is not as it was written; ``name`` says which, ``problem`` in words what is wrong."""

    def __init__(self, cache: Location, name: str, problem: str):
        super().__init__(f"{cache}/{name} is damaged: {problem}; {WAY_OUT}", 3)
        self.name, self.problem = name, problem


#: The entries that every plan.json and manifest.json must have, with their types.
_PLAN_ENTRIES: dict[str, type] = {
    "fingerprint": str,
    "fields": dict,
    "vocab_size": int,
    "end_of_turn": int,
    "tokenizer": dict,
    "shards": list,
}
_PLAN_FIELDS = ("teacher", "engine", "dtype", "mode", "sparsify", "precision")
_PLAN_SHARD_ENTRIES: dict[str, type] = {"name": str}
_MANIFEST_ENTRIES: dict[str, type] = {"fingerprint": str, "shards": list}
_MANIFEST_SHARD_ENTRIES: dict[str, type] = {
    "name": str,
    "rows": int,
    "completion_tokens": int,
    "bytes": int,
    "sha256": str,
}

#: The entries of these files in early caches, which had no checksum. A file that has neither a checksum nor only these
#: entries once had a checksum whose own name is damaged.
_ENTRIES_BEFORE_CHECKSUMS = {
    PLAN_FILE: {
        *("format_version", "fingerprint", "fields", "date", "teacher_revision", "end_of_turn", "vocab_size"),
        *("tokenizer", "near_duplicates_dropped", "shards"),
    },
    MANIFEST_FILE: {
        *("format_version", "fingerprint", "complete", "shards_planned", "rows", "completion_tokens", "candidates"),
        *("candidate_bytes", "bytes", "rejected", "seconds", "shards"),
    },
}


def read_plan(cache: Location) -> dict[str, Any]:
    """Read plan.json. Raise ``DamagedDocument`` if it is not as it was written, KDError if the folder is no cache."""
    if not cache.is_dir():
        raise KDError(f"{cache}: no such folder; make a cache with: kd cache-teacher --out {cache}")
    try:
        plan = _read(cache, PLAN_FILE)
    except FileNotFoundError:
        raise KDError(f"{cache} is not a cache (it has no {PLAN_FILE}){_hint(cache)}") from None
    _check_entries(cache, PLAN_FILE, plan, _PLAN_ENTRIES, _PLAN_SHARD_ENTRIES)
    if missing := [name for name in _PLAN_FIELDS if not isinstance(plan["fields"].get(name), str)]:
        raise DamagedDocument(cache, PLAN_FILE, f"its fields lack {', '.join(missing)}")
    if fingerprint(plan["fields"]) != plan["fingerprint"]:
        raise DamagedDocument(
            cache, PLAN_FILE, "its fields do not hash to its fingerprint: it was changed by hand, or by chance"
        )
    return plan


def read_manifest(cache: Location) -> dict[str, Any] | None:
    """Read manifest.json, None if there is none yet. Raise ``DamagedDocument`` if it is not as it was written."""
    try:
        manifest = _read(cache, MANIFEST_FILE)
    except FileNotFoundError:
        return None
    _check_entries(cache, MANIFEST_FILE, manifest, _MANIFEST_ENTRIES, _MANIFEST_SHARD_ENTRIES)
    return manifest


def entries_by_shard(manifest: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of each shard, by name; nothing without a manifest."""
    return {shard["name"]: shard for shard in manifest["shards"]} if manifest else {}


def recorded(cache: Location) -> dict[str, dict[str, Any]]:
    """Return what manifest.json says of each shard, by name; nothing where it is missing or damaged."""
    try:
        return entries_by_shard(read_manifest(cache))
    except DamagedDocument:
        return {}


def is_protected(content: Mapping[str, Any]) -> bool:
    """Say whether a plan or manifest carries a checksum, as this version always writes one."""
    return "checksum" in content


def plan_was_set_aside(cache: Location) -> bool:
    """Say whether the plan.json of a cache was damaged, set aside, and not yet written again by its command."""
    return not (cache / PLAN_FILE).is_file() and any((cache / SET_ASIDE_FOLDER).glob(f"{PLAN_FILE}*"))


def _hint(folder: Location) -> str:
    """Say what a folder is instead of a cache, where that can be seen."""
    if (folder / "config.json").is_file():
        return "; it is a model: where a student is expected, name it as the student"
    if plan_was_set_aside(folder):
        return "; it was set aside: the same kd cache-teacher command writes it again"
    caches = [path for path in folder.iterdir() if (path / PLAN_FILE).is_file()]
    return f"; is {caches[0]} meant?" if caches else ""


def _read(cache: Location, name: str) -> dict[str, Any]:
    """Read one of the two files and check its format version and checksum."""
    try:
        content = json.loads((cache / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except RecursionError:
        raise DamagedDocument(cache, name, "it nests too deeply") from None
    except ValueError as error:
        raise DamagedDocument(cache, name, f"it is not JSON ({first_line(error)})") from None
    except OSError as error:
        raise KDError(f"{cache}/{name} cannot be read: {error.strerror or first_line(error)}") from None
    if not isinstance(content, dict):
        raise DamagedDocument(cache, name, f"expected a JSON object, found {_type_name(content)}")
    altered = is_protected(content) and seal.checksum(content) != content["checksum"]
    if (version := content.get("format_version")) != FORMAT_VERSION:
        # A later version of kdcache has written it, unless the checksum says that the number itself is damaged.
        doubt = ", and its checksum is not that of its content" if altered else ""
        sentence = f"{cache} has cache format {version}; this version of kdcache reads {FORMAT_VERSION}{doubt}"
        raise DamagedDocument(cache, name, sentence) if altered else KDError(sentence)
    if altered:
        raise DamagedDocument(cache, name, "its checksum is not that of its content")
    if not is_protected(content) and (unknown := sorted(content.keys() - _ENTRIES_BEFORE_CHECKSUMS[name])):
        raise DamagedDocument(cache, name, f"it has no checksum, and an unknown entry {unknown[0]!r}")
    return content


def _check_entries(
    cache: Location, name: str, content: dict[str, Any], entries: dict[str, type], shard_entries: dict[str, type]
) -> None:
    """Raise ``DamagedDocument`` unless a file and each shard in it have all their entries, and shards proper names."""
    _check_types(cache, name, content, entries)
    names: set[str] = set()
    for number, shard in enumerate(content["shards"]):
        if not isinstance(shard, dict):
            raise DamagedDocument(cache, name, f"shard {number} is {_type_name(shard)}, expected an object")
        _check_types(cache, name, shard, shard_entries, f"shard {number}: ")
        if not SHARD_NAME.fullmatch(shard["name"]) or shard["name"] in names:
            raise DamagedDocument(cache, name, f"{shard['name']!r} cannot be the name of shard {number}")
        names.add(shard["name"])


def _check_types(
    cache: Location, name: str, content: dict[str, Any], entries: dict[str, type], where: str = ""
) -> None:
    for key, expected in entries.items():
        value = content.get(key)
        if not isinstance(value, expected) or isinstance(value, bool):
            problem = f"is {_type_name(value)}" if key in content else "is missing"
            raise DamagedDocument(cache, name, f"{where}{key} {problem}")


def _type_name(value: Any) -> str:
    """Return what people call the type of a JSON value."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
    }
    return names.get(type(value), "an object")
