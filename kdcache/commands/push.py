"""`kd push` uploads a cache or a student to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.commands.console import print_facts, say
from kdcache.commands.options import PATH, json_option


@click.command("push")
@click.argument("folder", type=PATH)
@click.argument("repo_id", metavar="REPO")
@click.option("--public", is_flag=True, help="Make the repository public [default: private].")
@click.option("--dry-run", is_flag=True, help="Print what would be uploaded; upload nothing.")
@json_option
def push(folder: Path, repo_id: str, public: bool, dry_run: bool, as_json: bool) -> None:
    """Upload a cache or a student to the Hugging Face Hub.

    A cache becomes a data set and a student becomes a model, each with its card. Checkpoints, optimizer states and set-aside
    shards are not uploaded. The options of the capture or the run are uploaded, including paths, and so are the prompts and
    answers of the data set: check its licence and the teacher's before you use --public.

    \b
    kd push data/qwen my-name/qwen-cache --dry-run
    kd push data/kd my-name/qwen-0.5b-distilled
    """
    from kdcache.cache import publish

    upload = publish.prepare(folder, repo_id, private=not public)
    facts = {
        "repository": f"{repo_id} ({upload.repo_type}, {'private' if upload.private else 'public'})",
        "files": len(upload.files),
        "bytes": sum(upload.files.values()),
    }
    if dry_run and not as_json:
        for name, size in upload.files.items():
            say(f"{size:>15,}  {name}")
    if not dry_run:
        facts["url"] = publish.push(upload)
    print_facts(facts | ({"names": list(upload.files)} if as_json else {}), as_json)
