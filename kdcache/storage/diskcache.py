"""Pieces of remote shards on the local disk: what was fetched once is not fetched again, and no more than a limit is kept.

    KDCACHE_DISK_CACHE=/scratch/kd KDCACHE_DISK_CACHE_GB=200 kd train --from-cache s3://bucket/cache ...

Any number of processes share a folder: a piece appears under its final name whole, with a digest that every read checks,
and whoever deletes the least recently used ones harms no reader. A folder that cannot be written to is done without.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kdcache import paths

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

DIGEST_BYTES = 16
READ_AHEAD_THREADS = 2
PIECE = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{8}")  # names of whole pieces and of half-written ones

_lock = threading.Lock()
_fetching: dict[str, Future[bytes]] = {}
_ahead: ThreadPoolExecutor | None = None
_since_trim = 0  # bytes written
_patience_seconds = 60.0  # ranks begin apart: one imports, another does not


def get(key: str, fetch: Callable[[], bytes]) -> bytes:
    """The bytes of ``key``: kept ones if they are whole, else fetched, by one thread of one process, and kept."""
    with _lock:
        future = _fetching.get(key)
        mine = future is None
        if future is None:
            future = _fetching[key] = Future()
    if not mine:
        return future.result()
    try:
        path = _path(key)
        found = _read(path)
        if found is None:
            with _alone(path):
                found = _read(path)
                if found is None:
                    found = fetch()
                    _keep(path, found)
        future.set_result(found)
        return found
    except BaseException as error:
        future.set_exception(error)
        raise
    finally:
        with _lock:
            del _fetching[key]


def expect(key: str) -> None:
    """Wait until another process has fetched ``key``. After one wait in vain (it died, the disk is full) there is none."""
    global _patience_seconds
    if not paths.disk_cache_limit_bytes():
        return
    path, until = _path(key), time.monotonic() + _patience_seconds
    while not os.path.exists(path):  # False also where one may not look
        if time.monotonic() > until:
            _patience_seconds = 0.0
            return
        time.sleep(0.01)


def _path(key: str) -> Path:
    return paths.disk_cache_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time fetches a piece, as far as the folder's file system can tell; the others then find it."""
    lock = path.with_name(f".lock-{path.name[:2]}")  # 256 of them, never deleted
    descriptor = None
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def soon(read: Callable[[], object]) -> None:
    """Read ahead in a thread; what fails will fail again where it is wanted. Nothing where nothing is kept."""
    global _ahead
    if not paths.disk_cache_limit_bytes():
        return
    with _lock:
        _ahead = _ahead or ThreadPoolExecutor(READ_AHEAD_THREADS, thread_name_prefix="kd-ahead")
    _ahead.submit(read)


def _read(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    found, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.blake2b(found, digest_size=DIGEST_BYTES).digest() != digest:
        return None  # damaged on this disk: fetched anew
    with contextlib.suppress(OSError):
        os.utime(path)  # used now
    return found


def _keep(path: Path, data: bytes) -> None:
    global _since_trim
    limit = paths.disk_cache_limit_bytes()
    if len(data) > limit // 2:
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data + hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return
    with _lock:
        _since_trim += len(data)
        due = _since_trim > limit // 16
        if due:
            _since_trim = 0
    if due:
        trim(limit - limit // 8)


def trim(target_bytes: int) -> None:
    """Delete the least recently used pieces until no more than ``target_bytes`` are left."""
    pieces = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(paths.disk_cache_folder()):
            if not PIECE.fullmatch(entry.name):  # a lock, or somebody else's file
                continue
            with contextlib.suppress(OSError):  # another process deleted it
                status = entry.stat()
                pieces.append((status.st_mtime_ns, status.st_size, entry.path))
    total = sum(size for _, size, _ in pieces)
    for _, size, name in sorted(pieces):
        if total <= target_bytes:
            return
        with contextlib.suppress(OSError):
            os.unlink(name)
        total -= size
