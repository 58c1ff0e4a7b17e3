"""`kd quantize` quantizes a student to 4 or 8 bits, and measures what that saves and costs."""

from __future__ import annotations

from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import ProgressLine, note_device, print_facts, print_table, say
from kdcache.commands.options import NAME_OR_PATH, config_from, json_option, options_of, trust_option
from kdcache.printable import json_text
from trainer.quantize.config import QuantizeConfig


@click.command("quantize")
@click.argument("student", type=NAME_OR_PATH)
@options_of(QuantizeConfig)
@click.option("--dry-run", is_flag=True, help="Print the sizes before and (estimated) after; write nothing.")
@trust_option
@json_option
def quantize(student: str, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Quantize a student to 4 or 8 bits, and measure the effect.

    The linear layers are quantized; embeddings and head are not. The new folder loads like any other: in transformers, kd evaluate, kd chat. The
    figures before and after hold for this machine and one sequence at a time; they are written to OUT/quantization.json
    and .csv.

    \b
    kd quantize data/kd --out data/kd-nf4 --from-cache data/cache
    kd quantize data/kd --out data/kd-w4a16 --format w4a16 --from-cache data/cache
    """
    quiet.libraries()
    from trainer.quantize import measure
    from trainer.quantize import quantize as quantizing

    quantization = quantizing.prepare(config_from(QuantizeConfig, options, student=student))
    if dry_run:
        print_facts(quantization.facts(), as_json)
        return
    note_device()
    with ProgressLine() as line:
        record = quantizing.quantize(quantization, line.show)
    if as_json:
        click.echo(json_text(record.as_json(), indent=2))
    elif record.measured:
        print_table(*measure.table(record.measured.changes))
        say(f"\n{record.measured.verdict}")
    else:
        print_facts(quantization.facts(), as_json)
