"""`kd evaluate` measures students on a cache's held-out split, beside the teacher."""

from __future__ import annotations

from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import ProgressLine, note, note_device, print_table, warn_of_unsafe
from kdcache.commands.options import NAME_OR_PATH, config_from, json_option, options_of, trust_option
from kdcache.printable import json_text
from trainer.evaluate.config import EvaluateConfig


@click.command("evaluate")
@click.argument("models", nargs=-1, required=True, type=NAME_OR_PATH)
@options_of(EvaluateConfig)
@trust_option
@json_option
def evaluate(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure students on a cache's held-out split.

    The table also has a row for the teacher, which comes from the cache.
    A model is a folder or a Hub id, or LABEL=MODEL. Models of one label count as its runs, one per training seed.

    \b
    teacher-forced   kl to the teacher in nats per token, agreement with its best token, ce (cross-entropy), ece
    answers          rougeL, chrF and exact against the reference, rougeL_teacher against the teacher's answer
    programs         pass@K by the row's verifier, which runs the tests
    docs/evaluation.md says how each is computed.

    \b
    kd evaluate data/student data/sft data/kd --from-cache data/cache
    kd evaluate before=data/student kd=data/kd-0 kd=data/kd-1 --from-cache data/cache --temperature 1
    kd compare data/evaluation
    """
    quiet.libraries()
    from trainer.evaluate import compare
    from trainer.evaluate import run as evaluation

    warn_of_unsafe(options["unsafe_exec"])
    config = config_from(EvaluateConfig, options, models=tuple(map(evaluation.label_of, models)))
    note_device()
    with ProgressLine() as line:
        out = evaluation.evaluate(config, line.show, note)
    rows = compare.rows([out])
    if as_json:
        click.echo(json_text([row.as_json() for row in rows], indent=2))
    else:
        print_table(*compare.wide(rows))
        note(f"intervals and retention: kd compare {out}")
