"""What ``kd cache verify`` checks in one shard. Only one row group is in memory at a time.

bytes        the seal holds                                 else nothing more can be said of the shard
   |         manifest.json recorded this sha256
metadata     the cache's fingerprint, the shard's own name
   |
schema       the columns of the format, each of its type    else the rows are not looked at
   |
row groups   every check of row_checks.py
   |
shard        no sample id twice; rows and tokens as manifest.json says
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache import storage
from kdcache.cache import shard
from kdcache.cache.documents import is_protected
from kdcache.cache.format import SCHEMA
from kdcache.cache.integrity.old_policy import OldPolicy
from kdcache.cache.integrity.row_checks import RowGroup, row_problems
from kdcache.cache.layout import split_of_shard
from kdcache.errors import first_line
from kdcache.storage import Location, digests, seal


@dataclass
class Examination:
    """What one shard holds, and what is wrong with it."""

    problems: list[str] = field(default_factory=list)  # in words
    rows: int = 0
    tokens: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)  # the rows that could not be used
    sample_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # a hash of each
    sealed: bool | None = None  # whether its seal holds; None: it has none
    record: digests.Record | None = None  # what to remember of it, if it is a local file
    only_the_manifest_differs: bool = False  # its sha256 in manifest.json is another one, and nothing else is wrong


def examine(
    path: Location,
    name: str,
    plan: Mapping[str, Any],
    entry: Mapping[str, Any] | None,
    old_policy: OldPolicy | None = None,
) -> Examination:
    """Read all of a shard and check it. ``entry`` is what manifest.json says of it, if anything.

    ``old_policy`` counts signs in the rows of a cache of completion policy 1.
    """
    examination = Examination()
    try:
        identity = digests.identity(path) if isinstance(path, Path) else None
        source = storage.fetched(path)
        digest = seal.digest(source)
    except OSError as error:
        examination.problems.append(f"it cannot be read: {first_line(error)}")
        return examination
    examination.sealed = digest.sealed
    examination.record = digests.record(identity, digest) if identity else None
    if digest.sealed is False:
        examination.problems.append("it is damaged: its bytes are not those that were written (sha256)")
        return examination
    content_problems = list(_content_problems(path, source, name, plan, examination, old_policy))
    if is_protected(plan) and digest.sealed is None:
        content_problems.append("it carries no seal: it is not what was written")
    manifest_problems = list(_manifest_problems(entry, digest, examination, sound=not content_problems))
    examination.problems = manifest_problems + content_problems
    examination.only_the_manifest_differs = (
        entry is not None
        and not content_problems
        and (entry["rows"], entry["completion_tokens"]) == (examination.rows, examination.tokens)
        and entry["bytes"] == _size(source)
    )
    return examination


def _manifest_problems(
    entry: Mapping[str, Any] | None, digest: seal.Digest, examination: Examination, sound: bool
) -> Iterator[str]:
    """Yield where a shard is not what manifest.json recorded; its counts are compared only where they are ``sound``."""
    if entry is None:
        return
    if digest.sha256 != entry["sha256"]:
        yield "its bytes are not those that manifest.json recorded (sha256)"
    if sound and (entry["rows"], entry["completion_tokens"]) != (examination.rows, examination.tokens):
        yield (
            f"manifest.json says {entry['rows']} rows and {entry['completion_tokens']} tokens, the shard has "
            f"{examination.rows} and {examination.tokens}"
        )


def _content_problems(
    path: Location,
    source: Path | io.BytesIO,
    name: str,
    plan: Mapping[str, Any],
    examination: Examination,
    old_policy: OldPolicy | None,
) -> Iterator[str]:
    """Yield what a shard's pages, metadata, schema and numbers show to be wrong; count its rows on the way."""
    try:
        with shard.opened(path, source=source) as file:
            if problem := shard.misplaced(file.metadata, name, plan["fingerprint"]):
                yield f"it {problem}"
            if problem := _schema_problem(file.schema):
                yield problem
                return
            ids: Counter[str] = Counter()
            for number in range(len(file.row_groups)):
                table = file.read_row_group(number, SCHEMA.names)
                examination.rows += len(table)
                examination.tokens += sum(table["completion_tokens"].to_pylist())
                ids.update(map(str, table["sample_id"].to_pylist()))
                rows = RowGroup(table, split_of_shard(name), plan["vocab_size"], file.metadata)
                problems = list(row_problems(rows))
                yield from (f"row group {number}: {problem}" for problem in problems)
                if old_policy is not None and not problems:
                    old_policy.add(table, plan["fields"].get("reasoning") is not None)
            examination.rejected = file.metadata.get("rejected", [])
            examination.sample_ids = np.fromiter(map(hash, ids), np.int64, len(ids))
            for sample_id, count in ids.items():
                if count > 1:
                    yield f"sample_id {sample_id!r} occurs {count} times in it"
    except shard.DamagedShard as error:
        yield f"it cannot be read: {error.problem}"


def _schema_problem(schema: pa.Schema) -> str | None:
    """Say which columns are missing or of another type than the format's."""
    wrong = [
        f"{column.name} is {schema.field(column.name).type if column.name in schema.names else 'missing'}, "
        f"expected {column.type}"
        for column in SCHEMA
        if column.name not in schema.names or not schema.field(column.name).type.equals(column.type)
    ]
    return "its columns are not the format's: " + "; ".join(wrong) if wrong else None


def _size(source: Path | io.BytesIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
