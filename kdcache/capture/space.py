"""Disk space: how much a capture will take, and what to say when there is none left."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from kdcache import storage
from kdcache.capture.plan import Plan
from kdcache.errors import KDError
from kdcache.storage import Location

#: Bytes that one candidate (id and log-probability) takes on disk, by precision, and that the other columns take per
#: token. Both were measured on real text; they serve predictions alone.
BYTES_PER_CANDIDATE = {"q8": 2.3, "f32": 4.9}
OTHER_BYTES_PER_TOKEN = 25


def bytes_per_token(plan: Plan) -> float:
    """Predict the bytes per completion token: at most, as ``threshold`` rarely keeps as many candidates as it may."""
    return plan.sparsifier.most_candidates * BYTES_PER_CANDIDATE[plan.config.precision] + OTHER_BYTES_PER_TOKEN


@contextlib.contextmanager
def needs_space(folder: Location, what: str, about_bytes: float) -> Iterator[None]:
    """Turn a full disk into a KDError that says what is needed and what is free. Whole shards stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise KDError(
            f"disk full: {what} needs about {about_bytes / 1e6:.1f} MB, and {storage.free_bytes(folder) / 1e6:.1f} MB "
            f"are free at {folder}. Whole shards are kept; make room and run the same command again"
        ) from None
