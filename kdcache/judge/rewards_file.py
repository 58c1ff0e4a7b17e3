"""The rewards of a cache that is there already: ``kd verify-answers``. They stand beside the shards, which never change.

    kd verify-answers data/codeforces

rewards.parquet has a row for each sample judged (sample_id, reward, reason); the view ``samples`` puts its rewards before
those that were found at capture. It is replaced whole, every minute: interrupted, what was judged by then is kept.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import integrity, query, writer
from kdcache.cache.layout import REWARDS_FILE
from kdcache.errors import KDError, first_line
from kdcache.judge import verifiers
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.prompts.thoughts import whole_turn
from kdcache.storage import Location, lock

REWARDS = pa.schema(
    [pa.field("sample_id", pa.string()), pa.field("reward", pa.float32()), pa.field("reason", pa.string())]
)
SAVE_SECONDS, AT_ONCE = 60.0, 64


def verify_answers(
    cache: Location,
    renew: bool = False,
    unsafe: bool = False,
    where: str | None = None,
    show: ShowProgress = silent,
) -> dict[str, Any]:
    """Judge the samples that have a verifier and no reward yet (``renew``: all that have one), and count the verdicts."""
    with lock.held(cache):
        todo = [
            sample
            for split in query.splits(cache)
            for sample in query.select(
                cache,
                "sample_id, verifier, prompt, completion, reference",
                where,
                split,
                "AND verifier IS NOT NULL" + ("" if renew else " AND reward IS NULL"),
            ).to_pylist()
        ]
        sandbox = verifiers.sandbox_for((sample["verifier"] for sample in todo), unsafe)
        known = {row["sample_id"]: row for row in _read(cache)}
        saved, counts = time.monotonic(), {"right": 0, "wrong": 0, "not_judged": 0}
        for first in range(0, len(todo), AT_ONCE):
            some = todo[first : first + AT_ONCE]
            items = [
                (sample["verifier"], whole_turn(sample["prompt"], sample["completion"]), sample["reference"])
                for sample in some
            ]
            shown = partial(_show_all, show, first, len(todo))
            for sample, verdict in zip(some, verifiers.verify_many(items, sandbox, show=shown)):
                row = {"sample_id": sample["sample_id"], "reward": verdict.reward, "reason": verdict.reason}
                known[sample["sample_id"]] = row
                counts["not_judged" if verdict.reward is None else "right" if verdict.reward >= 1 else "wrong"] += 1
            if time.monotonic() - saved > SAVE_SECONDS:
                _write(cache, known)
                saved = time.monotonic()
        _write(cache, known)
    return {"cache": str(cache), "judged": len(todo), **counts}


def _show_all(show: ShowProgress, before: int, total: int, progress: Progress) -> None:
    """Show the progress of a part as that of the whole."""
    show(replace(progress, done=before + progress.done, total=total))


def prepare(cache: Location) -> None:
    """An empty rewards.parquet, so that the views open in any client."""
    if not (cache / REWARDS_FILE).is_file():
        _write(cache, {})


def forget(cache: Location) -> None:
    """Strike the rewards of samples that are no longer in any shard: their shard is to be written anew."""
    rows = _read(cache)
    if rows:
        there = {
            sample_id
            for name in integrity.readable_shards(cache)
            for sample_id in pq.read_table(storage.opened(cache / name), columns=["sample_id"])["sample_id"].to_pylist()
        }
        _write(cache, {row["sample_id"]: row for row in rows if row["sample_id"] in there})


def _read(cache: Location) -> list[dict[str, Any]]:
    """The rows, in the file's order: of several of one sample the last holds."""
    path = cache / REWARDS_FILE
    if not path.is_file():
        return []
    integrity.check_table(cache, REWARDS_FILE)
    try:
        return pq.read_table(storage.whole(path), schema=REWARDS, page_checksum_verification=True).to_pylist()
    except integrity.UNREADABLE as error:
        raise KDError(f"{path} is damaged ({first_line(error)}); {integrity.REWARDS_WAY_OUT}", 3) from None


def _write(cache: Location, rows: dict[str, dict[str, Any]]) -> None:
    writer.write_table(cache / REWARDS_FILE, pa.Table.from_pylist(list(rows.values()), REWARDS))
