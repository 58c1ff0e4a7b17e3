"""Command-line options: those made from configuration classes, those that several commands share, and ``--config``.

A field that was declared with ``kdcache.settings.option`` becomes a click option with ``options_of``; ``config_from``
puts the values that click has read into the configuration again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from kdcache.errors import UsageError
from kdcache.settings import REQUIRED, UNSAFE_EXEC_HELP, Option, option_of

#: Of the whole program: commands take it over from ``kd``.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


# --- types of values --------------------------------------------------------------------------------------------------


def expand_home(value: Any) -> Any:
    """Return a text with a leading ~ replaced by the home folder; a shell leaves it in ``--out=~/x``."""
    return os.path.expanduser(value) if isinstance(value, str) else value


class PathType(click.Path):
    """A path on this machine."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(expand_home(value), parameter, context)


class _NameOrPathType(click.ParamType):
    """A name (of a model, a data set, a recipe) or a path."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return expand_home(str(value))


class _LocationType(click.ParamType):
    """Where a cache is: a folder, or a URL of an object store."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        from kdcache import storage

        if value == "":
            self.fail("expected a folder, or a URL of an object store; found an empty text", parameter, context)
        return storage.location(expand_home(value))


class FiniteRange(click.FloatRange):
    """A range without NaN and infinity, both of which click's range lets through."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", parameter, context)
        return number


class _ParsedType(click.ParamType):
    """A text that a function of ours turns into a value."""

    name = "text"

    def __init__(self, parse: Callable[[str], Any]):
        self._parse = parse

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return self._parse(value)
        except UsageError as error:
            raise click.UsageError(str(error), context) from None


LOCATION, PATH, NAME_OR_PATH = _LocationType(), PathType(), _NameOrPathType()


# --- options from configuration classes -------------------------------------------------------------------------------

#: By the name of a field's type. Names, not classes: ``Location`` itself is slow to import.
TYPES: dict[str, click.ParamType] = {
    "bool": click.BOOL,
    "int": click.INT,
    "float": click.FLOAT,
    "str": click.STRING,
    "NameOrPath": NAME_OR_PATH,
    "Path": PATH,
    "Location": LOCATION,
}

Configuration = TypeVar("Configuration")
AnyCommand = TypeVar("AnyCommand", bound=Callable[..., Any])


def options_of(configuration: type) -> Callable[[AnyCommand], AnyCommand]:
    """Return a decorator that gives a command the options of a configuration class, in the order of its fields."""

    def add_options(command: AnyCommand) -> AnyCommand:
        for field, option in reversed(list(_options(configuration))):
            command = _click_option(field, option)(command)
        return command

    return add_options


def config_from(configuration: type[Configuration], parameters: dict[str, Any], **others: Any) -> Configuration:
    """Return a configuration with the values that click has read; ``others`` are its fields that are no options."""
    values = dict(others)
    for field in dataclasses.fields(configuration):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(field.default_factory):
            values[field.name] = config_from(field.default_factory, parameters)  # type: ignore[arg-type]
        elif option := option_of(field):
            values[field.name] = parameters[option.name(field)]
    return configuration(**values)


def _options(configuration: type) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """Yield the fields that are options; those of a nested dataclass stand where its field does."""
    for field in dataclasses.fields(configuration):
        if dataclasses.is_dataclass(field.default_factory):
            yield from _options(field.default_factory)  # type: ignore[arg-type]
        elif option := option_of(field):
            yield field, option


def _click_option(field: dataclasses.Field[Any], option: Option) -> Callable[[AnyCommand], AnyCommand]:
    name = option.name(field)
    flag = option.flag or "--" + name.replace("_", "-")
    annotation = str(field.type).removesuffix(" | None")
    details: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if field.default is REQUIRED:
        details["required"] = True
    elif option.parse and field.default is not None:
        details["default"] = ",".join(map(str, field.default))  # as it is typed
    else:
        details["default"] = field.default
    if annotation == "bool":
        if field.default:  # a second flag turns it off
            return click.option(f"{flag}/--no-{flag.removeprefix('--')}", name, show_default=True, **details)
        return click.option(flag, name, is_flag=True, **details)
    if several := re.fullmatch(r"tuple\[(\w+), \.\.\.\]", annotation):
        annotation = several[1]
        details["multiple"] = True
    details["show_default"] = not several
    return click.option(flag, name, type=_click_type(annotation, option), **details)


def _click_type(annotation: str, option: Option) -> click.ParamType:
    if option.choices:
        return click.Choice(option.choices)
    if option.parse:
        return _ParsedType(option.parse)
    if option.low is None:
        return TYPES[annotation]
    number = click.IntRange if annotation == "int" else FiniteRange
    return number(option.low, option.below, max_open=option.below is not None)  # type: ignore[arg-type]


# --- options that several commands share ------------------------------------------------------------------------------

unsafe_option = click.option("--unsafe-exec", is_flag=True, help=UNSAFE_EXEC_HELP)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _trust(_: click.Context, __: click.Parameter, given: bool) -> None:
    if given:
        from kdcache import models

        models.trust_remote_code()


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Run the Python code that comes with some models. It can do whatever you can.",
)


# --- --config ---------------------------------------------------------------------------------------------------------

#: Where ``--config`` leaves, in a click context, the options that are a library's.
LIBRARY_OPTIONS = "kd.config"


def literal(value: Any) -> Any:
    """Return what a text means: a number, True, None or a list; else the text. (YAML reads 2e-4 as text.)"""
    import ast

    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return expand_home(value)


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the keys of ``--config`` defaults, so that flags win; keep the keys that are not of this command."""
    if path is None:
        return
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise click.UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise click.UsageError(f"--config {path}: expected a mapping of options to values, as in `learning_rate: 2e-4`")
    values = {key.replace("-", "_"): literal(value) for key, value in content.items()}
    if "trust_remote_code" in values:
        raise click.UsageError(f"--config {path}: trust_remote_code must be given on the command line, never by a file")
    parameters = {p.name: p for p in context.command.params}
    ours = parameters.keys() - {"config", "as_json", "dry_run", "overwrite"}
    context.default_map = {
        key: [value] if parameters[key].multiple and not isinstance(value, list) else value
        for key, value in values.items()
        if key in ours
    }
    context.meta[LIBRARY_OPTIONS] = {key: value for key, value in values.items() if key not in ours}


config_option = click.option(
    "--config",
    type=PathType(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file of options by name; flags on the command line win. Every run writes its options to run.yaml.",
)
