"""The digests of a cache's files, computed once for each state of a file and remembered outside the cache.

A file is known again by size, times of change (of content and of inode), inode and device: a copy, a restored time of
modification or a new file under the old name is another one. What is remembered lies in the user's own folder
(``KDCACHE_HOME/verified``), so that a cache can be read-only, and so that nobody hands on a cache that vouches for itself. What no program did
(bits that rot below the file system) changes none of these: nothing is remembered for longer than ``DAYS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kdcache.paths import home
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.storage import atomic, lock
from kdcache.storage.seal import Digest, digest

DAYS = 7
#: A file that changed within so many seconds may change again in the same tick of its clock: it is not remembered.
SETTLED_SECONDS = 2.0

Record = list[Any]  # of a state of a file: its identity, when it was read, sha256, sealed
_Records = dict[str, Record]  # by name


def of_files(cache: Path, names: Sequence[str], progress: ShowProgress = silent) -> dict[str, Digest]:
    """The digest of each named file of a cache; what is not remembered is read, in parallel.

    Of several processes one reads, and the others wait for what it remembers. OSError for a file that cannot be read.
    """
    store = _store(cache)
    identities = {name: identity(cache / name) for name in names}
    records = _load(store)
    todo = [name for name in names if not _holds(records.get(name), identities[name])]
    if todo:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a home that cannot be written to
                stack.enter_context(lock.held(store.parent, f".{store.stem}.lock", wait=True))
            records = _load(store)  # another process may have read them meanwhile
            todo = [name for name in todo if not _holds(records.get(name), identities[name])]
            total, done = sum(identities[name][0] for name in todo), 0
            found: _Records = {}
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
                for name, made in zip(todo, pool.map(lambda name: digest(cache / name), todo)):
                    found[name] = record(identities[name], made)
                    done += identities[name][0]
                    progress(Progress(done // 10**6, total // 10**6, "MB of shards checked"))
            _write(store, cache, _load(store) | _settled(found))
            records = records | found
    return {name: Digest(*records[name][-2:]) for name in names}


def identity(path: Path) -> list[int]:
    """What tells the states of a file apart without reading it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _store(cache: Path) -> Path:
    key = hashlib.sha256(os.fsencode(cache.resolve())).hexdigest()[:24]
    return home() / "verified" / f"{key}.json"


def _load(store: Path) -> _Records:
    try:
        files = json.loads(store.read_text(encoding="utf-8"))["files"]
        return {name: record for name, record in files.items() if len(record) == 8}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def record(state: list[int], found: Digest) -> Record:
    """What is remembered of a file that was in this state before it was read, just now."""
    return [*state, time.time(), found.sha256, found.sealed]


def replace(cache: Path, records: dict[str, Record]) -> None:
    """Remember this of a cache, and forget all else."""
    _write(_store(cache), cache, _settled(records))


def _holds(record: Record | None, now: list[int]) -> bool:
    return record is not None and record[:5] == now and 0 <= time.time() - record[5] < DAYS * 86400


def _settled(records: _Records) -> _Records:
    return {name: r for name, r in records.items() if r[5] - max(r[1:3]) / 1e9 > SETTLED_SECONDS}


def _write(store: Path, cache: Path, records: _Records) -> None:
    """Replace what is remembered of a cache; what others left that nobody looked at for long is deleted."""
    with contextlib.suppress(OSError):  # only time is lost
        if not records:
            store.unlink(missing_ok=True)
            return
        store.parent.mkdir(parents=True, exist_ok=True)
        path = str(cache.resolve()).encode("utf-8", "backslashreplace").decode()
        atomic.write_text(store, json.dumps({"cache": path, "files": records}))
        for old in store.parent.glob("*.json"):
            if time.time() - old.stat().st_mtime > DAYS * 86400:
                old.unlink(missing_ok=True)
