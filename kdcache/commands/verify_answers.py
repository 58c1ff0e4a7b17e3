"""`kd verify-answers` judges the answers in a cache with the verifiers of their rows."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import ProgressLine, print_facts, warn_of_unsafe
from kdcache.commands.options import LOCATION, json_option, unsafe_option


@click.command("verify-answers")
@click.argument("cache", type=LOCATION)
@click.option("--where", help="SQL condition on the samples to judge, as in \"origin = 'sampled'\".")
@click.option("--renew", is_flag=True, help="Judge the answers that already have a reward, too.")
@unsafe_option
@json_option
def verify_answers(cache: Path, where: str | None, renew: bool, unsafe_exec: bool, as_json: bool) -> None:
    """Judge the answers in a cache with their verifiers.

    Programs are tested in a sandbox; numbers and texts are compared. The shards do not change: rewards are written to
    CACHE/rewards.parquet, and the view samples shows them in its column reward.

    \b
    kd verify-answers data/codeforces
    kd sql data/codeforces "SELECT avg(reward) FROM samples WHERE origin = 'sampled'"
    """
    from kdcache.judge import rewards_file

    warn_of_unsafe(unsafe_exec)
    with ProgressLine() as line:
        facts = rewards_file.verify_answers(cache, renew, unsafe_exec, where, line.show)
    print_facts(facts, as_json)
