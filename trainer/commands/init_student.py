"""`kd init-student` makes a student from a model, or from some of its layers."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache import quiet
from kdcache.commands.console import print_facts
from kdcache.commands.options import NAME_OR_PATH, PATH, json_option, trust_option


@click.command("init-student")
@click.option(
    "--from",
    "base",
    type=NAME_OR_PATH,
    default="embedded",
    show_default=True,
    help="Hub id, model folder, or `embedded`: the checkpoint, or the teacher whose layers are kept.",
)
@click.option(
    "--keep-layers", help="Layers to keep: how many (evenly spaced), or a list like 0-4,6,8-29 [default: all]."
)
@click.option("--out", type=PATH, required=True, help="Folder of the student.")
@click.option("--overwrite", is_flag=True, help="Replace a student that this command made.")
@trust_option
@json_option
def init_student(base: str, keep_layers: str | None, out: Path, overwrite: bool, as_json: bool) -> None:
    """Make a student from a model, or some of its layers.

    \b
    kd init-student --from embedded --keep-layers 20 --out data/student
    """
    quiet.libraries()
    from trainer.student import make

    print_facts(make.init_student(base, out, keep_layers, overwrite), as_json)
