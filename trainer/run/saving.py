"""Save a run's student whole, and turn a full disk into one sentence that says how to go on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdcache import storage
from kdcache.errors import KDError
from kdcache.machine import is_first_rank
from trainer.run.checkpoints import SCRATCH, is_half, listed, sync_all


def size_of(tensors: Any) -> int:
    """Return the bytes of those of ``tensors`` that are tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def whole_student(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Yield a scratch folder to save a student in. At the end its files get their names in ``folder``, config.json last.

    All ranks enter, as a sharded student is gathered from all of them; the first one makes and moves the files.
    """
    scratch = folder / SCRATCH
    with enough_disk(folder, size_bytes):
        if is_first_rank():
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        try:
            yield scratch
            if is_first_rank():
                _move(scratch, folder)
        finally:
            if is_first_rank():
                shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: Path, folder: Path) -> None:
    sync_all(scratch)
    # config.json makes a folder a model, so it must not have its name before the weights have theirs.
    for path in sorted(scratch.rglob("*"), key=lambda path: path.name == "config.json"):
        target = folder / path.relative_to(scratch)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
            storage.sync(target.parent)


@contextlib.contextmanager
def enough_disk(target: Path, size_bytes: int) -> Iterator[None]:
    """Raise KDError if the disk is too full for what is written inside: before it is written, or when it fails.

    ``target``: the checkpoint or the folder that is written. ``size_bytes``: what it needs at least.
    """
    folder = target.parent if target.name.startswith("checkpoint-") else target
    free = storage.free_bytes(folder)
    if size_bytes > free:
        raise _disk_full(
            target, folder, f"it needs at least {size_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there"
        )
    try:
        yield
    except Exception as error:  # tokenizers raises a plain Exception when it cannot write
        text = str(error)
        refused = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # torch's own writer does not hand on why the system refused it.
        if refused or re.search(
            r"No space left|quota exceeded|File too large|PytorchStreamWriter|inline_container", text
        ):
            raise _disk_full(
                target, folder, f"it needs more than the {free / 1e6:,.1f} MB that were free there"
            ) from None
        raise


def _disk_full(target: Path, folder: Path, why: str) -> KDError:
    newest = next((path.name for path in listed(folder) if path != target and not is_half(path)), None)
    where = f"at {newest}" if newest else "at its beginning"
    return KDError(
        f"{target} could not be saved, as the disk is full: {why}. Make room and run the same command again: it continues {where}"
    )
