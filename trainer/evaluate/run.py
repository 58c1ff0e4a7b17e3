"""Measure what students kept on a cache's held-out split; the teacher's row comes from the cache, no teacher is loaded.

    kd evaluate before=data/student sft=data/sft kd=data/kd --from-cache data/qwen --out data/evaluation

Each model is measured by itself, sample by sample, into a folder of two Parquet files (``folder.py``): teacher-forced at
the positions of the cache's completions (``positions.py``), and answering the cache's prompts (``answers.py``).
``compare.py`` makes the tables. A model that was measured before with the same settings and weights is not measured again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kdcache.models import identity
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.storage import folders
from trainer.evaluate import answers, positions
from trainer.evaluate import folder as evaluations
from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.folder import COPY, TEACHER, Evaluation, Measurements
from trainer.evaluate.forced import sampled_from
from trainer.evaluate.setup import Setup, check, prepare, teacher_temperature
from trainer.student import generate

_TEACHER, _COPYING = (TEACHER, "cache"), (COPY, "baseline")  # label, and what evaluation.json names as the model


def label_of(argument: str) -> tuple[str, str]:
    """Return (label, model) of ``label=model``; a model without a label is its own."""
    label, equals, model = argument.partition("=")
    return (label, os.path.expanduser(model)) if equals and not Path(argument).exists() else (argument, argument)


def evaluate(config: EvaluateConfig, show: ShowProgress = silent, say: Callable[[str], None] = lambda _: None) -> Path:
    """Measure what is not measured yet, and return the folder, whose evaluation.json names the entries.

    ``say`` gets sentences for the user: how samples are kept apart, and about the engine that generates.
    """
    check(config)
    with folders.held(config.out, folders.EVALUATION):
        folders.check_writable(config.out, folders.EVALUATION)
        setup = prepare(config)
        entries = []
        for label, model in _labelled_models(setup):
            weights = None if label in (TEACHER, COPY) else identity.weights_hash(identity.model_folder(model))
            settings = setup.settings | {"weights": weights}
            entry = evaluations.entry_of(label, model, settings)  # equal settings: the same folder
            if not evaluations.is_measured(config.out, entry):
                evaluations.write_entry(config.out, entry, settings, _measure(setup, label, model, show, say))
            entries.append(entry)
        evaluations.write(Evaluation(config.out, setup.settings, tuple(entries)))
    return config.out


def _labelled_models(setup: Setup) -> list[tuple[str, str]]:
    """Return what is measured, in the order of the table."""
    copying = [_COPYING] if any(answers.baseline(prompt) is not None for prompt in setup.prompts) else []
    return [_TEACHER, *copying, *setup.config.models]


def _measure(setup: Setup, label: str, model: str, show: ShowProgress, say: Callable[[str], None]) -> Measurements:
    if (label, model) == _TEACHER:
        return Measurements(
            positions.of_teacher(setup.units, setup.group_of),
            answers.of_teacher(setup.prompts, teacher_temperature(setup.cache), setup.sandbox),
        )
    if (label, model) == _COPYING:
        # A copy is no model, which could be teacher-forced.
        copied = answers.of_copying(setup.prompts, setup.asks, setup.sandbox)
        return Measurements(positions.FORCED.empty_table(), copied)
    forced = positions.of_student(
        model,
        label,
        setup.units,
        setup.group_of,
        sampled_from(setup.cache),
        setup.config.batch_size,
        setup.config.dtype,
        show,
        say,
    )
    texts = generate.answers(
        model,
        setup.asks,
        setup.decoding,
        setup.engine or "auto",
        lambda count, total: show(Progress(count, total, "answers", label)),
        say,
    )
    return Measurements(forced, answers.judged(setup.prompts, setup.asks, texts, setup.sandbox))
