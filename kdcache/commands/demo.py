"""`kd demo` runs the demonstration: a cached teacher and two students, compared."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import note
from kdcache.commands.options import CONTEXT, PATH


@click.command("demo", context_settings=CONTEXT)
@click.option(
    "--out",
    type=PATH,
    default=Path("data/demo"),
    show_default=True,
    help="Folder of everything it makes.",
)
def demo(out: Path) -> None:
    """Cache a teacher, train a student with KD and one with SFT on the same examples, and compare them.

    Everything is real: SmolLM2-135M-Instruct in vLLM, DuckDB, transformers. About a quarter of an hour on two cores;
    run it again after an interruption and it continues.

    \b
    kd demo --out data/demo
    """
    from kdcache.commands import recipes as recipe

    recipe.run("demo", out, note)
