"""One writer per folder: who writes a cache, a run or a student holds ``FOLDER/.lock``, and a second writer is refused.

The slices of one plan (``--plan-slice``) write at the same time, with two locks each:

    .lock            shared by all slices, exclusive for any other writer
    .lock-I-of-N     exclusive: one process per slice

The lock is the operating system's (flock), which releases it when its process ends, even by a crash. Object stores and
some file systems have no such locks. Two writers would waste work there but lose none, because a file gets its name
only when it is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from kdcache.errors import KDError
from kdcache.storage import Location

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def held(folder: Location, name: str = ".lock", shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock of the folder. If another process holds it, ``wait``, or raise a KDError that names the process."""
    if not isinstance(folder, Path):
        yield
        return
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / name
    descriptor = _acquire(path, shared, wait)
    try:
        yield
    finally:
        if not shared or _is_last_holder(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for empty in created:
                empty.rmdir()


@contextlib.contextmanager
def held_slice(folder: Location, index: int, count: int) -> Iterator[None]:
    """Hold slice ``index`` of ``count``. KDError if another process holds that slice or the whole folder."""
    with held(folder, shared=True), held(folder, f".lock-{index}-of-{count}"):
        yield


def _acquire(path: Path, shared: bool, wait: bool) -> int:
    """Return the descriptor of the locked file, after writing this process into it (the last one, if it is shared)."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process removed the folder between the two calls
        try:
            if fcntl is not None:
                operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
                fcntl.flock(descriptor, operation)
        except BlockingIOError:
            os.close(descriptor)
            part = re.fullmatch(r"\.lock-(\d+)-of-(\d+)", path.name)
            what = f"slice {part[1]}/{part[2]} of {path.parent}" if part else path.parent
            way_out = f"Wait for it, or {'write another slice' if part else 'use another folder'}."
            raise KDError(f"{what} is being written by {_holder(path)}. {way_out}") from None
        except OSError:
            pass  # this file system has no locks
        # The last holder may have deleted the file after it was opened here. A lock on a deleted file protects nothing.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"process": os.getpid(), "machine": platform.node(), "since": since}).encode())
    return descriptor


def _is_last_holder(descriptor: int) -> bool:
    """Return whether no other process shares the lock, by trying to make it exclusive."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # this file system has no locks
    return True


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']} since {holder['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
