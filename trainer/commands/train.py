"""`kd train` trains a student from the cache alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import note, print_facts
from kdcache.commands.options import config_from, config_option, json_option, options_of, trust_option
from kdcache.commands.passthrough import Library, PassThrough
from kdcache.machine import is_first_rank
from trainer.commands.training import StepLine, interruptible, introduce
from trainer.distill.config import TrainConfig


def training_arguments(_: Mapping[str, Any]) -> Library:
    from trainer.distill import plan
    from trainer.run.renamed import RENAMED_OF_TRAIN

    return Library("TrainingArguments", frozenset(plan.training_argument_names()), RENAMED_OF_TRAIN)


@click.command("train", cls=PassThrough, library=training_arguments)
@config_option
@options_of(TrainConfig)
@click.option("--dry-run", is_flag=True, help="Print samples, tokens, steps and memory; train nothing.")
@trust_option
@json_option
@click.pass_context
def train(context: click.Context, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train a student from the cache alone (phase two). The teacher is never loaded.

    Run the same command again after an interruption: it continues from the last complete checkpoint.

    \b
    Other options are those of transformers.TrainingArguments, by their names: --learning-rate 1e-4,
    --num-train-epochs 1, --per-device-train-batch-size 8, --gradient-accumulation-steps 4, --bf16,
    --report-to tensorboard, ...

    \b
    kd train --from-cache data/cache --student data/student --output-dir data/kd --learning-rate 2e-4
    """
    quiet.libraries()
    from trainer.distill import plan

    run = plan.prepare(config_from(TrainConfig, options, arguments=train.library_options(context)))
    if dry_run:
        from trainer.distill import estimate

        print_facts(run.facts() | estimate.estimate(run), as_json)
        return
    if is_first_rank():
        introduce(run.facts(), run.start.notes)
    from trainer.distill import trainer as distill

    line = StepLine(run.start.checkpoint)
    hidden = ("epoch", "tokens", "seconds")

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        metrics = {name: value for name, value in logs.items() if isinstance(value, float) and name not in hidden}
        line.show(step, steps, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    with interruptible():
        facts = distill.train(run, report, note)
    if is_first_rank():
        print_facts(facts, as_json)
