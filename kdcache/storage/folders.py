"""Which folders this program may write into, replace or delete: one rule for every command.

    with folders.held(out, folders.RUN):      # one writer per folder; what a killed one left half-done is put right
        ...                                   # every check that can fail
        folders.set_aside(out)                # --overwrite: the old contents are moved, not deleted
        ...                                   # the new ones begin; an error puts the old ones back
        folders.drop(out)                     # now the old ones are deleted

Invariant: only files are deleted whose names this program writes, in a folder that holds the marker file of their kind.
A name that no kind lists is somebody else's: the folder is then left as it is, and the name is told.

Contents are moved inside the folder itself (``.kdcache``), so that it can be a mount point, and its lock stays in place.
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
    """A kind of folder: ``marker`` is a file that every one of them has, and ``key`` stands in it."""

    name: str
    marker: str
    key: str
    contents: tuple[str, ...]  # patterns of all paths that are written; ** is any number of folders
    results: tuple[str, ...] = ()  # of those, what took time to make


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

#: What a folder holds besides: locks, half-written files, contents that were moved; and what file managers leave.
_OURS = (
    *(".lock", ".lock-*", ".kdcache", ".*.[0-9]*.tmp", ".saving", ".checkpoint-*.discarded"),
    *(".DS_Store", "Thumbs.db"),
)
_HIDDEN = ".kdcache"


# --- what a folder is -------------------------------------------------------------------------------------------------


def check_place(folder: Location, flag: str) -> None:
    """UsageError if there can be no such folder, because it or one above it is a file."""
    if isinstance(folder, Path):
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            what = "a link that leads nowhere" if nearest.is_symlink() and not nearest.exists() else "a file"
            whose = "" if nearest == folder else f": {nearest}"
            raise UsageError(f"{flag} {folder}{whose} is {what}; expected a folder")


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what interrupted writers left; True if there is none."""
    return not _entries(folder)


def holds(folder: Location, kind: Kind) -> bool:
    """Whether a folder holds the marker of a kind, as this program writes it (not any file of that name)."""
    with contextlib.suppress(OSError):
        return kind.key.encode() in (folder / kind.marker).read_bytes()
    return False


def foreign(folder: Location, kind: Kind) -> Location | None:
    """The first file or link in a folder that is none of the kind's: somebody else's."""
    return next((path for path in _files(folder) if not _is_ours(path, folder, kind)), None)


def has_results(folder: Path, kind: Kind) -> bool:
    """Whether anything is in a folder that took time to make: else it was begun, and nothing would be lost with it."""
    return any(_fits(path, folder, kind.results) for path in _files(folder))


def check_deletable(folder: Location, kind: Kind, reads: Iterable[Location | str] = (), flag: str = "--out") -> None:
    """KDError unless a folder is empty, or all of it is a ``kind`` that this program made and that is not read now."""
    if not folder.exists():
        return
    if isinstance(folder, Path):
        check_place(folder, flag)
        for read in reads:
            where = Path(str(read))
            if where.exists() and folder.resolve() in (where.resolve(), *where.resolve().parents):
                raise UsageError(f"--overwrite would delete {where}, which is read: it is inside {flag} {folder}")
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
            f"--overwrite: {folder} holds no {kind.name}: there is no {kind.marker} in it that kdcache wrote. Delete it yourself "
            "if that is meant"
        )
    if (stranger := foreign(folder, kind)) is not None:
        raise KDError(
            f"--overwrite would delete {stranger}, which kdcache did not write; move it elsewhere, or delete {folder} yourself"
        )


def check_writable(folder: Path, kind: Kind, flag: str = "--out") -> None:
    """KDError if files of a ``kind`` that are written into a folder would replace somebody else's of the same name."""
    check_place(folder, flag)
    names = [name for name in kind.contents if Path(name).stem == Path(kind.marker).stem]
    taken = [folder / name for name in names if (folder / name).exists()]
    if taken and not holds(folder, kind):
        raise KDError(f"{taken[0]} would be replaced, and kdcache did not write it; use another {flag}")


# --- writing into it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(folder: Location, kind: Kind, flag: str = "--out") -> Iterator[None]:
    """Hold a folder's lock; KDError with who has it. What was set aside is put back by an error, and deleted otherwise."""
    check_place(folder, flag)
    with lock.held(folder):
        recover(folder, kind)
        try:
            yield
        except BaseException as error:
            if recover(folder, kind) and isinstance(error, KeyboardInterrupt):
                raise KDError(f"interrupted before it had begun: {folder} holds what it held before", 130) from None
            raise
        drop(folder)


def set_aside(folder: Path) -> None:
    """Move what a folder holds to where ``recover`` finds it and ``drop`` deletes it; check first that it may be deleted."""
    moving = folder / _HIDDEN / "moving"
    moving.mkdir(parents=True)
    for path in _entries(folder):
        path.rename(moving / path.name)
    moving.rename(moving.with_name("old"))


def drop(folder: Location) -> None:
    """Delete what was set aside: the new contents have begun."""
    if isinstance(folder, Path) and (folder / _HIDDEN).exists():
        with contextlib.suppress(FileNotFoundError):
            (folder / _HIDDEN / "old").rename(folder / _HIDDEN / "gone")  # from here on it is not put back in part
        shutil.rmtree(folder / _HIDDEN)


@contextlib.contextmanager
def whole(folder: Path, kind: Kind) -> Iterator[Path]:
    """A folder to write to. Once all is written, its files become those of ``folder``, in place of all that it held."""
    new = folder / _HIDDEN / "new"
    new.mkdir(parents=True)
    yield new
    check_deletable(folder, kind)  # again: that took its time
    set_aside(folder)
    new.rename(new.with_name("ready"))
    _move_up(folder, "ready")
    drop(folder)


def recover(folder: Location, kind: Kind) -> bool:
    """Finish or undo what was interrupted; True if contents that had been set aside are back."""
    if not isinstance(folder, Path) or not (folder / _HIDDEN).exists():
        return False
    hidden, restored = folder / _HIDDEN, False
    if (hidden / "ready").exists():
        _move_up(folder, "ready")
    elif (hidden / "old").exists() and not has_results(folder, kind):
        delete(folder, kind)  # what the new contents had begun with
        restored = any((hidden / "old").iterdir())
        _move_up(folder, "old")
    elif (hidden / "moving").exists():
        _move_up(folder, "moving")
    drop(folder)
    return restored


def delete(folder: Path, kind: Kind) -> None:
    """Delete what is of a kind in a folder, and nothing else."""
    for path in list(_files(folder)):
        if _is_ours(path, folder, kind):
            path.unlink()
    for path in sorted(_folders(folder), reverse=True):  # those inside first
        with contextlib.suppress(OSError):  # something else is in it
            path.rmdir()


def _move_up(folder: Path, name: str) -> None:
    for path in sorted((folder / _HIDDEN / name).iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(folder / path.name)  # the file that makes it a model comes last
    (folder / _HIDDEN / name).rmdir()


def _entries(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if not any(fnmatchcase(path.name, name) for name in _OURS)]


def _files(folder: Location) -> Iterator[Location]:
    """Every file and link below a folder; links are not followed."""
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
    """Whether a file is one of those that this program writes into a folder of this kind. It makes no links."""
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
