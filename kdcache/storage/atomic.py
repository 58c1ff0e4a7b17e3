"""Write small files whole: what stands under a name is complete, whatever was interrupted."""

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
    """Delete what writers of this machine that are no longer running left half-written; an upload leaves nothing."""
    if not isinstance(folder, Path):
        return
    for leftover in folder.glob(f".*.{platform.node()}.*.tmp"):
        process = int(leftover.name.split(".")[-2])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except PermissionError:
            pass  # running, as another user


@contextlib.contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """A name to write to; what was written takes the place of ``path``, whole or not at all."""
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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Location, names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Replace a small table atomically; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *lines])
    write_text(path, text.getvalue())


def create_json(path: Location, value: Any) -> bool:
    """Write a file that must not be there yet; False if it was (the first to come wins, whole)."""
    with storage.staged(path) as temporary:
        write_json(temporary, value)
        return storage.create(temporary, path)
