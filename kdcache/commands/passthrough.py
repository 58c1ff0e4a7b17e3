"""Commands that pass the options they do not know on to a library: vLLM, TrainingArguments, GRPOConfig."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from kdcache.commands.options import LIBRARY_OPTIONS, literal


@dataclass(frozen=True)
class Library:
    """Whose options a command passes on."""

    name: str  # for messages
    options: frozenset[str]  # with underscores
    renamed: Mapping[str, str] = field(default_factory=dict)  # old option: its new name, or "nothing: REASON"


class PassThrough(click.Command):
    """A command whose unknown options are a library's.

    ``library`` receives the command's own parameters and returns the library that takes the others; None lets them all
    pass. It is called, and so the library is imported, only when there are such options.
    """

    def __init__(self, *arguments: Any, library: Callable[[Mapping[str, Any]], Library | None], **options: Any):
        options["context_settings"] = {"ignore_unknown_options": True, "allow_extra_args": True}
        super().__init__(*arguments, **options)
        self._library = library

    def library_options(self, context: click.Context) -> dict[str, Any]:
        """Return the library's options of --config and the command line, flags winning.

        click.UsageError for an option that neither the command nor the library knows.
        """
        flags = [flag for parameter in self.params for flag in parameter.opts]
        from_file, from_flags = context.meta.get(LIBRARY_OPTIONS, {}), parse_options(context.args, flags)
        library = self._library(context.params) if from_file or from_flags else None
        if library is not None:
            # The run.yaml of an earlier version names an option that is gone, at its default: 0, false or null.
            from_file = {name: value for name, value in from_file.items() if value or name not in library.renamed}
        values = from_file | from_flags
        if library is not None:
            names = [*library.options, *(parameter.name for parameter in self.params if parameter.name)]
            for name in values:
                if name not in library.options:
                    hint = _hint(name, names, library.renamed)
                    raise click.UsageError(
                        f"no option {_flag(name)}, neither of this command nor of {library.name}{hint}"
                    )
        return values


def parse_options(arguments: Iterable[str], flags: Iterable[str] = ()) -> dict[str, Any]:
    """Return the values of `--some-name value`, `--some-name=value`, `--flag` and `--no-flag`, by name.

    click.UsageError for what is no option, and for a name that is nearly one of the command's own ``flags``.
    """
    options: dict[str, Any] = {}
    flags, rest = list(flags), list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or len(argument) < 4:
            raise click.UsageError(f"unexpected argument {argument!r}")
        name, has_value, value = argument[2:].partition("=")
        if near := _nearest(f"--{name}", flags):
            raise click.UsageError(f"no option --{name}; did you mean {near}?")
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        key = name.replace("-", "_")
        if has_value:
            options[key] = literal(value)
        elif key.startswith("no_"):
            options[key.removeprefix("no_")] = False
        else:
            options[key] = True
    return options


def _hint(name: str, names: Iterable[str], renamed: Mapping[str, str]) -> str:
    """Return the end of a message about an unknown option: its new name, the nearest name, or nothing."""
    new_name = renamed.get(name)
    if new_name is None:
        near = _nearest(name, names, 0.6)
        return f"; did you mean {_flag(near)}?" if near else ""
    reason = new_name.removeprefix("nothing: ")
    return f": {reason}" if reason != new_name else f"; it is now {new_name}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.84) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)
