"""Checkpoints of a run: each is saved whole or not at all, and training goes on from the newest whole one.

Trainer writes a checkpoint under its final name, from every rank. ``files.json`` says how far it came: it is the first
file, without a list, and is replaced at the very end, once all ranks have written and the disk holds everything, by a list
of the other files with sizes and checksums. A checkpoint is whole if it has that list and the list holds; nothing older is
deleted before. One without ``files.json`` is of an earlier version, and whole if all that training needs can be read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import safe_open
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from kdcache import storage
from kdcache.errors import KDError, first_line
from kdcache.storage import atomic

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # the class stands before Trainer, or before TRL's, in a class of both

FILES_FILE = "files.json"
SCRATCH = ".saving"  # where a run's student is written before its files get their names
UNFINISHED = "it was not saved to its end"
_FSDP_WEIGHTS = f"{FSDP_MODEL_NAME}.bin"  # under FSDP, beside the model
_DISCARDED = ".discarded"  # ends the name of a checkpoint that is being deleted


# --- which checkpoint to go on from -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resume:
    """The checkpoint that training goes on from (None: it begins anew), and what the user is to know about it."""

    checkpoint: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> str | None:
        return None if self.checkpoint is None else str(self.checkpoint)


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, whole or not."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def to_continue(folder: Path, ranks: int = 1) -> Resume:
    """The newest whole checkpoint whose best one is whole too; failing that the newest whole one, which is then noted.

    KDError if there are checkpoints, none is whole, and some are so by damage. Those that a kill left half do not count.
    """
    notes: list[str] = []
    damaged, without_best = False, None
    for checkpoint in listed(folder):
        reason = problem(checkpoint)
        if reason is None:
            best = _best_of(checkpoint)
            reason = problem(best) if best is not None and best != checkpoint else None
            if best is None or reason is None:
                return Resume(checkpoint, notes + _note_of_ranks(checkpoint, ranks))
            reason = f"of its best checkpoint, {best.name}, {reason}"
            without_best = without_best or checkpoint
        else:
            damaged = damaged or reason != UNFINISHED
        notes.append(f"{checkpoint.name} is left out: {reason}")
    if without_best is not None:
        notes.append(f"training continues at {without_best.name}; the best is chosen from what is measured after it")
        return Resume(without_best, notes + _note_of_ranks(without_best, ranks))
    if damaged:
        raise KDError(
            f"{folder} holds an interrupted run that cannot be continued: {'; '.join(notes)}. Train it anew with --overwrite, "
            "or use another folder"
        )
    return Resume(None, notes)


def _best_of(checkpoint: Path) -> Path | None:
    """The checkpoint that was the best when this one was saved."""
    state = _state(checkpoint)
    if state.best_global_step:
        return checkpoint.with_name(f"checkpoint-{state.best_global_step}")
    return checkpoint.with_name(Path(state.best_model_checkpoint).name) if state.best_model_checkpoint else None


def _note_of_ranks(checkpoint: Path, ranks: int) -> list[str]:
    """What to say if the random state of each of these processes was not saved."""
    wanted = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if all((checkpoint / name).is_file() for name in wanted):
        return []
    return [
        f"{checkpoint.name} was saved by another number of processes: random numbers (those of dropout) begin anew from --seed"
    ]


def problem(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint, or None. Every byte of it is read."""
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
    return _unreadable(checkpoint)


def is_half(checkpoint: Path) -> bool:
    """Whether saving it was interrupted. Before there was a list of files, Trainer's state was written last."""
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
    """{name: (bytes, checksum)}, or None while the checkpoint is not finished. ValueError for what is neither."""
    found = json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8"))
    try:
        files = found["files"]
        return None if files is None else {name: (int(f["bytes"]), int(f["crc32"])) for name, f in files.items()}
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{FILES_FILE} holds no list of files") from None


def _unreadable(checkpoint: Path) -> str | None:
    """What is missing or cannot be read of what Trainer needs: weights, optimizer, learning rate, random state, its own state."""
    names = {path.name for path in checkpoint.iterdir()}
    weights = sorted(names & {SAFE_WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME})
    if not weights and not names & {SAFE_WEIGHTS_INDEX_NAME, _FSDP_WEIGHTS}:
        return f"{SAFE_WEIGHTS_NAME} is missing"
    if not names & {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN}:
        return f"{OPTIMIZER_NAME} is missing (--save-only-model leaves weights that cannot be trained further)"
    if SCHEDULER_NAME not in names:
        return f"{SCHEDULER_NAME} is missing"
    states = sorted(name for name in names if re.fullmatch(r"rng_state(_\d+)?\.pth", name))
    if not states:
        return "rng_state.pth is missing"
    if ADAPTER_SAFE_WEIGHTS_NAME in names and "adapter_config.json" not in names:
        return "adapter_config.json is missing"
    name = ""
    try:
        for name in (TRAINER_STATE_NAME, "adapter_config.json", SAFE_WEIGHTS_INDEX_NAME):
            if name in names:
                content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
                weights += sorted(set(content["weight_map"].values())) if name == SAFE_WEIGHTS_INDEX_NAME else []
        name = TRAINER_STATE_NAME
        if _state(checkpoint).global_step != step_of(checkpoint):
            return f"{name} is of another step"
        for name in weights:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        tensors = {OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, SCALER_NAME, _FSDP_WEIGHTS} & names
        for name in (*sorted(tensors), *states):
            with safe_globals():  # never anything but tensors and numbers: a pickle can hold a program
                torch.load(checkpoint / name, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file does to its reader
        return f"{name} cannot be read ({first_line(error)})"
    return None


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


# --- leftovers --------------------------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Delete what an interrupted run left half-made in its own folder; for the one process that writes there."""
    atomic.remove_leftovers(folder)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    for path in folder.glob(f".checkpoint-*{_DISCARDED}"):
        shutil.rmtree(path, ignore_errors=True)
    for checkpoint in listed(folder):
        if is_half(checkpoint):
            _discard(checkpoint)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint: first its name, so that a kill leaves no part of it under that name."""
    discarded = checkpoint.with_name(f".{checkpoint.name}{_DISCARDED}")
    shutil.rmtree(discarded, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def _rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``; the newest and the best stay."""
    checkpoints = listed(folder)
    kept = {checkpoints[0].name, *([Path(best).name] if best else [])}
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    for checkpoint in others[max(limit - len(kept), 0) :] if limit else ():
        _discard(checkpoint)


# --- saving -----------------------------------------------------------------------------------------------------------


class WholeCheckpoints(Base):
    """What stands before Trainer in a class of both: its checkpoints are whole, and models keep their own ``use_cache``."""

    def __init__(self, *args: Any, **kwargs: Any):
        config = getattr(kwargs["model"], "config", None)
        self._use_cache = getattr(config, "use_cache", None)  # Trainer sets it to False, for training
        super().__init__(*args, **kwargs)
        self._whole_step: int | None = None  # of the last whole checkpoint
        self._ended = False  # where the checkpoint that training continues at was the last one
        self.add_callback(_Begin(self))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._ended:
            self.control.should_training_stop = True  # Trainer looks at it after a step, and there is none left
            return
        super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._whole_step == self.state.global_step:
            return  # nothing was trained since
        folder = Path(str(self.args.output_dir))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        writes, limit = self.args.should_save, self.args.save_total_limit
        self.args.save_total_limit = None  # Trainer would delete older ones before this one is whole
        try:
            with saving(checkpoint, self._checkpoint_bytes()):
                if writes:
                    _discard(checkpoint)
                    checkpoint.mkdir(parents=True)
                    atomic.write_json(checkpoint / FILES_FILE, {"files": None})
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if writes:
                    _finish(checkpoint)
        except BaseException:
            if writes and is_half(checkpoint):
                _discard(checkpoint)
            raise
        finally:
            self.args.save_total_limit = limit
        self._whole_step = self.state.global_step
        if writes:
            _rotate(folder, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        config = getattr(self.model, "config", None)
        if config is None or self._use_cache is None:
            super()._save(output_dir, state_dict)
            return
        config.use_cache, training = self._use_cache, config.use_cache
        try:
            super()._save(output_dir, state_dict)
        finally:
            config.use_cache = training

    def _checkpoint_bytes(self) -> int:
        """At least: the weights that are saved, and what the optimizer remembers of them."""
        model: Any = self.model
        optimizer: Any = self.optimizer
        weights = [p for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config")]
        remembered = [] if self.args.save_only_model else [s for s in optimizer.state.values() if isinstance(s, dict)]
        return size_of(weights) * (2 if self.is_fsdp_enabled else 1) + sum(size_of(s.values()) for s in remembered)


class _Begin(TrainerCallback):
    """What Trainer does not see for itself in the checkpoint that training continues at.

    The best checkpoint is found by its step, as a run's folder may have been moved. A run that was interrupted after its
    last step has only its student to save.
    """

    def __init__(self, trainer: WholeCheckpoints):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._whole_step = state.global_step
        stopping = [c for c in self.trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        impatient = any(c.early_stopping_patience_counter >= c.early_stopping_patience for c in stopping)
        self.trainer._ended = impatient or 0 < state.max_steps <= state.global_step
        if not state.best_global_step:
            return
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if problem(best) is None:
            state.best_model_checkpoint = str(best)
        else:  # the user was told, see to_continue
            state.best_global_step = state.best_model_checkpoint = state.best_metric = None


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def _finish(checkpoint: Path) -> None:
    """Write the list of a checkpoint's files, once the disk holds them."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != FILES_FILE):
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    sync(checkpoint)
    atomic.write_json(checkpoint / FILES_FILE, {"files": files})
    storage.sync(checkpoint.parent)


def sync(folder: Path) -> None:
    """Have the disk hold all files below a folder, and their names."""
    for path in (*folder.rglob("*"), folder):
        storage.sync(path)


@contextlib.contextmanager
def whole_student(folder: Path, size: int, writes: bool) -> Iterator[Path]:
    """A folder to save a run's student in; its files then get their names in ``folder``, each whole, config.json last.

    Of several ranks only the one that ``writes`` makes and moves anything.
    """
    scratch = folder / SCRATCH
    with saving(folder, size):
        if writes:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        try:
            yield scratch
            if writes:
                _move(scratch, folder)
        finally:
            if writes:
                shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: Path, folder: Path) -> None:
    sync(scratch)
    for path in sorted(scratch.rglob("*"), key=lambda path: path.name == "config.json"):
        target = folder / path.relative_to(scratch)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            os.replace(path, target)
            storage.sync(target.parent)


@contextlib.contextmanager
def saving(what: Path, size: int) -> Iterator[None]:
    """Turn a disk that is full, now or halfway, into a KDError that says what is needed and how to go on.

    ``size``: the bytes that are needed at least. They are looked for before anything is written.
    """
    folder = what.parent if what.name.startswith("checkpoint-") else what
    free = storage.free_bytes(folder)
    if size > free:
        raise _disk_full(
            what, folder, f"it needs at least {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there"
        )
    try:
        yield
    except Exception as error:  # tokenizers raise no other class for it
        text = str(error)
        refused = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # torch's own writer does not hand on why the system refused it.
        if refused or re.search(
            r"No space left|quota exceeded|File too large|PytorchStreamWriter|inline_container", text
        ):
            raise _disk_full(
                what, folder, f"it needs more than the {free / 1e6:,.1f} MB that were free there"
            ) from None
        raise


def _disk_full(what: Path, folder: Path, why: str) -> KDError:
    earlier = listed(folder) if folder.is_dir() else []
    newest = next((path.name for path in earlier if path != what and not is_half(path)), None)
    where = f"at {newest}" if newest else "at its beginning"
    return KDError(
        f"{what} could not be saved, as the disk is full: {why}. Make room and run the same command again: it continues {where}"
    )
