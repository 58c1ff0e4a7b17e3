"""`kd`: which commands there are, each in a file of kdcache/commands or trainer/commands, imported when it is asked for.

They parse, call and print. No logic there, and heavy imports only inside commands.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad shards found,
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
    "demo": "kdcache.commands.demo:demo",
    "run": "kdcache.commands.run:run_recipe",
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="kd")
def kd() -> None:
    """Run the teacher once; distil as often as you like.

    \b
    kd cache-teacher   phase one: a teacher's log-probabilities and samples -> a Parquet cache
    kd sql             ask SQL of the cache, and kd view: look at it in the browser
    kd train           phase two: a student from the cache alone
    kd grpo            reinforcement learning on the cache's prompts and verifiers
    kd evaluate        what the students kept, and kd compare: of the teacher, with intervals
    kd quantize        a student in 4 or 8 bits, measured before and after
    kd report          all of it on one page
    kd run             an experiment of recipes/, from the cache to the page
    kd demo            all of it, on this machine, in a quarter of an hour
    """


def main() -> None:
    """The `kd` command: user errors become one sentence and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(exit_code(lambda: kd(prog_name="kd", standalone_mode=False)))


if __name__ == "__main__":
    main()
