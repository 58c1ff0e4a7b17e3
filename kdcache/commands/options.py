"""What commands take: the types of their arguments, the options that several share, --config, and options passed through."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

EXTRA_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110}


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def _expanded(value: Any) -> Any:
    """A path with ~ as the home folder, once and for all: a shell leaves it in --out=~/x, and libraries expand it or not."""
    return os.path.expanduser(value) if isinstance(value, str) else value


class PathType(click.Path):
    """A path of this machine."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(_expanded(value), parameter, context)


class _NameOrPathType(click.ParamType):
    """A name (of a model, a data set, a recipe) or a path."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return _expanded(str(value))


class _LocationType(click.ParamType):
    """Where a cache is: a folder, or a URL of an object store."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        from kdcache import storage

        if value == "":
            self.fail("expected a folder, or a URL of an object store; found an empty text", parameter, context)
        return storage.location(_expanded(value))


LOCATION, PATH, NAME_OR_PATH = _LocationType(), PathType(), _NameOrPathType()


class FiniteRange(click.FloatRange):
    """click's range lets NaN through, and infinity where one end is open."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", parameter, context)
        return number


unsafe_option = click.option(
    "--unsafe-exec",
    is_flag=True,
    help="Run the programs that answers hold without a sandbox, where bubblewrap cannot be had. They can do what you can.",
)


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
    help="Run the Python code that comes with a model, where one has some. It can do what you can.",
)


from_cache_option = click.option(
    "--from-cache",
    type=LOCATION,
    multiple=True,
    required=True,
    help="A cache: a folder, or s3://bucket/folder. Give it again for several of one tokenizer.",
)


where_option = click.option(
    "--where", help="SQL condition on the samples, as in \"origin = 'sampled' AND language = 'es'\"."
)


max_length_option = click.option(
    "--max-length",
    type=int,
    default=2048,
    show_default=True,
    help="Longer samples (prompt + completion) are dropped whole and counted.",
)


_LORA_OPTIONS = (
    click.option(
        "--lora-r", type=click.IntRange(1), help="Train LoRA matrices of this rank; they are merged at the end."
    ),
    click.option(
        "--lora-alpha", type=click.IntRange(1), help="Scale of what LoRA adds, over its rank [default: twice the rank]."
    ),
    click.option(
        "--lora-dropout",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Of LoRA's input, while training.",
    ),
    click.option(
        "--lora-target-modules",
        default="all-linear",
        show_default=True,
        help="Names of layers, with commas; all-linear: every linear layer but the head.",
    ),
    click.option(
        "--load-in-4bit", is_flag=True, help="QLoRA: the frozen weights in 4 bits (NF4, bitsandbytes). Needs --lora-r."
    ),
)


def lora_options(command: Any) -> Any:
    """The options of LoRA and QLoRA, which training and reinforcement learning share."""
    for option in reversed(_LORA_OPTIONS):
        command = option(command)
    return command


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """--config: its keys become defaults, so that flags win; what the command does not know is kept for its library."""
    if path is None:
        return
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise click.UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise click.UsageError(f"--config {path}: expected a mapping of options to values, as in `learning_rate: 2e-4`")
    given = {key.replace("-", "_"): _literal(value) for key, value in given.items()}
    if "trust_remote_code" in given:
        raise click.UsageError(
            f"--config {path}: trust_remote_code is for the command line, so that no file can ask for it"
        )
    own = {p.name for p in context.command.params if p.name not in ("config", "as_json", "dry_run", "overwrite")}
    several = {p.name for p in context.command.params if p.multiple}
    given = {key: [value] if key in several and not isinstance(value, list) else value for key, value in given.items()}
    context.default_map = {key: value for key, value in given.items() if key in own}
    context.meta["kd.config"] = {key: value for key, value in given.items() if key not in own}


config_option = click.option(
    "--config",
    type=PathType(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML of options by name; flags on the command line win. Every run leaves one as run.yaml.",
)


def ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(
            f"--split-ratios {text}: expected three shares (train,validation,test), as in 0.9,0.05,0.05"
        ) from None
    return train, validation, test


def plan_slice(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) < 20):
        raise click.UsageError(f"--plan-slice {text}: expected I/N with I from 0 to N - 1, as in 0/4 .. 3/4")
    return int(index), int(count)


def extra_options(context: click.Context) -> dict[str, Any]:
    """`--some-name value`, `--some-name=value`, `--flag` and `--no-flag` that the command itself does not know."""
    found: dict[str, Any] = {}
    own = [option for parameter in context.command.params for option in parameter.opts]
    arguments = list(context.args)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or len(argument) < 4:
            raise click.UsageError(f"unexpected argument {argument!r}")
        near = _nearest(argument.partition("=")[0], own)
        if near:
            raise click.UsageError(f"no option {argument.partition('=')[0]}; did you mean {near}?")
        name, has_value, value = argument[2:].partition("=")
        if not has_value and arguments and not arguments[0].startswith("--"):
            has_value, value = "=", arguments.pop(0)
        key = name.replace("-", "_")
        if has_value:
            found[key] = _literal(value)
        elif key.startswith("no_"):
            found[key[3:]] = False
        else:
            found[key] = True
    return found


def _literal(value: Any) -> Any:
    """What a text means: a number, True, None, a list; else the text. (YAML reads 2e-4 as text.)"""
    import ast

    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return _expanded(value)


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.84) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def check_extra(
    extra: dict[str, Any],
    known: Iterable[str],
    whose: str,
    own: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Refuse what is not ``known``, with the name that was probably meant: a new one, or the nearest."""
    known = list(known)
    for key in extra:
        if key not in known:
            now = (renamed or {}).get(key)
            near = _nearest(key, [*known, *own], 0.6)
            hint = f"; it is now {now}" if now else f"; did you mean --{near.replace('_', '-')}?" if near else ""
            hint = hint.replace("; it is now nothing: ", ": ")
            raise click.UsageError(f"no option --{key.replace('_', '-')}, neither of this command nor of {whose}{hint}")
    return extra


def library_extra(
    context: click.Context, known: Iterable[str], whose: str, renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What --config and the command line hold that is the library's, flags winning."""
    own = [p.name for p in context.command.params if p.name]
    return check_extra(context.meta.get("kd.config", {}) | extra_options(context), known, whose, own, renamed)
