"""One writer per folder: whoever writes a cache, a run or a student holds ``FOLDER/.lock``; a second writer is told who.

The slices of one plan (``--plan-slice``) write at the same time: they share that lock, so that nobody else writes, and
each holds one of its own, ``.lock-I-of-N``.

The lock is the operating system's (flock): it ends with its process, so a crash leaves none behind. An object store and
some file systems have no such locks; shards get their names whole, so two writers would waste work there, not lose any.
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
    """Hold a lock of the folder; KDError with process, machine and time of whoever has it, or ``wait`` for it."""
    if not isinstance(folder, Path):
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / name
    descriptor = _take(path, shared, wait)
    try:
        yield
    finally:
        if not shared or _nobody_else_has(descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something came of it
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def held_slice(folder: Location, index: int, count: int) -> Iterator[None]:
    """Hold slice ``index`` of ``count``; KDError if another process has it, or has the whole folder."""
    with held(folder, shared=True), held(folder, f".lock-{index}-of-{count}"):
        yield


def _take(path: Path, shared: bool, wait: bool) -> int:
    """The descriptor of the locked file, which says who we are (of those that share it, who came last)."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process made the folder, and removed it again, between our two lines
        try:
            if fcntl is not None:
                how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
                fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            part = re.fullmatch(r"\.lock-(\d+)-of-(\d+)", path.name)
            what = f"slice {part[1]}/{part[2]} of {path.parent}" if part else path.parent
            way_out = f"Wait for it, or {'take another slice' if part else 'use another folder'}."
            raise KDError(f"{what} is being written by {_holder(path)}. {way_out}") from None
        except OSError:
            pass  # no such locks here
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # it was given up, and its file deleted, between our opening and our locking it
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"process": os.getpid(), "machine": platform.node(), "since": now}).encode())
    return descriptor


def _nobody_else_has(descriptor: int) -> bool:
    """Whether a shared lock, which is given up here, was the last one."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no such locks here
    return True


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['machine']} since {found['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
