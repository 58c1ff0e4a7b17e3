"""`kd run` runs a whole experiment of recipes/, or checks each of its commands."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache import quiet
from kdcache.commands.console import note, say
from kdcache.commands.options import CONTEXT, NAME_OR_PATH, PATH, PathType


@click.command("run", context_settings=CONTEXT)
@click.argument("recipe", type=NAME_OR_PATH)
@click.option("--size", help="One of the recipe's sizes, such as paper or cpu [default: its first, paper].")
@click.option(
    "--out", type=PATH, help="Folder of everything it makes [default: data/RECIPE, data/RECIPE-SIZE for cpu]."
)
@click.option(
    "--data-path",
    type=PathType(exists=True),
    help="The data set's file or folder; without it the recipe takes it from the Hub.",
)
@click.option("--dry-run", is_flag=True, help="Print the commands, each checked; run none.")
def run_recipe(recipe: str, size: str | None, out: Path | None, data_path: Path | None, dry_run: bool) -> None:
    """Run a whole experiment: cache, train (KD and SFT), evaluate, compare. RECIPE is a name of recipes/, or a .yaml.

    Run it again after an interruption: it resumes where it stopped.

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
        _check_command(step.arguments)
        say(f"# {step.name}\n{step.command}\n")


def _check_command(arguments: list[str]) -> None:
    """Parse a `kd` command as if it were run: UsageError for what it does not know."""
    from kdcache.commands.cache_teacher import cache_teacher, engine_extra
    from trainer.commands.grpo import grpo, grpo_extra
    from trainer.commands.train import train, train_extra

    root = click.get_current_context().find_root()
    command = root.command
    while isinstance(command, click.Group):
        name, arguments = arguments[0], arguments[1:]
        subcommand = command.get_command(root, name)
        if subcommand is None:
            raise click.UsageError(f"no command {name}")
        command = subcommand
    with command.make_context(command.name, list(arguments)) as context:
        if command is cache_teacher:
            engine_extra(context, context.params["engine"])
        elif command is train:
            train_extra(context)
        elif command is grpo:
            grpo_extra(context)
