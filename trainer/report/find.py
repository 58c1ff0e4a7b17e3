"""Which folders a report is about: each is sorted by the file that its kind always has.

holds                  is
plan.json              the cache; the first one counts, unless --cache names another
quantization.json      a quantized student
evaluation.json        an evaluation
kdcache.json           a training run
none of these          a folder like data/demo, whose sub-folders are sorted instead, one level deep
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdcache.errors import KDError
from kdcache.storage import Location, folders

#: A quantized student also holds an evaluation, and a folder counts as the first kind that fits.
KINDS = (folders.CACHE, folders.QUANTIZED, folders.EVALUATION, folders.RUN)


@dataclass
class Sources:
    """The folders that a report is about."""

    cache: Location | None
    runs: list[Path] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    quantized: list[Path] = field(default_factory=list)


def find(paths: Sequence[Path], cache: Location | None) -> Sources:
    """Sort folders by what they hold. KDError for one that holds nothing to report on, not even one level deeper."""
    sources = Sources(cache)
    for path in paths:
        reportable = [path] if _kind_of(path) else [folder for folder in _subfolders(path) if _kind_of(folder)]
        if not reportable:
            raise KDError(f"{path} holds no run, no evaluation, no quantized student and no cache to report on")
        for folder in reportable:
            _add(sources, folder)
    return sources


def _kind_of(folder: Path) -> folders.Kind | None:
    return next((kind for kind in KINDS if (folder / kind.marker).is_file()), None)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _add(sources: Sources, folder: Path) -> None:
    """Put a folder where its kind belongs; one that is given twice counts once."""
    kind = _kind_of(folder)
    if kind is folders.CACHE:
        sources.cache = sources.cache or folder
    for of_kind, paths in (
        (folders.QUANTIZED, sources.quantized),
        (folders.EVALUATION, sources.evaluations),
        (folders.RUN, sources.runs),
    ):
        if kind is of_kind and folder not in paths:
            paths.append(folder)
