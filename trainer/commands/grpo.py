"""`kd grpo` does reinforcement learning on the cache's prompts, judged by their verifiers."""

from __future__ import annotations

from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import StepLine, introduce, is_first_rank, note, print_facts, this_command, warn_of_unsafe
from kdcache.commands.options import (
    EXTRA_OPTIONS,
    NAME_OR_PATH,
    PATH,
    config_option,
    from_cache_option,
    json_option,
    library_extra,
    lora_options,
    trust_option,
    unsafe_option,
)


@click.command("grpo", context_settings=EXTRA_OPTIONS)
@config_option
@from_cache_option
@click.option("--student", type=NAME_OR_PATH, required=True, help="Hub id or folder of the student to start from.")
@click.option("--output-dir", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--where",
    help="SQL condition on the view prompts [default: success > 0 AND success < 1, the prompts that the teacher's own answers "
    "got right sometimes].",
)
@click.option(
    "--guide",
    type=click.Choice(["prefix"]),
    help="Begin a falling share of each group's answers with the first half of a right answer from the cache.",
)
@click.option(
    "--guards/--no-guards", default=True, show_default=True, help="Stop a run that has collapsed, saying how."
)
@click.option(
    "--guard-window", type=click.IntRange(2), default=20, show_default=True, help="Steps that a guard looks at."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the student's weights.",
)
@lora_options
@unsafe_option
@click.option("--overwrite", is_flag=True, help="Delete a run that is already there.")
@click.option("--dry-run", is_flag=True, help="Print what would be learnt from; train nothing.")
@trust_option
@json_option
@click.pass_context
def grpo(context: click.Context, **options: Any) -> None:
    """Reinforcement learning (GRPO) on the cache's prompts, judged by their verifiers. The teacher is never loaded.

    The reward is 1 for a right answer (tests are run in a sandbox) and 0.1 for one in the form asked for; an answer that is
    cut off gets nothing. Other options are trl.GRPOConfig's, by their names: --num-generations 8, --max-completion-length 512,
    --beta 0.04, --learning-rate 1e-6, --max-steps 200, --use-vllm, --report-to tensorboard, ...

    \b
    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100
    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --guide prefix --where "success > 0"
    """
    quiet.libraries()
    from trainer.grpo import plan
    from trainer.grpo.config import GrpoConfig
    from trainer.grpo.train import train

    first_rank = is_first_rank()
    warn_of_unsafe(options["unsafe_exec"] and first_rank)
    extra = grpo_extra(context)
    config = GrpoConfig(
        arguments=extra, **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")}
    )
    resolved = plan.prepare(config)
    if options["dry_run"]:
        print_facts(resolved.facts(), options["as_json"])
        return
    if first_rank:
        introduce(resolved)
    show = StepLine(resolved.checkpoint)

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        names = {
            "reward": "reward",
            "rewards/correctness/mean": "right",
            "rewards/form/mean": "form",
            "completions/mean_length": "tokens",
            "entropy": "entropy",
            "kl": "kl",
        }
        show(step, steps, "  ".join(f"{short} {float(logs[k]):.3g}" for k, short in names.items() if k in logs))

    try:
        found = train(resolved, report)
    except KeyboardInterrupt:
        if first_rank:
            note(f"interrupted. To continue at the last checkpoint:\n  {this_command()}")
        raise
    if first_rank:
        print_facts(found, options["as_json"])


def grpo_extra(context: click.Context) -> dict[str, Any]:
    from trainer.grpo.arguments import argument_names
    from trainer.run.renamed import RENAMED_OF_GRPO

    return library_extra(context, argument_names(), "trl.GRPOConfig", RENAMED_OF_GRPO)
