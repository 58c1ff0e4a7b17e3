"""`kd evaluate` measures students on a cache's held-out split, beside the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import ProgressLine, note, note_device, print_table, warn_of_unsafe
from kdcache.commands.options import (
    CONTEXT,
    NAME_OR_PATH,
    PATH,
    from_cache_option,
    json_option,
    max_length_option,
    trust_option,
    unsafe_option,
    where_option,
)
from kdcache.printable import json_text
from kdcache.progress import Progress


@click.command("evaluate", context_settings=CONTEXT)
@click.argument("models", nargs=-1, required=True, type=NAME_OR_PATH)
@from_cache_option
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@where_option
@max_length_option
@click.option(
    "--generate",
    type=click.IntRange(0),
    help="Generate answers for N prompts; with 0 there is no Rouge-L [default: all].",
)
@click.option(
    "--temperature",
    "temperatures",
    type=click.FloatRange(0),
    multiple=True,
    help="Temperature of generated answers, 0 is greedy; repeat the option for several [default: the teacher's in the cache, else 0].",
)
@click.option("--top-p", type=float, help="Nucleus of sampling [default: the teacher's].")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Answers per prompt, at temperatures above 0 [default: as many as the teacher's].",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Longest generated answer [default: the teacher's, else 128]."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    show_default=True,
    help="Engine that generates; auto is vLLM where it is installed.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@unsafe_option
@click.option(
    "--out",
    type=PATH,
    default=Path("data/evaluation"),
    show_default=True,
    help="Folder of the measurements, for kd compare; a model that it holds with the same settings is not measured again.",
)
@trust_option
@json_option
def evaluate(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure students on a cache's held-out split, beside the teacher, whose row comes from the cache.

    A model is a folder or a Hub id, or LABEL=MODEL. Models of one label count as its runs, one per training seed.

    \b
    teacher-forced   kl to the teacher in nats per token, agreement with its best token, ce (cross-entropy), ece
    answers          rougeL, chrF and exact against the reference, rougeL_teacher against the teacher's answer
    programs         pass@K by the row's verifier, which runs the tests
    docs/evaluation.md says how each is computed.

    \b
    kd evaluate data/student data/sft data/kd --from-cache data/cache
    kd evaluate before=data/student kd=data/kd-0 kd=data/kd-1 --from-cache data/cache --temperature 0 --temperature 1
    kd compare data/evaluation
    """
    quiet.libraries()
    from trainer.evaluate import compare as comparison
    from trainer.evaluate import run as evaluation

    warn_of_unsafe(options["unsafe_exec"])
    line = ProgressLine("")

    def show(progress: Progress) -> None:
        line.unit = progress.unit
        line.show(progress.done, progress.total, progress.note, progress.seconds_left)

    config = evaluation.EvaluateConfig(models=tuple(map(evaluation.label_of, models)), **options)
    note_device()
    out = evaluation.evaluate(config, show, note)
    line.close()
    rows = comparison.rows([out])
    if as_json:
        click.echo(json_text([row.as_json() for row in rows], indent=2))
    else:
        print_table(*comparison.wide(rows))
        note(f"intervals and retention: kd compare {out}")
