"""`kd compare` shows how much of the teacher's quality each student retained, with intervals."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import note, print_markdown, print_table
from kdcache.commands.options import PATH, json_option
from kdcache.printable import json_text


@click.command("compare")
@click.argument("evaluations", nargs=-1, required=True, type=PATH)
@click.option("--against", help="Label of a model; also show the differences from it, as in --against sft.")
@click.option("--metric", "metrics", multiple=True, help="Show only this metric; repeat it for several.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--out", type=PATH, help="Folder of comparison.json and .csv [default: the first evaluation].")
@json_option
def compare(
    evaluations: tuple[Path, ...],
    against: str | None,
    metrics: tuple[str, ...],
    markdown: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Say what each student retained of the teacher, with 95% intervals, from the folders of kd evaluate.

    Retention is the student's value divided by the teacher's, on the same prompts and at the same temperature. Models
    that were measured on other prompts are refused. Intervals resample the problems, and the runs of one label.

    \b
    kd compare data/evaluation
    kd compare data/evaluation --against sft --metric rougeL --metric kl
    """
    from trainer.evaluate import compare as comparison

    rows = comparison.rows(evaluations, against)
    measured = dict.fromkeys(row.metric for row in rows)
    for name in metrics:
        if name not in measured:
            raise click.UsageError(f"--metric {name}: not measured; there are: {', '.join(measured)}")
    written = comparison.write(rows, out or evaluations[0])
    if all(row.value.interval is None for row in rows):
        note("no intervals: the split holds fewer than five problems, and resampling so few says little of others")
    if metrics:
        rows = [row for row in rows if row.metric in metrics]
    if as_json:
        click.echo(json_text([row.as_json() for row in rows], indent=2))
    else:
        (print_markdown if markdown else print_table)(*comparison.long(rows))
        note(f"written: {', '.join(map(str, written))}")
