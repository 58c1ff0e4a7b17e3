"""`kd quantize` quantizes a student to 4 or 8 bits, and measures what that saves and costs."""

from __future__ import annotations

from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import ProgressLine, note_device, print_facts, print_table, say
from kdcache.commands.options import CONTEXT, LOCATION, NAME_OR_PATH, PATH, json_option, trust_option
from kdcache.printable import json_text
from kdcache.progress import Progress


@click.command("quantize", context_settings=CONTEXT)
@click.argument("student", type=NAME_OR_PATH)
@click.option("--out", type=PATH, required=True, help="Folder of the quantized student.")
@click.option(
    "--format",
    type=click.Choice(["nf4", "int8", "w4a16"]),
    default="nf4",
    show_default=True,
    help="nf4 (4 bits), int8: for transformers. w4a16 (4 bits, calibrated on the cache's train split): for vLLM.",
)
@click.option(
    "--from-cache",
    type=LOCATION,
    multiple=True,
    help="A cache: its test split measures the quality, its train split calibrates w4a16. Give it again for several.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure size, memory and speed before and after, and with --from-cache the quality.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Of measuring both in turns; medians are shown.",
)
@click.option("--overwrite", is_flag=True, help="Delete a quantized student that is already there.")
@click.option("--dry-run", is_flag=True, help="Print the sizes before and (estimated) after; write nothing.")
@trust_option
@json_option
def quantize(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Quantize a student's linear layers to 4 or 8 bits, and measure what that saves and what it costs.

    Embeddings and head stay as they are. The folder loads as any other: in transformers, kd evaluate, kd chat. Figures
    of before and after are of this machine and one sequence at a time; they are kept in OUT/quantization.json and .csv.

    \b
    kd quantize data/kd --out data/kd-nf4 --from-cache data/cache
    kd quantize data/kd --out data/kd-w4a16 --format w4a16 --from-cache data/cache
    """
    quiet.libraries()
    from trainer.quantize import measure
    from trainer.quantize import quantize as quantizing

    quantization = quantizing.prepare(quantizing.QuantizeConfig(**options))
    if dry_run:
        print_facts(quantization.facts(), as_json)
        return
    line = ProgressLine("")

    def show(progress: Progress) -> None:
        line.unit = progress.unit
        line.show(progress.done, progress.total, progress.note, progress.seconds_left)

    note_device()
    record = quantizing.quantize(quantization, show)
    line.close()
    if as_json:
        click.echo(json_text(record.as_json(), indent=2))
    elif record.measured:
        print_table(*measure.table(record.measured.changes))
        say(f"\n{record.measured.verdict}")
    else:
        print_facts(quantization.facts(), as_json)
