"""The folder of a run, from before its first step to its end. Every function here writes on the first rank only.

    prepare     find_start    decide where the run starts: at step 0, or at a checkpoint, which is read whole, once
    train       alone         hold the folder's lock; check cheaply that nothing was written since
                begin         set old contents aside, write kdcache.json and run.yaml
                first step    DropOldContents deletes what was set aside: by then most that can go wrong has gone well
                ...           checkpoints
                finish        save the student, then the record with "finished": true

An error before the first step puts the old contents back. A kill at any moment leaves a folder that the same command
resumes (tests/trainer/run/test_checkpoints.py).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from kdcache.cache.format import differing_fields
from kdcache.errors import KDError
from kdcache.machine import is_first_rank
from kdcache.storage import atomic, folders
from trainer.run import checkpoints, parallel
from trainer.run.checkpoints import ResumePoint
from trainer.run.record import CONFIG_FILE, RUN_FILE
from trainer.run.saving import enough_disk, size_of, whole_student
from trainer.student import lora as adapters
from trainer.student.config import StudentConfig

Settings = Callable[[dict[str, Any]], dict[str, Any]]  # of a record: what must be the same for a run to resume


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a checkpoint or at step 0."""

    point: ResumePoint = field(default_factory=ResumePoint)
    traces: frozenset[Any] = frozenset()  # of the folder, just before the checkpoint was read
    find_again: Callable[[], Start] | None = field(default=None, repr=False)

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that the run resumes from; None if it starts at step 0."""
        return self.point.path

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know about where the run starts."""
        return self.point.notes


class ResolvedRun(Protocol):
    """What this module needs of a run: of ``kd train``'s and of ``kd grpo``'s."""

    @property
    def config(self) -> StudentConfig: ...
    @property
    def record(self) -> dict[str, Any]: ...
    @property
    def start(self) -> Start: ...


# --- before the first step --------------------------------------------------------------------------------------------


def find_start(config: StudentConfig, record: dict[str, Any], settings: Settings, command: str) -> Start:
    """Return where a run starts. Every byte of the checkpoint is read, so that only the first rank does this.

    The other ranks learn it from the first one, see ``agreed_point``. KDError if the folder holds anything but an
    interrupted run of ``command`` whose ``settings`` are those of ``record``.
    """
    if not is_first_rank():
        return Start()
    traces = _traces(config.output_dir)  # taken first: whatever is written during the reading then shows
    point = _find_point(config, record, settings, command)
    return Start(point, traces, partial(find_start, config, record, settings, command))


def agreed_point(run: ResolvedRun) -> ResumePoint:
    """Return the checkpoint that all ranks resume from, once their process group has started."""
    point: ResumePoint = parallel.from_first_rank(run.start.point)
    return point


def _find_point(config: StudentConfig, record: dict[str, Any], settings: Settings, command: str) -> ResumePoint:
    folder = config.output_dir
    if config.overwrite or folders.is_empty(folder):
        return ResumePoint()
    records = [place / RUN_FILE for place in (folder, *checkpoints.listed(folder))]
    path = next((path for path in records if path.is_file()), None)
    if path is None:
        raise KDError(f"--output-dir {folder} is not empty and holds no run of {command}; use another")
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        finished, old_settings = old.get("finished"), settings(old)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise KDError(
            f"{path} is damaged: it holds no record of a run; use another --output-dir, or --overwrite"
        ) from None
    if finished:
        raise KDError(f"--output-dir {folder} holds a finished run; use another, or --overwrite")
    differing = differing_fields(old_settings, settings(record))
    if differing and folders.has_results(folder, folders.RUN):  # without results there is nothing to lose
        raise KDError(
            f"--output-dir {folder} holds an interrupted run with other settings (old -> new):\n  "
            + "\n  ".join(differing)
            + "\nUse the same settings to continue it, another folder, or --overwrite."
        )
    return checkpoints.resume_point(folder, parallel.processes())


def _traces(folder: Path) -> frozenset[Any]:
    """Return what would differ if another run had written its results to a folder. No result is read for this.

    It is (path, bytes, time of change) of every result, and whether the record says that the run is finished.
    """
    traces: set[Any] = set()
    for place in (*checkpoints.listed(folder), folder / adapters.FOLDER, *folder.glob("*.safetensors")):
        with contextlib.suppress(FileNotFoundError):  # deleted by another process just now: the next look shows it
            for path in (place, *place.rglob("*")):
                status = path.stat()
                traces.add((str(path), status.st_size, status.st_mtime_ns))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        finished = json.loads((folder / RUN_FILE).read_text(encoding="utf-8")).get("finished")
        traces.add(("finished", bool(finished)))
    return frozenset(traces)


@contextlib.contextmanager
def alone(run: ResolvedRun) -> Iterator[None]:
    """Hold the lock of a run's folder while it trains. KDError if another process holds it, or wrote there meanwhile.

    ``find_start`` ran before the lock was held. Its answer stands if the folder still looks as it did; else it is found
    again, and must be the same.
    """
    if not is_first_rank():  # the first rank holds the lock for all that torchrun started
        yield
        return
    folder, start = run.config.output_dir, run.start
    with folders.held(folder, folders.RUN, "--output-dir"):
        find_again = None if _traces(folder) == start.traces else start.find_again
        if find_again is not None and find_again().point != start.point:
            raise KDError(f"another process wrote to --output-dir {folder} just now; run the same command again")
        yield


def check_deletable(config: StudentConfig) -> None:
    """Raise KDError unless --overwrite may delete all that the folder holds."""
    folders.check_deletable(config.output_dir, folders.RUN, [config.student, *config.from_cache], flag="--output-dir")


def begin(run: ResolvedRun) -> None:
    """Write the record and the options of a run, once everything that can fail has been tried; set old contents aside.

    A run that starts at step 0 in a folder of its own sets aside what a start left that failed before its first checkpoint.
    """
    if not is_first_rank():
        return
    config, folder = run.config, run.config.output_dir
    if config.overwrite:
        check_deletable(config)  # once more: loading the student took a while
    if run.start.point.checkpoint is None and (config.overwrite or folders.foreign(folder, folders.RUN) is None):
        folders.set_aside(folder)
    with enough_disk(folder, 0):
        atomic.write_json(folder / RUN_FILE, run.record)
        atomic.write_text(folder / CONFIG_FILE, config.as_yaml())
    checkpoints.sweep(folder)


class DropOldContents(TrainerCallback):
    """Deletes what ``begin`` set aside, once the first step is trained."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if is_first_rank():
            folders.drop(Path(args.output_dir))


# --- after the last step ----------------------------------------------------------------------------------------------


def finish(
    run: ResolvedRun,
    trainer: Any,
    plan: dict[str, Any],
    files: Mapping[str, str] | None = None,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Save a trained student whole, for transformers and vLLM to load, with its history; the record comes last.

    All ranks call this, as a sharded student is gathered from all of them. ``plan``: of the cache, which says how prompts
    are rendered and answers end. ``files``: further texts beside the student. ``entries``: further entries of the record.
    """
    config, out = run.config, run.config.output_dir
    adapted = config.lora_r is not None
    with whole_student(out, size_of(trainer.model.parameters())) as scratch:
        trainer.save_model(str(scratch / adapters.FOLDER if adapted else scratch))
        if is_first_rank():
            if adapted:
                adapters.merge(config, scratch / adapters.FOLDER, scratch, plan)
            trainer.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
            for name, text in (files or {}).items():
                (scratch / name).write_text(text, encoding="utf-8")
    if is_first_rank():
        with enough_disk(out, 0):
            atomic.write_json(out / RUN_FILE, {**run.record, "finished": True, **(entries or {})})
    trainer.accelerator.wait_for_everyone()
