"""forced.parquet: each model at the positions of the cache's completions, one row per sample, summed over its positions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache import machine
from kdcache.cache.reader import Sample
from kdcache.errors import KDError
from kdcache.progress import Progress, ShowProgress
from trainer.data.select import Selection
from trainer.evaluate import metrics
from trainer.evaluate.forced import at_positions
from trainer.evaluate.metrics import PositionScores
from trainer.loss.head import head_of
from trainer.student.attention import PER_SAMPLE, layers_of
from trainer.student.load import load_student

TEACHER_BATCH = 256  # samples of which the teacher's own row is made at once

_SUMS = (*metrics.POSITION_SUMS, *metrics.SUMS_BY_ENTROPY)
FORCED = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("sample_id", "group_id")),
        *(pa.field(s.name, pa.list_(pa.float64(), s.buckets) if s.bucket else pa.float64()) for s in _SUMS),
    ]
)


def of_student(
    model: str,
    label: str,
    units: Selection,
    group_of: Mapping[str, str],
    captured: int | None,
    batch_size: int,
    dtype: str,
    show: ShowProgress,
    say: Callable[[str], None],
) -> pa.Table:
    """Return a student's rows. ``captured`` is as ``forced.sampled_from`` gives it; KL is to the cells that were captured.

    ``say`` gets a sentence for the user if the student is measured in a slower way than attention per sample.
    """
    student, _ = load_student(model, dtype)
    student.to(machine.torch_device()).eval()
    layers, head, rows = layers_of(student), head_of(student), []
    if layers.way != PER_SAMPLE:
        say(f"{label}: {layers.note}")
    for samples in _batches(units, batch_size, ("entropies",)):
        readings = at_positions(layers, head, samples, captured)  # of all samples together
        ends = np.cumsum([sample.supervised.sum() for sample in samples])
        for sample, first, end in zip(samples, [0, *ends[:-1]], ends):
            part = slice(first, end)
            of_sample = PositionScores(
                entropy=_supervised(sample, "entropies"),
                kl=readings.kl[part].astype(np.float64),
                agreement=readings.agreement[part].astype(np.float64),
                ce=-readings.logprobs[part].astype(np.float64),
                confidence=readings.confidence[part].astype(np.float64),
                right=readings.right[part].astype(np.float64),
            )
            rows.append(_row(sample, group_of, of_sample))
        show(Progress(len(rows), len(units), "samples", label))
    del student, layers, head
    gc.collect()  # its memory is needed for the engine that generates
    return pa.Table.from_pylist(rows, FORCED)


def of_teacher(units: Selection, group_of: Mapping[str, str]) -> pa.Table:
    """Return the teacher's own rows, from its cached log-probabilities: it is loaded nowhere."""
    rows = []
    for samples in _batches(units, TEACHER_BATCH, ("entropies", "token_logprobs")):
        for sample in samples:
            best, confidence = _first_candidates(sample)
            positions = sample.supervised
            scores = PositionScores(
                entropy=_supervised(sample, "entropies"),
                kl=np.zeros(positions.sum()),
                agreement=np.ones(positions.sum()),
                ce=-_supervised(sample, "token_logprobs"),
                confidence=confidence[positions],
                right=(best == sample.completion_ids)[positions].astype(np.float64),
            )
            rows.append(_row(sample, group_of, scores))
    return pa.Table.from_pylist(rows, FORCED)


def _batches(units: Selection, size: int, columns: tuple[str, ...]) -> Iterator[list[Sample]]:
    for first in range(0, len(units), size):
        yield units.load(np.arange(first, min(first + size, len(units))), columns)


def _supervised(sample: Sample, column: str) -> np.ndarray:
    """Return one of a sample's TOKEN_COLUMNS at its supervised positions, float64."""
    return np.array(getattr(sample, column), dtype=np.float64)[sample.supervised]


def _first_candidates(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Return the teacher's choice at each of T positions and its probability; -1 and 0 where there is no candidate."""
    candidates = sample.candidates
    best, confidence = np.full(len(candidates), -1), np.zeros(len(candidates))
    has_any = candidates.counts > 0
    first = candidates.starts[has_any]
    best[has_any], confidence[has_any] = candidates.ids[first], np.exp(candidates.logprobs[first])
    return best, confidence


def _row(sample: Sample, group_of: Mapping[str, str], scores: PositionScores) -> dict[str, Any]:
    """Return the row of one sample in the layout of FORCED. KDError (exit 3) for a value that is no number."""
    for name, values in (
        ("the teacher's entropy", scores.entropy),
        ("the KL", scores.kl),
        ("the cross-entropy", scores.ce),
    ):
        if not np.isfinite(values).all():
            position = int(np.flatnonzero(~np.isfinite(values))[0])
            raise KDError(
                f"sample {sample.sample_id}: {name} at its supervised position {position} is {values[position]}", 3
            )
    row: dict[str, Any] = {"sample_id": sample.sample_id, "group_id": group_of[sample.sample_id]}
    return row | {part.name: part.of(scores) for part in _SUMS}
