"""Whether a cache is whole and true.

proof.py          what every reader checks before it reads: is this file the one that was written?
verification.py   ``kd cache verify``: read everything anew, file by file; and ``--repair``
shard_checks.py   what ``kd cache verify`` checks in one shard: its bytes, its metadata, its row groups
row_checks.py     the invariants of the numbers in a row group, one function each
old_policy.py     what caches of completion policy 1 show of it
"""

from kdcache.cache.integrity.proof import REWARDS_WAY_OUT, check_table, readable_shards, unplanned_files
from kdcache.cache.integrity.shard_checks import examine
from kdcache.cache.integrity.verification import Verification, repair, verify
from kdcache.cache.shard import UNREADABLE

__all__ = [
    "REWARDS_WAY_OUT",
    "UNREADABLE",
    "Verification",
    "check_table",
    "examine",
    "readable_shards",
    "repair",
    "unplanned_files",
    "verify",
]
