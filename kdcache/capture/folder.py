"""The cache's folder before the first answer: who may write into it, and the files that are fixed from the start.

Invariant: a folder holds the shards of one plan. plan.json is created before anything else, and only if there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from kdcache.cache import documents, manifest, writer
from kdcache.cache.format import differing_fields
from kdcache.capture.plan import Plan, open_tokenizer
from kdcache.capture.space import needs_space
from kdcache.errors import KDError
from kdcache.judge import rewards_file
from kdcache.progress import Progress, ShowProgress
from kdcache.prompts.vocabulary import vocab_table
from kdcache.storage import Location, atomic, folders, lock
from kdcache.storage.folders import CACHE


def check(plan: Plan, overwrite: bool | None = None) -> None:
    """Raise KDError if the folder is not free for this plan.

    It may be empty, hold this very plan, or be about to be overwritten (``overwrite``, by default the configuration's).
    """
    overwrites = plan.config.overwrite if overwrite is None else overwrite
    out = plan.config.out
    folders.check_place(out, "--out")
    # Before the look for plan.json: another process that makes this cache creates plan.json first.
    if isinstance(out, Path):
        has_files = not folders.is_empty(out)
    else:
        has_files = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if (out / "plan.json").is_file():
        if overwrites:
            reads = [plan.model, plan.config.examples, *([plan.config.data_path] if plan.config.data_path else [])]
            folders.check_deletable(out, CACHE, reads)
        elif overwrite is not None or not holds_stale_claim(plan):
            _check_same_plan(plan)
    elif documents.plan_was_set_aside(out):
        _check_shards(plan)
    elif has_files:
        raise KDError(f"--out {out} is not empty and is no cache (it has no plan.json). Use another --out.")


_WAYS_OUT = "Use another --out, or --overwrite to delete what is there."


def _check_same_plan(plan: Plan) -> None:
    """Compare plan.json with the plan: first the fingerprints, then the shards."""
    out = plan.config.out
    recorded = documents.read_plan(out)
    if recorded["fingerprint"] != plan.fingerprint:
        differing = "\n  ".join(differing_fields(recorded["fields"], plan.fields))
        raise KDError(
            f"{out} holds a cache made differently (old -> new):\n  {differing}\n"
            f"A cache does not grow and is never mixed. {_WAYS_OUT}"
        )
    if recorded["shards"] != plan.shards_as_json():
        raise KDError(
            f"{out}/plan.json cuts the same examples into other shards than this version of kdcache does. {_WAYS_OUT}"
        )


def _check_shards(plan: Plan) -> None:
    """Compare the shards' fingerprints with the plan's, in a folder whose plan.json was damaged and set aside."""
    out = plan.config.out
    foreign = {metadata.get("fingerprint") for metadata in manifest.shards_metadata(out)} - {plan.fingerprint}
    if foreign:
        raise KDError(
            f"{out} holds shards of a cache made differently (fingerprint {foreign.pop()}, this command's is "
            f"{plan.fingerprint}): its plan.json was damaged and set aside; run the command that made it. {_WAYS_OUT}"
        )


def holds_stale_claim(plan: Plan) -> bool:
    """Return whether the folder is claimed by another plan that never wrote a shard.

    It is left by a start that failed and may be corrected. Never true for slices, which share a folder, nor in a store,
    which has no lock: there another process may be about to write the first shard.
    """
    out = plan.config.out
    if plan.config.plan_slice is not None or not isinstance(out, Path) or not folders.holds(out, CACHE):
        return False
    return (
        f'"{plan.fingerprint}"' not in (out / CACHE.marker).read_text(encoding="utf-8", errors="replace")
        and not folders.has_results(out, CACHE)
        and folders.foreign(out, CACHE) is None
    )


def check_and_drop_stale_claim(plan: Plan) -> None:
    """Refuse a folder that is not free, and delete a claim under which no shard was ever written."""
    check(plan)
    if holds_stale_claim(plan) and not plan.config.overwrite:
        assert isinstance(plan.config.out, Path)
        folders.delete(plan.config.out, CACHE)


def prepare(plan: Plan) -> None:
    """Claim the folder, and remove the manifest's entries and the rewards of shards that are missing.

    Slices of one plan do so one after the other, so that two of them never rewrite the manifest at the same time.
    """
    out = plan.config.out
    turn = lock.held(out, ".lock-claim", wait=True) if plan.config.plan_slice else contextlib.nullcontext()
    with turn:
        if plan.config.plan_slice:
            folders.recover(out, CACHE)
        claim(plan)
        missing = plan.missing(plan.shards)
        if missing:
            manifest.remove_entries(out, [shard.name for shard in missing])
            rewards_file.forget(out)


def claim(plan: Plan) -> None:
    """Make the folder this plan's, and write everything that is fixed before the first request."""
    out = plan.config.out
    if plan.config.overwrite and (out / "plan.json").is_file():
        check(plan)  # again, because starting the engine took a while
        if isinstance(out, Path):
            folders.set_aside(out)
        else:
            _empty(out)
    out.mkdir(parents=True, exist_ok=True)
    if not atomic.create_json(out / "plan.json", plan.as_json()):
        check(plan, overwrite=False)  # another run may have claimed the folder while the engine started
    (out / "data").mkdir(exist_ok=True)
    rewards_file.prepare(out)
    for folder in (out, out / "data"):
        atomic.remove_leftovers(folder)
    if not (out / "vocab.parquet").is_file():
        with needs_space(out, "vocab.parquet", 15 * plan.vocab_size):
            writer.write_table(out / "vocab.parquet", vocab_table(open_tokenizer(plan.model), plan.vocab_size))


def _empty(cache: Location) -> None:
    """Delete a remote cache, plan.json last: after an interruption it is still a cache, which can be overwritten."""
    assert not isinstance(cache, Path)
    for path in sorted(cache.below(), key=lambda path: path.name == "plan.json"):
        path.unlink(missing_ok=True)


def dropping_old_cache(plan: Plan, show: ShowProgress) -> Callable[[Progress], None]:
    """Return ``show`` that also deletes the overwritten cache, which was set aside, once the first answer is in."""

    def show_and_drop(progress: Progress) -> None:
        folders.drop(plan.config.out)
        show(progress)

    return show_and_drop
