"""The `kd` program: a table of its commands, each a file in kdcache/commands or trainer/commands that is imported on demand.

Commands parse, call and print. They hold no logic, and import heavy libraries inside their functions.

Data goes to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage, 3 bad shards found,
130 interrupted.
"""

from __future__ import annotations

import os
import sys

import click

from kdcache import __version__
from kdcache.commands.console import exit_code
from kdcache.commands.lazy import LazyGroup
from kdcache.commands.options import CONTEXT

COMMANDS = {
    "cache-teacher": "kdcache.commands.cache_teacher:cache_teacher",
    "cache": "kdcache.commands.cache:cache_group",
    "verify-answers": "kdcache.commands.verify_answers:verify_answers",
    "sql": "kdcache.commands.sql:sql",
    "init-student": "trainer.commands.init_student:init_student",
    "train": "trainer.commands.train:train",
    "grpo": "trainer.commands.grpo:grpo",
    "evaluate": "trainer.commands.evaluate:evaluate",
    "compare": "trainer.commands.compare:compare",
    "quantize": "trainer.commands.quantize:quantize",
    "report": "trainer.commands.report:report",
    "push": "kdcache.commands.push:push",
    "view": "trainer.commands.view:view",
    "chat": "trainer.commands.chat:chat",
    "demo": "kdcache.commands.run:demo",
    "run": "kdcache.commands.run:run_recipe",
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="kd")
def kd() -> None:
    """Run the teacher once; distil as often as you like.

    \b
    # phase one: the teacher writes a cache
    kd cache-teacher --examples builtin --out data/cache
    kd view data/cache
    # phase two: a student learns from the cache alone
    kd init-student --keep-layers 20 --out data/student
    kd train --from-cache data/cache --student data/student --output-dir data/kd
    kd evaluate data/student data/kd --from-cache data/cache
    # both, on this machine, in about a quarter of an hour
    kd demo
    """


def main() -> None:
    """Run `kd`. User errors become one sentence and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(exit_code(lambda: kd(prog_name="kd", standalone_mode=False)))


if __name__ == "__main__":
    main()
