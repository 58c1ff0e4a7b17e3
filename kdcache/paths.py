"""Where kdcache finds what is packaged with it, and where it keeps what it prepares once.

This is also the one place that reads environment variables of the name KDCACHE_*; each of them has its function here.
(hatch_build.py, which runs without the package, reads one of its own.)
"""

from __future__ import annotations

import os
from pathlib import Path

from kdcache.errors import UsageError

#: ``--trust-remote-code``, for the processes that a command starts: Ray's workers, measurements, steps of a recipe.
TRUST = "KDCACHE_TRUST_REMOTE_CODE"


def resource_folder(name: str) -> Path:
    """Return the folder ``sql`` or ``recipes``: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


# --- environment variables --------------------------------------------------------------------------------------------


def home() -> Path:
    """Read KDCACHE_HOME: the folder of prepared models, hashes and pieces of remote caches (~/.cache/kdcache)."""
    return Path(os.path.expanduser(os.environ.get("KDCACHE_HOME") or "~/.cache/kdcache"))


def disk_cache_folder() -> Path:
    """Read KDCACHE_DISK_CACHE: the folder that keeps pieces of remote caches (``remote`` in ``home()``)."""
    folder = os.environ.get("KDCACHE_DISK_CACHE")
    return Path(os.path.expanduser(folder)) if folder else home() / "remote"


def disk_cache_limit_bytes() -> int:
    """Read KDCACHE_DISK_CACHE_GB: how much that folder may hold, in GB of 10^9 bytes (20); 0 keeps nothing."""
    return int(_number("KDCACHE_DISK_CACHE_GB", 20.0) * 1e9)


def remote_timeout_seconds() -> float:
    """Read KDCACHE_REMOTE_TIMEOUT: how long to wait for one answer of an object store, in seconds (30)."""
    return _number("KDCACHE_REMOTE_TIMEOUT", 30.0)


def code_is_trusted() -> bool:
    """Read KDCACHE_TRUST_REMOTE_CODE, which ``models.trust_remote_code`` sets: whether a model's own code may run."""
    return os.environ.get(TRUST) == "1"


def _number(name: str, default: float) -> float:
    try:
        return float(os.environ.get(name) or default)
    except ValueError:
        raise UsageError(f"{name}={os.environ[name]}: expected a number") from None
