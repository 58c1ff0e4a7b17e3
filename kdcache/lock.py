"""One writer a cache: whoever captures holds ``CACHE/.lock``, and a second writer is told who.

The lock is the operating system's (flock): it ends with its process, so a crash leaves none behind. An object store and
some file systems have no such locks; shards get their names whole, so two writers would waste work there, not lose any.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
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
def held(folder: Location) -> Iterator[None]:
    """Hold the folder's lock; KDError with process, machine and time of whoever has it."""
    if not isinstance(folder, Path):
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    descriptor = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # nothing came of it
                folder.rmdir()


def _take(path: Path) -> int:
    """The descriptor of the locked file, which says who we are."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise KDError(
                f"{path.parent} is being written by {_holder(path)}. Wait for it, or use another --out."
            ) from None
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


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['machine']} since {found['since']}"
    except (OSError, ValueError, KeyError):
        return "another process"
