"""Judges the answers of an existing cache, into a file beside the shards. Invariant: no shard changes.

    kd verify-answers data/codeforces

rewards.parquet has a row per judged sample (sample_id, reward, reason). In the view ``samples`` its rewards replace
those found at capture. The whole file is rewritten every minute, so that an interruption loses a minute of verdicts at
most.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import integrity, query, shard, writer
from kdcache.cache.documents import read_plan
from kdcache.cache.layout import REWARDS_FILE
from kdcache.judge import verifiers
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.prompts.thoughts import whole_turn
from kdcache.storage import Location, lock

REWARDS = pa.schema(
    [pa.field("sample_id", pa.string()), pa.field("reward", pa.float32()), pa.field("reason", pa.string())]
)
SAVE_SECONDS, BATCH = 60.0, 64


def verify_answers(
    cache: Location,
    renew: bool = False,
    unsafe: bool = False,
    where: str | None = None,
    show: ShowProgress = silent,
) -> dict[str, Any]:
    """Judge the samples that have a verifier and no reward yet (``renew``: all with a verifier); return the counts.

    ``where`` is an SQL condition on the samples. KDError if programs must be run and cannot be.
    """
    read_plan(cache)  # KDError before the lock makes a folder, if there is no cache
    with lock.held(cache):
        samples = [
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
        sandbox = verifiers.sandbox_for((sample["verifier"] for sample in samples), unsafe)
        rows = {row["sample_id"]: row for row in _read(cache)}
        save_seconds, counts = time.monotonic(), {"right": 0, "wrong": 0, "not_judged": 0}
        for first in range(0, len(samples), BATCH):
            batch = samples[first : first + BATCH]
            items = [
                (sample["verifier"], whole_turn(sample["prompt"], sample["completion"]), sample["reference"])
                for sample in batch
            ]
            show_batch = partial(_show_whole, show, first, len(samples))
            for sample, verdict in zip(batch, verifiers.verify_many(items, sandbox, show=show_batch)):
                row = {"sample_id": sample["sample_id"], "reward": verdict.reward, "reason": verdict.reason}
                rows[sample["sample_id"]] = row
                counts["not_judged" if verdict.reward is None else "right" if verdict.reward >= 1 else "wrong"] += 1
            if time.monotonic() - save_seconds > SAVE_SECONDS:
                _write(cache, rows)
                save_seconds = time.monotonic()
        _write(cache, rows)
    return {"cache": str(cache), "judged": len(samples), **counts}


def _show_whole(show: ShowProgress, before: int, total: int, progress: Progress) -> None:
    """Show the progress of a batch as that of all samples."""
    show(replace(progress, done=before + progress.done, total=total))


def prepare(cache: Location) -> None:
    """Write an empty rewards.parquet unless there is one, so that the views open in any client."""
    if not (cache / REWARDS_FILE).is_file():
        _write(cache, {})


def forget(cache: Location) -> None:
    """Remove the rewards of samples that are in no shard any more: their shard will be written again."""
    rows = _read(cache)
    if rows:
        sample_ids = {sample_id for name in integrity.readable_shards(cache) for sample_id in _sample_ids(cache / name)}
        _write(cache, {row["sample_id"]: row for row in rows if row["sample_id"] in sample_ids})


def _sample_ids(path: Location) -> list[str]:
    with shard.opened(path) as opened:
        return opened.read(["sample_id"])["sample_id"].to_pylist()


def _read(cache: Location) -> list[dict[str, Any]]:
    """Return the rows in the file's order. If a sample has several, the last one counts."""
    path = cache / REWARDS_FILE
    if not path.is_file():
        return []
    integrity.check_table(cache, REWARDS_FILE)
    with shard.reading(path, integrity.REWARDS_WAY_OUT):
        return pq.read_table(storage.fetched(path), schema=REWARDS, page_checksum_verification=True).to_pylist()


def _write(cache: Location, rows: dict[str, dict[str, Any]]) -> None:
    writer.write_table(cache / REWARDS_FILE, pa.Table.from_pylist(list(rows.values()), REWARDS))
