"""`kd verify-answers` judges the answers in a cache by their rows' verifiers."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import ProgressLine, print_facts, warn_of_unsafe
from kdcache.commands.options import CONTEXT, LOCATION, json_option, unsafe_option


@click.command("verify-answers", context_settings=CONTEXT)
@click.argument("cache", type=LOCATION)
@click.option("--where", help="SQL condition on the samples to judge, as in \"origin = 'sampled'\".")
@click.option("--renew", is_flag=True, help="Judge those too that have a reward.")
@unsafe_option
@json_option
def verify_answers(cache: Path, where: str | None, renew: bool, unsafe_exec: bool, as_json: bool) -> None:
    """Judge the answers in a cache by their rows' verifiers: tests are run in a sandbox, numbers and texts compared.

    Shards never change: rewards go to CACHE/rewards.parquet, and `reward` of the view samples is theirs.

    \b
    kd verify-answers data/codeforces
    kd sql data/codeforces "SELECT avg(reward) FROM samples WHERE origin = 'sampled'"
    """
    from kdcache.judge import rewards_file as judging

    warn_of_unsafe(unsafe_exec)
    line = ProgressLine("answers")
    facts = judging.verify_answers(
        cache, renew, unsafe_exec, where, lambda p: line.show(p.done, p.total, p.note, p.seconds_left)
    )
    line.close()
    print_facts(facts, as_json)
