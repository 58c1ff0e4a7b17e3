"""Checkpoints of a run: each is saved whole or not at all, and training resumes from the newest whole one.

Trainer writes a checkpoint under its final name, from every rank. ``files.json`` says how far the save came:

    start      files.json {"files": null}      half: the save is under way, or was killed
      |        model, optimizer, scheduler, random state of each rank, trainer_state.json
      v        (all ranks wait for each other; the disk holds every byte)
    complete   files.json {"files": {...}}     whole, as long as every size and checksum in the list holds
      |
      v        only now may older checkpoints be deleted
    discard    .checkpoint-N.discarded         renamed first, so that a kill leaves no half under the old name

A checkpoint without ``files.json`` was saved by an earlier version. It is whole if all that training needs can be read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from kdcache import storage
from kdcache.errors import KDError, first_line
from kdcache.storage import atomic

FILES_FILE = "files.json"
SCRATCH = ".saving"  # where a run's student is written before its files get their names
UNFINISHED = "it was not saved to its end"
_FSDP_WEIGHTS = f"{FSDP_MODEL_NAME}.bin"  # under FSDP, beside the model
_DISCARDED = ".discarded"  # ends the name of a checkpoint that is being deleted


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first, whole or not."""
    paths = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


# --- which checkpoint to resume from ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that training resumes from (None: it starts at step 0), and what the user should know about it.

    ``best`` is the best checkpoint until then, by what was measured; None if there is none or it is not whole.
    """

    checkpoint: Path | None = None
    best: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint)


def resume_point(folder: Path, ranks: int = 1) -> ResumePoint:
    """Return the newest whole checkpoint whose best checkpoint is whole too.

    Failing that, return the newest whole one, with a note. KDError if there are checkpoints, none is whole, and some are
    damaged; checkpoints that a kill left half saved do not count as damaged.
    """
    notes: list[str] = []
    damaged, without_best = False, None
    for checkpoint in listed(folder):
        reason = problem(checkpoint)
        if reason is None:
            best = _best_of(checkpoint)
            reason = problem(best) if best is not None and best != checkpoint else None
            if best is None or reason is None:
                return ResumePoint(checkpoint, best, notes + _note_of_ranks(checkpoint, ranks))
            reason = f"of its best checkpoint, {best.name}, {reason}"
            without_best = without_best or checkpoint
        else:
            damaged = damaged or reason != UNFINISHED
        notes.append(f"{checkpoint.name} is left out: {reason}")
    if without_best is not None:
        notes.append(f"training continues at {without_best.name}; the best is chosen from what is measured after it")
        return ResumePoint(without_best, None, notes + _note_of_ranks(without_best, ranks))
    if damaged:
        raise KDError(
            f"{folder} holds an interrupted run that cannot be continued: {'; '.join(notes)}. Train it anew with --overwrite, "
            "or use another folder"
        )
    return ResumePoint(notes=notes)


def _best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint that was the best when this one was saved."""
    saved = trainer_state(checkpoint)
    if saved.best_global_step:
        return checkpoint.with_name(f"checkpoint-{saved.best_global_step}")
    return checkpoint.with_name(Path(saved.best_model_checkpoint).name) if saved.best_model_checkpoint else None


def _note_of_ranks(checkpoint: Path, ranks: int) -> list[str]:
    """Return a note if the random state of one of these processes was not saved."""
    names = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if all((checkpoint / name).is_file() for name in names):
        return []
    return [
        f"{checkpoint.name} was saved by another number of processes: random numbers (those of dropout) begin anew from --seed"
    ]


# --- whether a checkpoint is whole ------------------------------------------------------------------------------------


def problem(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a checkpoint, or None. Every byte of it is read."""
    if not checkpoint.is_dir():
        return "the folder is missing"
    if is_half(checkpoint):
        return UNFINISHED
    if (checkpoint / FILES_FILE).is_file():
        try:
            files = _files(checkpoint)
        except (OSError, ValueError):
            return f"{FILES_FILE} is damaged"
        for name, (size, checksum) in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if _crc32(path) != checksum:
                return f"{name} was changed after it was saved (its checksum differs)"
    return _missing_part(checkpoint) or _unreadable_part(checkpoint)


def is_half(checkpoint: Path) -> bool:
    """Return whether a save was interrupted. Before there was a list of files, Trainer's state was written last."""
    if (checkpoint / FILES_FILE).is_file():
        with contextlib.suppress(OSError, ValueError):
            return _files(checkpoint) is None
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return False


def _files(checkpoint: Path) -> Any:
    """Return {name: (bytes, checksum)}, or None while the save is not finished. ValueError for anything else."""
    content = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
    try:
        files = content["files"]
        return None if files is None else {name: (int(f["bytes"]), int(f["crc32"])) for name, f in files.items()}
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{FILES_FILE} holds no list of files") from None


def _missing_part(checkpoint: Path) -> str | None:
    """Return which file is missing that Trainer needs: of weights, optimizer, learning rate, random state."""
    names = {path.name for path in checkpoint.iterdir()}
    if not names & {SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, _FSDP_WEIGHTS}:
        return f"{SAFE_WEIGHTS_NAME} is missing"
    if not names & {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN}:
        return f"{OPTIMIZER_NAME} is missing (--save-only-model leaves weights that cannot be trained further)"
    if SCHEDULER_NAME not in names:
        return f"{SCHEDULER_NAME} is missing"
    if not _random_states(names):
        return "rng_state.pth is missing"
    if ADAPTER_SAFE_WEIGHTS_NAME in names and "adapter_config.json" not in names:
        return "adapter_config.json is missing"
    return None


def _unreadable_part(checkpoint: Path) -> str | None:
    """Return which file cannot be read that Trainer needs, and why."""
    names = {path.name for path in checkpoint.iterdir()}
    weights = sorted(names & {SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME})
    name = ""
    try:
        for name in (TRAINER_STATE_NAME, "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME):
            if name in names:
                content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
                weights += sorted(set(content["weight_map"].values())) if name == SAFE_WEIGHTS_INDEX_NAME else []
        name = TRAINER_STATE_NAME
        if trainer_state(checkpoint).global_step != step_of(checkpoint):
            return f"{name} is of another step"
        for name in weights:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        pickles = {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, SCALER_NAME, _FSDP_WEIGHTS} & names
        for name in (*sorted(pickles), *_random_states(names)):
            with safe_globals():  # nothing but tensors and numbers is loaded, as a pickle can hold a program
                torch.load(checkpoint / name, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything in its reader
        return f"{name} cannot be read ({first_line(error)})"
    return None


def _random_states(names: set[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name))


def trainer_state(checkpoint: Path) -> TrainerState:
    """Return what Trainer wrote about a checkpoint: its step, its best checkpoint, what was logged before it."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


# --- writing and deleting, by the one process that does ---------------------------------------------------------------


def start(checkpoint: Path) -> None:
    """Make the folder of a checkpoint, marked as half. Whatever had its name is deleted."""
    discard(checkpoint)
    checkpoint.mkdir(parents=True)
    atomic.write_json(checkpoint / FILES_FILE, {"files": None})


def complete(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files, once the disk holds them."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != FILES_FILE):
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    sync_all(checkpoint)
    atomic.write_json(checkpoint / FILES_FILE, {"files": files})
    storage.sync(checkpoint.parent)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint. Its name goes first, so that a kill leaves no part of it under that name."""
    discarded = checkpoint.with_name(f".{checkpoint.name}{_DISCARDED}")
    shutil.rmtree(discarded, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; the newest and the best stay."""
    checkpoints = listed(folder)
    kept = {checkpoints[0].name, *([Path(best).name] if best else [])}
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    for checkpoint in others[max(limit - len(kept), 0) :] if limit else ():
        discard(checkpoint)


def sweep(folder: Path) -> None:
    """Delete what an interrupted run left half saved in its folder."""
    atomic.remove_leftovers(folder)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    for path in folder.glob(f".checkpoint-*{_DISCARDED}"):
        shutil.rmtree(path, ignore_errors=True)
    for checkpoint in listed(folder):
        if is_half(checkpoint):
            discard(checkpoint)


def sync_all(folder: Path) -> None:
    """Have the disk hold all files below a folder, and their names."""
    for path in (*folder.rglob("*"), folder):
        storage.sync(path)
