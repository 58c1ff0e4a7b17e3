"""The digests of a cache's files, computed once per version of a file and remembered outside the cache.

A version of a file is recognised by its size, its times of change (of content and of inode), inode and device. A copy,
a restored modification time or a new file under the old name count as another version. The records are in the user's
own folder (``KDCACHE_HOME/verified``): so a cache can be read-only, and no cache can vouch for itself. Bits that rot on
the disk change none of these values, so no record is valid for longer than ``DAYS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.paths import home
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.storage import atomic, lock
from kdcache.storage.seal import Digest, digest

DAYS = 7
#: A file that changed less than so many seconds before it was read may change again within one tick of its clock.
SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class Record:
    """The digest of one version of a file."""

    identity: list[int]  # as ``identity`` returns it
    read_at: float  # seconds since the epoch
    digest: Digest

    def is_valid(self, identity: list[int]) -> bool:
        """Return whether the file still has this identity, and the record is not too old."""
        return self.identity == identity and 0 <= time.time() - self.read_at < DAYS * 86400

    def is_settled(self) -> bool:
        """Return whether the file had not changed for SETTLED_SECONDS when it was read."""
        _, modified_ns, changed_ns, *_ = self.identity
        return self.read_at - max(modified_ns, changed_ns) / 1e9 > SETTLED_SECONDS


_Records = dict[str, Record]  # by file name


def of_files(cache: Path, names: Sequence[str], show: ShowProgress = silent) -> dict[str, Digest]:
    """Return the digest of each named file of a cache. Files without a valid record are read, in parallel.

    One of several processes reads, and the others wait for its records. OSError for a file that cannot be read.
    """
    store = _store(cache)
    identities = {name: identity(cache / name) for name in names}
    records = _load(store)
    unread = _without_record(names, identities, records)
    if unread:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a home that cannot be written to
                stack.enter_context(lock.held(store.parent, f".{store.stem}.lock", wait=True))
            records = _load(store)  # another process may have read them meanwhile
            unread = _without_record(unread, identities, records)
            total, read_bytes = sum(identities[name][0] for name in unread), 0
            new: _Records = {}
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
                for name, file_digest in zip(unread, pool.map(lambda name: digest(cache / name), unread)):
                    new[name] = record(identities[name], file_digest)
                    read_bytes += identities[name][0]
                    show(Progress(read_bytes // 10**6, total // 10**6, "MB of shards checked"))
            _write(store, cache, _load(store) | _settled(new))
            records = records | new
    return {name: records[name].digest for name in names}


def identity(path: Path) -> list[int]:
    """Return the values that recognise a version of a file: size, two times of change in ns, inode, device."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def record(identity: list[int], digest: Digest) -> Record:
    """Return the record of a file that had this identity before it was read, just now."""
    return Record(identity, time.time(), digest)


def replace(cache: Path, records: dict[str, Record]) -> None:
    """Replace all records of a cache by these."""
    _write(_store(cache), cache, _settled(records))


def _without_record(names: Sequence[str], identities: dict[str, list[int]], records: _Records) -> list[str]:
    return [name for name in names if name not in records or not records[name].is_valid(identities[name])]


def _settled(records: _Records) -> _Records:
    return {name: record for name, record in records.items() if record.is_settled()}


# --- the file of records: {"cache": its path, "files": {name: [*identity, read_at, sha256, sealed]}} -----------------


def _store(cache: Path) -> Path:
    key = hashlib.sha256(os.fsencode(cache.resolve())).hexdigest()[:24]
    return home() / "verified" / f"{key}.json"


def _load(store: Path) -> _Records:
    try:
        files: dict[str, list[Any]] = json.loads(store.read_text(encoding="utf-8"))["files"]
        return {
            name: Record(values[:5], values[5], Digest(*values[6:]))
            for name, values in files.items()
            if len(values) == 8
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(store: Path, cache: Path, records: _Records) -> None:
    """Write the records of a cache, and delete the files of other caches that were not written for DAYS."""
    with contextlib.suppress(OSError):  # records save time, and nothing else depends on them
        if not records:
            store.unlink(missing_ok=True)
            return
        store.parent.mkdir(parents=True, exist_ok=True)
        path = str(cache.resolve()).encode("utf-8", "backslashreplace").decode()
        files = {name: [*r.identity, r.read_at, r.digest.sha256, r.digest.sealed] for name, r in records.items()}
        atomic.write_text(store, json.dumps({"cache": path, "files": files}))
        for old in store.parent.glob("*.json"):
            if time.time() - old.stat().st_mtime > DAYS * 86400:
                old.unlink(missing_ok=True)
