"""`kd run` runs a whole experiment of recipes/, or checks each of its commands; `kd demo` runs the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from kdcache import quiet
from kdcache.commands.console import note, say
from kdcache.commands.options import NAME_OR_PATH, PATH, PathType
from kdcache.commands.passthrough import PassThrough


@click.command("run")
@click.argument("recipe", type=NAME_OR_PATH)
@click.option("--size", help="One of the recipe's sizes, such as paper or cpu [default: its first, paper].")
@click.option("--out", type=PATH, help="Folder of all results [default: data/RECIPE, data/RECIPE-SIZE for cpu].")
@click.option(
    "--data-path",
    type=PathType(exists=True),
    help="File or folder of the data set; without it the recipe downloads the data set from the Hub.",
)
@click.option("--dry-run", is_flag=True, help="Check and print the commands; run none.")
def run_recipe(recipe: str, size: str | None, out: Path | None, data_path: Path | None, dry_run: bool) -> None:
    """Run a whole experiment, from the cache to the comparison.

    RECIPE is a name in recipes/, or a .yaml file. Run it again after an interruption: it continues where it stopped.

    \b
    kd run dolly-en --dry-run
    kd run dolly-en --size cpu --data-path dolly.jsonl --out data/dolly
    """
    quiet.libraries()
    from kdcache.commands import recipes

    if not dry_run:
        recipes.run(recipe, out, note, data_path, size)
        return
    loaded = recipes.load(recipe)
    for step in recipes.steps(loaded, out or recipes.default_folder(loaded, size), data_path, size):
        check_command(step.arguments)
        say(f"# {step.name}\n{step.command}\n")


def check_command(arguments: Sequence[str]) -> None:
    """Parse the arguments of a `kd` command without running it. click.UsageError for anything it does not accept."""
    root = click.get_current_context().find_root()
    command, rest = root.command, list(arguments)
    while isinstance(command, click.Group):
        name = rest.pop(0)
        subcommand = command.get_command(root, name)
        if subcommand is None:
            raise click.UsageError(f"no command {name}")
        command = subcommand
    with command.make_context(command.name, rest) as context:
        if isinstance(command, PassThrough):
            command.library_options(context)


@click.command("demo")
@click.option(
    "--out", type=PATH, default=Path("data/demo"), show_default=True, help="Folder of everything that the demo writes."
)
def demo(out: Path) -> None:
    """Run the demonstration: one teacher, two students.

    It caches a teacher, trains one student with KD and one with SFT on the same examples, and compares them. Everything is real: SmolLM2-135M-Instruct in vLLM, DuckDB, transformers. It takes about a quarter of an hour on two
    cores. Run it again after an interruption: it continues where it stopped.

    \b
    kd demo --out data/demo
    """
    from kdcache.commands import recipes

    recipes.run("demo", out, note)
