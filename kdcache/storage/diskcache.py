"""Pieces of remote shards on the local disk: what was fetched once is not fetched again, up to a limit of bytes.

    KDCACHE_DISK_CACHE=/scratch/kd KDCACHE_DISK_CACHE_GB=200 kd train --from-cache s3://bucket/cache ...

Any number of processes share the folder. Invariant: a piece gets its final name only when it is complete, and carries a
digest that every read checks; so evicting the least recently used pieces never harms a reader, who fetches again. If
the folder cannot be written to, everything is fetched and nothing is kept.
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
PREFETCH_THREADS = 2
PIECE = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.[0-9a-f]{8}")  # names of complete pieces and of half-written ones

_lock = threading.Lock()
_fetching: dict[str, Future[bytes]] = {}
_prefetcher: ThreadPoolExecutor | None = None
_bytes_since_eviction = 0
_patience_seconds = 60.0  # ranks do not start at the same time: some still import when others read


def get(key: str, fetch: Callable[[], bytes]) -> bytes:
    """Return the bytes of ``key`` from the disk, or call ``fetch`` in one thread of one process and keep the result."""
    with _lock:
        future = _fetching.get(key)
        is_first = future is None
        if future is None:
            future = _fetching[key] = Future()
    if not is_first:
        return future.result()
    try:
        path = _path(key)
        data = _read(path)
        if data is None:
            with _fetch_lock(path):
                data = _read(path)  # another process may have fetched it while this one waited for the lock
                if data is None:
                    data = fetch()
                    _keep(path, data)
        future.set_result(data)
        return data
    except BaseException as error:
        future.set_exception(error)
        raise
    finally:
        with _lock:
            del _fetching[key]


def prefetch(read: Callable[[], object]) -> None:
    """Call ``read`` in a thread, so that its pieces are on the disk when they are needed; not if none are kept.

    Errors are ignored here: the reader who needs the pieces meets them again.
    """
    global _prefetcher
    if not paths.disk_cache_limit_bytes():
        return
    with _lock:
        _prefetcher = _prefetcher or ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="kd-prefetch")
    _prefetcher.submit(read)


def wait(key: str) -> None:
    """Wait until another process has fetched ``key``, for at most a minute.

    After one wait in vain (the other process died, or the disk is full) this process never waits again.
    """
    global _patience_seconds
    if not paths.disk_cache_limit_bytes():
        return
    path, deadline = _path(key), time.monotonic() + _patience_seconds
    while not os.path.exists(path):  # also False where this user may not look
        if time.monotonic() > deadline:
            _patience_seconds = 0.0
            return
        time.sleep(0.01)


def evict(target_bytes: int) -> None:
    """Delete the least recently used pieces until at most ``target_bytes`` are left."""
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


def _path(key: str) -> Path:
    return paths.disk_cache_folder() / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _fetch_lock(path: Path) -> Iterator[None]:
    """Let one process at a time fetch a piece, if the folder's file system has locks; the others then read it."""
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


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest() != digest:
        return None  # damaged on this disk
    with contextlib.suppress(OSError):
        os.utime(path)  # eviction goes by the time of the last use
    return data


def _keep(path: Path, data: bytes) -> None:
    global _bytes_since_eviction
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
    # Listing the folder for each piece would be slow: evict once per sixteenth of the limit, and leave an eighth free.
    with _lock:
        _bytes_since_eviction += len(data)
        is_due = _bytes_since_eviction > limit // 16
        if is_due:
            _bytes_since_eviction = 0
    if is_due:
        evict(limit - limit // 8)
