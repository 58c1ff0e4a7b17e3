"""The names of the files in a cache."""

from __future__ import annotations

from pathlib import Path

REWARDS_FILE = "rewards.parquet"  # beside the shards: what was found out about samples afterwards


def shard_name(split: str, shard: int) -> str:
    return f"data/{split}-{shard:05d}.parquet"


def split_of_shard(path: Path | str) -> str:
    return Path(path).name.rsplit("-", 1)[0]
