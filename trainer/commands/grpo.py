"""`kd grpo` trains a student by reinforcement learning on the cache's prompts, with their verifiers as the reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import print_facts, warn_of_unsafe
from kdcache.commands.options import config_from, config_option, json_option, options_of, trust_option
from kdcache.commands.passthrough import Library, PassThrough
from kdcache.machine import is_first_rank
from trainer.commands.training import StepLine, interruptible, introduce
from trainer.grpo.config import GrpoConfig

#: What is printed of a logged step, and its name in the line.
SHOWN = {
    "reward": "reward",
    "rewards/correctness/mean": "right",
    "rewards/form/mean": "form",
    "completions/mean_length": "tokens",
    "entropy": "entropy",
    "kl": "kl",
}


def grpo_arguments(_: Mapping[str, Any]) -> Library:
    from trainer.grpo.arguments import argument_names
    from trainer.run.renamed import RENAMED_OF_GRPO

    return Library("trl.GRPOConfig", frozenset(argument_names()), RENAMED_OF_GRPO)


@click.command("grpo", cls=PassThrough, library=grpo_arguments)
@config_option
@options_of(GrpoConfig)
@click.option("--dry-run", is_flag=True, help="Print which prompts would be used; train nothing.")
@trust_option
@json_option
@click.pass_context
def grpo(context: click.Context, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train by reinforcement learning (GRPO) on a cache.

    The prompts' verifiers judge the answers: the reward is 1 for a right answer (tests run in a sandbox) and 0.1 for the
    requested form; an answer that is cut off gets nothing. The teacher is never loaded.

    \b
    Other options are those of trl.GRPOConfig, by their names: --num-generations 8,
    --max-completion-length 512, --beta 0.04, --learning-rate 1e-6, --max-steps 200, --use-vllm,
    --report-to tensorboard, ...

    \b
    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100
    kd grpo --from-cache data/cache --student data/kd --output-dir data/guided --guide prefix
    """
    quiet.libraries()
    from trainer.grpo import plan
    from trainer.grpo import train as training

    warn_of_unsafe(options["unsafe_exec"] and is_first_rank())
    run = plan.prepare(config_from(GrpoConfig, options, arguments=grpo.library_options(context)))
    if dry_run:
        print_facts(run.facts(), as_json)
        return
    if is_first_rank():
        introduce(run.facts(), run.start.notes)
    line = StepLine(run.start.checkpoint)

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        metrics = {short: float(logs[name]) for name, short in SHOWN.items() if name in logs}
        line.show(step, steps, "  ".join(f"{short} {value:.3g}" for short, value in metrics.items()))

    with interruptible():
        facts = training.train(run, report)
    if is_first_rank():
        print_facts(facts, as_json)
