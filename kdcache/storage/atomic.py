"""Write small files atomically: a file under its final name is always complete, even if its writer was killed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcache import storage
from kdcache.storage import Location


def remove_leftovers(folder: Location) -> None:
    """Delete half-written files of processes of this machine that no longer run. On an object store there are none."""
    if not isinstance(folder, Path):
        return
    for leftover in folder.glob(f".*.{platform.node()}.*.tmp"):
        process = int(leftover.name.split(".")[-2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except PermissionError:
            pass  # it runs, as another user


@contextlib.contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """Yield a name to write to; then the complete file replaces ``path``. After an error ``path`` is unchanged."""
    with storage.staged(path) as temporary:
        yield temporary
        storage.replace(temporary, path)


def write_text(path: Location, text: str) -> None:
    """Replace a small file (manifest, plan, card) atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as sink:
        sink.write(text)
        sink.flush()
        os.fsync(sink.fileno())


def write_json(path: Location, value: Any) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Location, names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Replace a small table atomically; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *lines])
    write_text(path, text.getvalue())


def create_json(path: Location, value: Any) -> bool:
    """Write a JSON file atomically. Return False, and change nothing, if another writer created it first."""
    with storage.staged(path) as temporary:
        write_json(temporary, value)
        return storage.create(temporary, path)
