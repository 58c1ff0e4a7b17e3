"""The ``--help`` of every command as one page of Markdown, docs/cli.md. A test compares the two.

python -m kdcache.commands.reference > docs/cli.md
"""

from __future__ import annotations

from collections.abc import Iterator

import click

WIDTH = 100  # columns, as in all Markdown here

INTRODUCTION = """\
# Commands

This page is the `--help` of every command. It is generated:
`python -m kdcache.commands.reference > docs/cli.md`.
"""


def reference(kd: click.Group) -> str:
    """Return the page: the help of ``kd``, then a section per command in alphabetical order."""
    names = kd.context_settings["help_option_names"]
    root = click.Context(kd, info_name="kd", terminal_width=WIDTH, help_option_names=names)
    sections = [
        f"## {context.command_path}\n\n```\n{_without_trailing_spaces(command.get_help(context))}\n```\n"
        for command, context in _commands(kd, root)
    ]
    return "\n".join([INTRODUCTION, *sections])


def _commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield a command and, below a group, its commands, each with the context of its help."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from _commands(subcommand, click.Context(subcommand, context, name))


def _without_trailing_spaces(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


if __name__ == "__main__":
    import cli

    click.echo(reference(cli.kd), nl=False)
