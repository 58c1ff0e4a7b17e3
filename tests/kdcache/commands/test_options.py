"""Options are made from the configuration classes: same defaults, same limits, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kdcache.capture.config import CaptureConfig
from kdcache.commands.options import config_from, config_option, options_of
from kdcache.commands.passthrough import Library, PassThrough, parse_options
from kdcache.settings import REQUIRED, NameOrPath, option
from trainer.commands.evaluate import evaluate
from trainer.commands.grpo import grpo
from trainer.commands.quantize import quantize
from trainer.commands.train import train
from trainer.distill.config import TrainConfig
from trainer.evaluate.config import EvaluateConfig
from trainer.grpo.config import GrpoConfig
from trainer.quantize.config import QuantizeConfig

RUN = ("--from-cache", "c", "--student", "s", "--output-dir", "o")


def parsed(command: click.Command, configuration: type, *arguments: str, **others):
    """The configuration that a command line asks for."""
    with command.make_context(command.name, list(arguments)) as context:
        return config_from(configuration, context.params, **others)


def test_a_command_line_without_options_is_the_configuration_with_its_defaults():
    from kdcache.commands.cache_teacher import cache_teacher

    assert parsed(cache_teacher, CaptureConfig) == CaptureConfig()
    assert parsed(train, TrainConfig, *RUN) == TrainConfig((Path("c"),), "s", Path("o"))
    assert parsed(grpo, GrpoConfig, *RUN) == GrpoConfig((Path("c"),), "s", Path("o"))
    assert parsed(evaluate, EvaluateConfig, "m", "--from-cache", "c", models=()) == EvaluateConfig((), (Path("c"),))
    assert parsed(quantize, QuantizeConfig, "s", "--out", "o", student="s") == QuantizeConfig("s", Path("o"))


def test_fields_of_nested_classes_and_of_types_of_our_own_reach_the_configuration():
    from kdcache.commands.cache_teacher import cache_teacher

    texts = ("--prompt-column", "q", "--temperature", "0.5", "--split-ratios", "0.8,0.1,0.1", "--plan-slice", "2/7")
    config = parsed(cache_teacher, CaptureConfig, *texts, "--no-verify")
    assert (config.columns.prompt, config.columns.system, config.sampling.temperature) == ("q", None, 0.5)
    assert (config.split_ratios, config.plan_slice, config.verify) == ((0.8, 0.1, 0.1), (2, 7), False)


@dataclass(frozen=True)
class Inner:
    depth: int = option(1, "Depth.", low=1)


@dataclass(frozen=True)
class Outer:
    name: NameOrPath = option(REQUIRED, "Name.")
    inner: Inner = field(default_factory=Inner)
    shares: tuple[float, ...] = option((), "Shares.", flag="--share", low=0, below=1)
    kind: str = option("a", "Kind.", choices=("a", "b"))
    label: str | None = option(None, "Label.")
    quiet: bool = option(False, "Quiet.")
    loud: bool = option(True, "Loud.")
    extra: dict = field(default_factory=dict)


@click.command("outer", cls=PassThrough, library=lambda _: Library("lib", frozenset(["speed"]), {"pace": "--speed"}))
@config_option
@options_of(Outer)
@click.pass_context
def outer(context, **options):
    click.echo(config_from(Outer, options, extra=outer.library_options(context)))


def run(*arguments: str) -> str:
    return CliRunner().invoke(outer, arguments).output.strip()


def test_help_shows_the_fields_in_their_order():
    lines = [line.split()[0] for line in run("--help").splitlines() if line.startswith("  --")]
    assert lines == ["--config", "--name", "--depth", "--share", "--kind", "--label", "--quiet", "--loud", "--help"]


def test_every_kind_of_field_is_read():
    texts = ("--share", "0.5", "--share", "0.25", "--depth=3", "--kind", "b", "--quiet", "--no-loud", "--speed", "2e1")
    values = Outer("x", Inner(3), (0.5, 0.25), "b", None, True, False, {"speed": 20.0})
    assert run("--name", "x", *texts) == str(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--name'"),
        (["--name", "x", "--depth", "0"], "0 is not in the range x>=1"),
        (["--name", "x", "--share", "1"], "1.0 is not in the range 0<=x<1"),
        (["--name", "x", "--share", "nan"], "not a finite number"),
        (["--name", "x", "--kind", "c"], "'c' is not one of 'a', 'b'"),
        (["--name", "x", "--pace", "1"], "no option --pace, neither of this command nor of lib; it is now --speed"),
        (["--name", "x", "--spede", "1"], "did you mean --speed?"),
        (["--name", "x", "--lable", "1"], "no option --lable; did you mean --label?"),
        (["--name", "x", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_reason(arguments, message):
    assert message in run(*arguments)


def test_flags_win_over_the_file_of_config(tmp_path):
    (tmp_path / "run.yaml").write_text("name: y\nshare: 0.5\nquiet: true\ndepth: 2\nspeed: 1e3\n")
    values = Outer("y", Inner(4), (0.5,), quiet=True, extra={"speed": 1000.0})
    assert run("--config", str(tmp_path / "run.yaml"), "--depth", "4") == str(values)


def test_options_of_a_library_are_read_as_python_would_read_them():
    texts = ["--bf16", "--no-tqdm", "--learning-rate", "1e-4", "--betas=[0.9, 0.99]", "--report-to", "none"]
    values = {"bf16": True, "tqdm": False, "learning_rate": 1e-4, "betas": [0.9, 0.99], "report_to": None}
    assert parse_options(texts) == values


def test_the_yaml_of_an_earlier_version_may_name_an_option_that_is_gone_at_its_default(tmp_path):
    def library_options(weight: str) -> dict:
        (tmp_path / "run.yaml").write_text(f"teacher_weight: {weight}\nbeta: 0.1\n")
        arguments = [*RUN, "--config", str(tmp_path / "run.yaml")]
        with grpo.make_context("grpo", arguments) as context:
            return grpo.library_options(context)

    assert library_options("0.0") == {"beta": 0.1}
    with pytest.raises(click.UsageError, match="it brought no measurable gain"):
        library_options("0.3")
