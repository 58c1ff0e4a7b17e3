"""`kd cache info` sums up a cache, and `kd cache verify` looks at every byte of it."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import ProgressLine, note, print_facts, say
from kdcache.commands.options import CONTEXT, LOCATION, json_option


@click.group("cache", context_settings=CONTEXT)
def cache_group() -> None:
    """Look after a cache."""


@cache_group.command("info")
@click.argument("cache", type=LOCATION)
@json_option
def cache_info(cache: Path, as_json: bool) -> None:
    """Sum up a cache: teacher, samples, tokens, bytes a token, and what is missing.

    Where the shards have changed, manifest.json, README.md and rejected.jsonl are written anew.

    \b
    kd cache info data/cache
    """
    from kdcache.cache import manifest

    print_facts(manifest.summary(cache), as_json)


@cache_group.command("verify")
@click.argument("cache", type=LOCATION)
@click.option("--repair", is_flag=True, help="Move bad files to CACHE/set-aside, so that the next capture redoes them.")
@json_option
def cache_verify(cache: Path, repair: bool, as_json: bool) -> None:
    """Look at every byte and every number of a cache. Exit code 3 if anything is wrong or missing.

    \b
    kd cache verify data/cache
    kd cache verify data/cache --repair      # then run the same kd cache-teacher command again
    """
    from kdcache.cache import integrity
    from kdcache.cache.layout import REWARDS_FILE

    line = ProgressLine("shards")
    report = integrity.verify(cache, lambda progress: line.show(progress.done, progress.total, "", None))
    line.close()
    if repair and not report.sound:
        integrity.repair(report)
    facts = {
        "cache": str(cache),
        "sound": report.sound,
        "shards": report.shards,
        "samples": report.rows,
        "completion_tokens": report.completion_tokens,
        "missing": len(report.missing),
        "bad": len(report.problems),
    }
    if as_json:
        names = ("missing", "problems", "unvouched", "unprotected", "set_aside", "notes")
        print_facts(facts | {name: getattr(report, name) for name in names}, as_json)
    else:
        for name, words in report.problems.items():
            say(f"bad      {name}: {'; '.join(words)}")
        for name in report.missing:
            say(f"missing  {name}")
        print_facts(facts, as_json)
    if report.unvouched:
        note(f"{report.unvouched} shards are in no manifest yet; kd cache info records them")
    if report.unprotected:
        first = f"(the first is {report.unprotected[0]})"
        note(f"not protected: {len(report.unprotected)} files are from before files had checksums of their own {first}")
    for text in report.notes:
        note(text)
    if report.set_aside:
        note(f"{len(report.set_aside)} files were moved to {cache}/set-aside")
    if report.sound:
        return
    to_capture = report.missing or [name for name in report.set_aside if name != REWARDS_FILE]
    if to_capture:
        note("run the same kd cache-teacher command again: it redoes what is missing, and nothing else")
    if REWARDS_FILE in report.set_aside:
        note("run kd verify-answers again: it makes the rewards anew")
    if report.problems and not repair:
        note("--repair sets the bad files aside, so that they can be made again")
    raise SystemExit(3)
