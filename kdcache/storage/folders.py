"""Which folders this program may write into, replace or delete: one rule for every command.

    with folders.held(out, folders.RUN):      # one writer per folder; it first repairs what a killed writer left
        ...                                   # every check that can fail
        folders.set_aside(out)                # --overwrite: move the old contents, do not delete them
        ...                                   # write the new contents; an error restores the old ones
        folders.drop(out)                     # delete the old contents

Invariant: a file is deleted only if its name is one that this program writes, in a folder with the marker file of its
kind. A file whose name the kind does not list is foreign: it keeps its folder unchanged, and the error names it.

Contents are moved within the folder itself, to ``.kdcache``. So it can be a mount point, and its lock stays in place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kdcache.errors import KDError, UsageError
from kdcache.storage import Location, lock


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this program writes, recognised by a file that every folder of this kind holds."""

    name: str
    marker: str  # the name of that file
    key: str  # a text that the file contains, because others may have files of the same name
    contents: tuple[str, ...]  # patterns of all paths that are written; ** stands for any number of folders
    results: tuple[str, ...] = ()  # patterns of those paths that took time to compute


_MODEL = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja", "processor_config.json"),
)
_CHECKPOINT = (*_MODEL, "README.md", "*.json", "*.pt", "*.pth", "*.bin", "*.distcp", ".metadata")
_EVALUATION = (
    *("evaluation.json", "comparison.json", "comparison.csv"),
    *("*/model.json", "*/forced.parquet", "*/answers.parquet"),
)
_SHARDS = ("train-*.parquet", "validation-*.parquet", "test-*.parquet")

CACHE = Kind(
    "cache",
    "plan.json",
    '"fingerprint"',
    (
        *("README.md", "manifest.json", "plan.json", "rejected.jsonl", "vocab.parquet", "rewards.parquet"),
        *(f"data/{name}" for name in _SHARDS),
        *(f"set-aside/{name}*" for name in (*_SHARDS, "vocab.parquet", "rewards.parquet", "rejected.jsonl")),
        *(f"set-aside/{name}*" for name in ("plan.json", "manifest.json", "README.md")),
    ),
    results=("data/*", "set-aside/*"),
)
RUN = Kind(
    "run",
    "kdcache.json",
    '"finished"',
    (
        *(*_MODEL, "README.md", "kdcache.json", "run.yaml", "trainer_state.json", "training_args.bin"),
        *(f"adapter/**/{name}" for name in (*_MODEL, "README.md", "adapter_config.json", "kdcache.json", "*.bin")),
        *(f"checkpoint-*/**/{name}" for name in _CHECKPOINT),
        *("runs/**/events.out.tfevents.*", "completions/*.parquet"),
    ),
    results=("*.safetensors", "adapter/**/*", "checkpoint-*/**/*"),
)
STUDENT = Kind("student made by kd init-student", "init-student.json", '"kept"', (*_MODEL, "init-student.json"))
QUANTIZED = Kind(
    "quantized student",
    "quantization.json",
    '"student_weights"',
    (
        *(*_MODEL, "README.md", "quantization.json", "quantization.csv", "quantization_config.json", "recipe.yaml"),
        *(f"evaluation/{name}" for name in _EVALUATION),
    ),
)
EVALUATION = Kind("evaluation", "evaluation.json", '"entries"', _EVALUATION)
COMPARISON = Kind("comparison", "comparison.json", '"interval"', ("comparison.json", "comparison.csv"))
REPORT = Kind("report", "report.json", '"kdcache"', ("report.html", "report.json", "plots/*.csv"))

#: Names that count as no contents: locks, half-written files, contents that were moved, and files of file managers.
_IGNORED = (
    *(".lock", ".lock-*", ".kdcache", ".*.[0-9]*.tmp", ".saving", ".checkpoint-*.discarded"),
    *(".DS_Store", "Thumbs.db"),
)
_HIDDEN = ".kdcache"

# What FOLDER/.kdcache holds at each moment of ``held`` with ``set_aside`` and ``drop``. The last column is what
# ``recover`` does if the process was killed at that moment.
#
#     FOLDER               FOLDER/.kdcache      recover()
#     -------------------  -------------------  -----------------------------------------------------------
#     old contents         (no such folder)     nothing
#     some old files       moving/ the others   moves them back (set_aside was interrupted)
#     (empty)              old/                 moves the old contents back
#     new, no results      old/                 deletes the new contents, and moves the old ones back
#     new, with results    old/                 deletes the old contents: the new ones are worth more
#     new contents         gone/ some old ones  deletes the rest (drop was interrupted)
#
# ``replacing`` writes the new contents into .kdcache first, and swaps them with the old ones when they are complete.
#
#     old contents         new/ incomplete      deletes new/
#     (empty)              new/, old/           moves the old contents back
#     some new files       ready/, old/         moves the other new files up, and deletes the old contents


# --- what a folder is -------------------------------------------------------------------------------------------------


def check_place(folder: Location, flag: str) -> None:
    """UsageError if the folder cannot exist, because it or one of its parents is a file or a broken link."""
    if isinstance(folder, Path):
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            what = "a link that leads nowhere" if nearest.is_symlink() and not nearest.exists() else "a file"
            parent = "" if nearest == folder else f": {nearest}"
            raise UsageError(f"{flag} {folder}{parent} is {what}; expected a folder")


def is_empty(folder: Path) -> bool:
    """Return whether a folder does not exist, or holds nothing but what interrupted writers left."""
    return not _entries(folder)


def holds(folder: Location, kind: Kind) -> bool:
    """Return whether a folder holds the marker of a kind as this program writes it, not just a file of that name."""
    with contextlib.suppress(OSError):
        return kind.key.encode() in (folder / kind.marker).read_bytes()
    return False


def foreign(folder: Location, kind: Kind) -> Location | None:
    """Return the first file or link in a folder that does not belong to the kind; None if all of them do."""
    return next((path for path in _files(folder) if not _is_ours(path, folder, kind)), None)


def has_results(folder: Path, kind: Kind) -> bool:
    """Return whether a folder holds results; without them it was only begun, and may be deleted without loss."""
    return any(_fits(path, folder, kind.results) for path in _files(folder))


def check_deletable(folder: Location, kind: Kind, reads: Iterable[Location | str] = (), flag: str = "--out") -> None:
    """KDError unless a folder is empty, or of this kind without foreign files. UsageError if it contains an input."""
    if not folder.exists():
        return
    if isinstance(folder, Path):
        check_place(folder, flag)
        for read in reads:
            source = Path(str(read))
            if source.exists() and folder.resolve() in (source.resolve(), *source.resolve().parents):
                raise UsageError(f"--overwrite would delete {source}, which is read: it is inside {flag} {folder}")
        if is_empty(folder):
            return
        if folder.is_symlink():
            raise KDError(f"--overwrite: {flag} {folder} is a link to {folder.resolve()}; name the folder itself")
        for name, place in (("your home folder", Path.home()), ("the current folder", Path.cwd())):
            if folder.resolve() in (place.resolve(), *place.resolve().parents):
                raise KDError(
                    f"--overwrite: {flag} {folder} is or holds {name}, which is never deleted; name another folder"
                )
    if not holds(folder, kind):
        raise KDError(
            f"--overwrite: {folder} holds no {kind.name}: it has no {kind.marker} that kdcache wrote. Delete it "
            "yourself if you do not need it"
        )
    if (foreign_file := foreign(folder, kind)) is not None:
        raise KDError(
            f"--overwrite would delete {foreign_file}, which kdcache did not write; move it elsewhere, or delete "
            f"{folder} yourself"
        )


def check_writable(folder: Path, kind: Kind, flag: str = "--out") -> None:
    """KDError if writing a ``kind`` into a folder would replace a file of the same name that kdcache did not write."""
    check_place(folder, flag)
    names = [name for name in kind.contents if Path(name).stem == Path(kind.marker).stem]
    existing = [folder / name for name in names if (folder / name).exists()]
    if existing and not holds(folder, kind):
        raise KDError(f"{existing[0]} would be replaced, and kdcache did not write it; use another {flag}")


# --- writing into it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(folder: Location, kind: Kind, flag: str = "--out") -> Iterator[None]:
    """Hold a folder's lock, or raise a KDError that names its holder. An error inside restores what was set aside."""
    check_place(folder, flag)
    with lock.held(folder):
        recover(folder, kind)
        try:
            yield
        except BaseException as error:
            if recover(folder, kind) and isinstance(error, KeyboardInterrupt):
                raise KDError(f"interrupted before the first result: {folder} holds what it held before", 130) from None
            raise
        drop(folder)


def set_aside(folder: Path) -> None:
    """Move a folder's contents aside. Call ``check_deletable`` before, as ``drop`` will delete them."""
    moving = folder / _HIDDEN / "moving"
    moving.mkdir(parents=True)
    for path in _entries(folder):
        path.rename(moving / path.name)
    moving.rename(moving.with_name("old"))


def drop(folder: Location) -> None:
    """Delete what was set aside, once the new contents have begun."""
    if isinstance(folder, Path) and (folder / _HIDDEN).exists():
        with contextlib.suppress(FileNotFoundError):
            (folder / _HIDDEN / "old").rename(folder / _HIDDEN / "gone")  # so that a part of it is never restored
        shutil.rmtree(folder / _HIDDEN)


@contextlib.contextmanager
def replacing(folder: Path, kind: Kind) -> Iterator[Path]:
    """Yield a folder to write to; then its files replace all contents of ``folder``, which must be of this kind."""
    new = folder / _HIDDEN / "new"
    new.mkdir(parents=True)
    yield new
    check_deletable(folder, kind)  # once more, because writing took time
    set_aside(folder)
    new.rename(new.with_name("ready"))
    _move_up(folder, "ready")
    drop(folder)


def recover(folder: Location, kind: Kind) -> bool:
    """Finish or undo what was interrupted, as drawn above. Return whether contents that were set aside are restored."""
    if not isinstance(folder, Path) or not (folder / _HIDDEN).exists():
        return False
    hidden, restored = folder / _HIDDEN, False
    if (hidden / "ready").exists():
        _move_up(folder, "ready")
    elif (hidden / "old").exists() and not has_results(folder, kind):
        delete(folder, kind)  # the new contents, which have no results
        restored = any((hidden / "old").iterdir())
        _move_up(folder, "old")
    elif (hidden / "moving").exists():
        _move_up(folder, "moving")
    drop(folder)
    return restored


def delete(folder: Path, kind: Kind) -> None:
    """Delete the files of a kind in a folder, and then the folders in it that are empty."""
    for path in list(_files(folder)):
        if _is_ours(path, folder, kind):
            path.unlink()
    for path in sorted(_folders(folder), reverse=True):  # inner folders first
        with contextlib.suppress(OSError):  # it holds a foreign file
            path.rmdir()


def _move_up(folder: Path, name: str) -> None:
    for path in sorted((folder / _HIDDEN / name).iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(folder / path.name)  # config.json last: without it, nobody takes the folder for a complete model
    (folder / _HIDDEN / name).rmdir()


def _entries(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if not any(fnmatchcase(path.name, name) for name in _IGNORED)]


def _files(folder: Location) -> Iterator[Location]:
    """Yield every file and link below a folder. Links are not followed."""
    if not isinstance(folder, Path):
        yield from folder.below()
        return
    for path in sorted(_entries(folder)):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _folders(folder: Path) -> Iterator[Path]:
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            yield path
            yield from _folders(path)


def _is_ours(path: Location, folder: Location, kind: Kind) -> bool:
    """Return whether this program writes a file of this name into a folder of this kind. It never creates links."""
    return not (isinstance(path, Path) and path.is_symlink()) and _fits(path, folder, kind.contents)


def _fits(path: Location, folder: Location, patterns: Iterable[str]) -> bool:
    parts = tuple(str(path).removeprefix(str(folder)).strip("/").split("/"))
    return any(_matches(parts, tuple(pattern.split("/"))) for pattern in patterns)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
