"""Where kdcache finds what comes with it, and keeps what it prepares once."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Where kdcache keeps what it prepares once."""
    return Path(os.path.expanduser(os.environ.get("KDCACHE_HOME") or "~/.cache/kdcache"))


def resource_folder(name: str) -> Path:
    """``sql`` or ``recipes``: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
