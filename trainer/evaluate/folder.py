"""The folder that `kd evaluate` writes and that `kd compare` and `kd report` read.

OUT/evaluation.json          settings, and the label, model and folder of each entry; written last
OUT/NAME-HASH/               one entry: a model, the teacher or the copied input
  forced.parquet             one row per sample, summed over its positions
  answers.parquet            one row per answer, with its scores
  model.json                 label, model and settings; written last, so that a folder with it is whole
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import hashing
from kdcache.errors import KDError
from kdcache.storage import atomic, folders

TEACHER, COPY = "teacher (cache)", "copy the input"  # labels of entries that no model is behind
EVALUATION_FILE = folders.EVALUATION.marker


@dataclass(frozen=True)
class Entry:
    """One measured model, as evaluation.json lists it."""

    label: str
    model: str
    folder: str  # inside the evaluation's


@dataclass(frozen=True)
class Evaluation:
    """An evaluation on disk."""

    path: Path
    settings: dict[str, Any]
    entries: tuple[Entry, ...]

    def measurements(self, entry: Entry) -> Measurements:
        folder = self.path / entry.folder
        return Measurements(pq.read_table(folder / "forced.parquet"), pq.read_table(folder / "answers.parquet"))


@dataclass(frozen=True)
class Measurements:
    """What was measured of one model: a row per sample, and a row per answer."""

    forced: pa.Table
    answers: pa.Table


def read(path: Path) -> Evaluation:
    """Read evaluation.json of a folder. KDError if it holds none."""
    file = path / EVALUATION_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        inside = path / "evaluation"
        hint = f"is {inside} meant?" if (inside / EVALUATION_FILE).is_file() else "make one with: kd evaluate"
        raise KDError(f"{path} holds no evaluation (no {EVALUATION_FILE}); {hint}") from None
    except ValueError as error:
        raise KDError(f"{file} is damaged ({error}); run the same kd evaluate command again") from None
    return Evaluation(path, content["settings"], tuple(Entry(**entry) for entry in content["entries"]))


def write(evaluation: Evaluation) -> None:
    """Write evaluation.json; the folders of its entries are there already."""
    entries = [asdict(entry) for entry in evaluation.entries]
    atomic.write_json(evaluation.path / EVALUATION_FILE, {"settings": evaluation.settings, "entries": entries})


def entry_of(label: str, model: str, settings: dict[str, Any]) -> Entry:
    """Return the entry whose folder's name holds a hash of the model and of everything that it is measured with."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name if label == model else label).strip("-.") or "model"
    return Entry(label, model, f"{slug}-{hashing.of_json(settings | {'model': model})[:8]}")


def is_measured(out: Path, entry: Entry) -> bool:
    return (out / entry.folder / "model.json").is_file()


def write_entry(out: Path, entry: Entry, settings: dict[str, Any], measurements: Measurements) -> None:
    """Write an entry's folder, model.json last."""
    folder = out / entry.folder
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(measurements.forced, folder / "forced.parquet", compression="zstd")
    pq.write_table(measurements.answers, folder / "answers.parquet", compression="zstd")
    atomic.write_json(folder / "model.json", {"label": entry.label, "model": entry.model, "settings": settings})
