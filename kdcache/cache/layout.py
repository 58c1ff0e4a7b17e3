"""The names of the files in a cache, each written once.

    CACHE/
      README.md  plan.json  manifest.json  vocab.parquet  rewards.parquet  rejected.jsonl
      data/{split}-{shard:05d}.parquet
      set-aside/          files in which `kd cache verify --repair` found a problem

A shard's *name* is its path in the cache (``data/train-00000.parquet``); its *file* is the last part of that.
"""

from __future__ import annotations

import re
from pathlib import Path

from kdcache import storage
from kdcache.cache.format import SPLITS
from kdcache.storage import Location

CARD_FILE = "README.md"
PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
VOCAB_FILE = "vocab.parquet"
REWARDS_FILE = "rewards.parquet"  # verdicts that kd verify-answers reached after the capture
REJECTED_FILE = "rejected.jsonl"
DATA_FOLDER = "data"
SET_ASIDE_FOLDER = "set-aside"

#: The name of any shard.
SHARD_NAME = re.compile(rf"{DATA_FOLDER}/({'|'.join(SPLITS)})-\d{{5,}}\.parquet")


def shard_name(split: str, shard: int) -> str:
    """Return the name of a split's shard, counted from 0."""
    return f"{DATA_FOLDER}/{split}-{shard:05d}.parquet"


def shards_pattern(split: str) -> str:
    """Return the glob pattern that fits the names of a split's shards, for other programs to read."""
    return f"{DATA_FOLDER}/{split}-*.parquet"


def split_of_shard(path: Path | str) -> str:
    """Return the split that a shard belongs to, from its name, file or path."""
    return Path(path).name.rsplit("-", 1)[0]


def file_of_shard(name: str) -> str:
    """Return the file of a shard in data/, from its name."""
    return name.removeprefix(f"{DATA_FOLDER}/")


def name_of_shard(file: str) -> str:
    """Return the name of a shard, from its file in data/."""
    return f"{DATA_FOLDER}/{file}"


def stored_files(cache: Location) -> dict[str, Location]:
    """List the files in data/ by shard name, in the order of their names, whether the plan knows them or not."""
    return {name_of_shard(file): path for file, path in storage.files(cache / DATA_FOLDER).items()}
