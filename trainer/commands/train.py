"""`kd train` trains a student from the cache alone."""

from __future__ import annotations

from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import StepLine, introduce, is_first_rank, note, print_facts, this_command
from kdcache.commands.options import (
    EXTRA_OPTIONS,
    NAME_OR_PATH,
    PATH,
    config_option,
    from_cache_option,
    json_option,
    library_extra,
    lora_options,
    max_length_option,
    trust_option,
    where_option,
)


@click.command("train", context_settings=EXTRA_OPTIONS)
@config_option
@from_cache_option
@click.option("--student", type=NAME_OR_PATH, required=True, help="Hub id or folder of the student to start from.")
@click.option("--output-dir", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--method",
    type=click.Choice(["kd", "sft"]),
    default="kd",
    show_default=True,
    help="Distillation, or plain fine-tuning on the same completions.",
)
@click.option(
    "--alpha",
    type=float,
    default=0.5,
    show_default=True,
    help="Loss = (1 - alpha) cross-entropy + alpha divergence from the teacher.",
)
@click.option(
    "--divergence",
    default="forward_kl",
    show_default=True,
    help="forward_kl (any cache); on topk caches also reverse_kl, jsd, skewed_kl[:SKEW], tvd.",
)
@where_option
@max_length_option
@click.option(
    "--too-long",
    type=click.Choice(["drop", "cut"]),
    default="drop",
    show_default=True,
    help="What becomes of longer samples: dropped, or their completions cut at --max-length (with no end of turn).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the student's weights (--bf16 keeps them in float32 and computes in bfloat16).",
)
@lora_options
@click.option(
    "--evals-per-epoch",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="How often the validation split is measured and a checkpoint kept.",
)
@click.option(
    "--early-stopping-patience", type=click.IntRange(1), help="Stop after N measurements without a better one."
)
@click.option("--overwrite", is_flag=True, help="Delete a run that is already there.")
@click.option("--dry-run", is_flag=True, help="Print samples, tokens, steps and memory; train nothing.")
@trust_option
@json_option
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a student from the cache alone (phase two). The teacher is never loaded.

    Run the same command again after an interruption: it continues at the last whole checkpoint. Other options are
    transformers.TrainingArguments', by their names: --learning-rate 1e-4, --num-train-epochs 1,
    --per-device-train-batch-size 8, --gradient-accumulation-steps 4, --bf16, --report-to tensorboard, ...

    \b
    kd train --from-cache data/cache --student data/student --output-dir data/kd --learning-rate 2e-4
    """
    quiet.libraries()
    from trainer.distill import plan as run
    from trainer.distill.config import TrainConfig

    extra = train_extra(context)
    config = TrainConfig(
        arguments=extra, **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")}
    )
    resolved = run.prepare(config)
    if options["dry_run"]:
        from trainer.distill import estimate as memory

        print_facts(resolved.facts() | memory.estimate(resolved), options["as_json"])
        return
    first_rank = is_first_rank()
    if first_rank:
        introduce(resolved)
    from trainer.distill import trainer as distill

    show = StepLine(resolved.checkpoint)

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        hidden = ("epoch", "tokens", "seconds")
        show(
            step, steps, "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and k not in hidden)
        )

    try:
        found = distill.train(resolved, report)
    except KeyboardInterrupt:
        if first_rank:
            note(f"interrupted. To continue at the last checkpoint:\n  {this_command()}")
        raise
    if first_rank:
        print_facts(found, options["as_json"])


def train_extra(context: click.Context) -> dict[str, Any]:
    from trainer.distill import plan as run
    from trainer.run.renamed import RENAMED_OF_TRAIN

    return library_extra(context, run.training_argument_names(), "TrainingArguments", RENAMED_OF_TRAIN)
