"""Where a cache is: in a folder, or on an object store of fsspec (``s3://bucket/cache``, ``gs://``, ``hf://``).

A location is a ``pathlib.Path`` or a ``RemotePath`` with the same methods. Invariant: where the two need different code
(to name a finished file, to list, to read for DuckDB or for a trainer), that code is chosen here and nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kdcache.errors import KDError
from kdcache.storage import ranges
from kdcache.storage.remote import RemotePath, WriteError, parse

__all__ = ["Location", "RemotePath", "WriteError"]

Location = Path | RemotePath

DUCKDB_SCHEME = "kdcache"


def location(where: str | Path | RemotePath) -> Location:
    """Return the location that a path or a URL names; UsageError for a URL with credentials."""
    if not isinstance(where, str) or "://" not in where:
        return where if isinstance(where, RemotePath) else Path(where)
    if where.startswith(("file://", "local://")):
        return Path(where.partition("://")[2])
    return parse(where)


def files(folder: Location) -> dict[str, Any]:
    """Return the locations of a folder's files by name, without hidden ones, from one listing."""
    if isinstance(folder, RemotePath):
        paths: list[Any] = folder.listing()
    else:
        paths = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return {path.name: path for path in paths if not path.name.startswith(".")}


# --- links ------------------------------------------------------------------------------------------------------------


def real_file(path: Path, folder: Path) -> Path:
    """Return the file that a path in ``folder`` leads to. KDError if it is a link that leads out of the folder.

    A snapshot in the Hub's own cache consists of links into the folder ``blobs`` beside it, which count as inside.
    """
    real, root = path.resolve(), folder.resolve()
    if not any(real.is_relative_to(allowed) for allowed in (root, *_blobs(root))):
        raise KDError(f"{path} is a link to {real}, which is outside of {folder}: put what it leads to in its place")
    return real


def _blobs(root: Path) -> list[Path]:
    """Return where the files of a Hub snapshot are: REPO/blobs for REPO/snapshots/REVISION. Empty for other folders."""
    return [p.parent / "blobs" for p in root.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir()]


def linked_files(cache: Location) -> list[Path]:
    """Return the real files behind those files of a cache that are links. KDError for a link that leads elsewhere.

    ``data`` itself may be a link to any folder, for example on a larger disk. Links in it may not leave that folder.
    """
    if isinstance(cache, RemotePath):
        return []
    data = cache / "data"
    shards = [path for path in data.glob("*.parquet") if path.is_symlink() or data.is_symlink()]
    return [
        *(real_file(path, data if data.is_symlink() else cache) for path in shards),
        *(real_file(path, cache) for name in _READ if (path := cache / name).is_symlink()),
    ]


_READ = ("plan.json", "manifest.json", "vocab.parquet", "rewards.parquet", "rejected.jsonl")


# --- writing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(path: Location) -> Iterator[Path]:
    """Yield a local name to write to before the file becomes ``path``: beside it, or in the temporary folder."""
    if isinstance(path, RemotePath):
        temporary = Path(tempfile.gettempdir()) / f"kdcache-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
    else:
        temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def create(temporary: Path, path: Location) -> bool:
    """Give a complete file its final name. Return False, and change nothing, if another file has that name already."""
    if isinstance(path, RemotePath):
        return path.upload(temporary, create=True)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links: a rename is atomic too, and may replace a shard only by an equal one
        os.replace(temporary, path)
    sync(path.parent)
    return True


def replace(temporary: Path, path: Location) -> None:
    """Give a complete file its final name, and replace the file that has it."""
    if isinstance(path, RemotePath):
        path.upload(temporary)
        return
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or the names in a folder, to the disk."""
    # Some file systems refuse to sync a folder.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_bytes(folder: Location) -> int:
    """Return the free disk space where files are written; for a remote location, that of the temporary folder."""
    path = Path(tempfile.gettempdir()) if isinstance(folder, RemotePath) else folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# --- reading ----------------------------------------------------------------------------------------------------------


def opened(path: Location) -> Any:
    """Return what pyarrow reads parts of a file from; of a remote file, only the bytes that it reads are fetched."""
    return ranges.opened(path) if isinstance(path, RemotePath) else path


def fetched(path: Location) -> Path | io.BytesIO:
    """Return what pyarrow reads all of a file from; a remote file is fetched once, into memory."""
    return io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path


def sha256(source: Location | io.BytesIO) -> str:
    """Return the sha256 of a file's bytes, as hexadecimal digits."""
    if isinstance(source, RemotePath):
        return source.sha256()
    with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet(path: Location, row_group: int | None = None) -> pq.ParquetFile:
    """Open a shard to read its footer, or one row group; of a remote shard, only these are fetched."""
    if isinstance(path, RemotePath):
        return ranges.parquet(path, row_group)
    return pq.ParquetFile(path, page_checksum_verification=True)


def prefetch(path: Location, row_group: int) -> None:
    """Begin to fetch a row group that will be read soon. Does nothing for a folder, and raises no error."""
    if isinstance(path, RemotePath):
        ranges.prefetch(path, row_group)


def wait(path: Location, row_group: int) -> None:
    """Wait at most a minute until another process of this machine has fetched a row group; not for a folder."""
    if isinstance(path, RemotePath):
        ranges.wait(path, row_group)


def raise_remote_error(error: Exception) -> None:
    """Raise the KDError quoted in an error of DuckDB, if any: DuckDB passes on errors of a file system as text."""
    if quoted := re.search(r"KDError: ([^\n]*)", str(error)):
        raise KDError(quoted[1]) from None


def duckdb_pattern(path: str) -> str:
    """Return a pattern that DuckDB matches only with this path: ``*``, ``?`` and ``[`` are escaped."""
    return re.sub(r"([*?[])", r"[\1]", path)


def duckdb_folder(connection: Any, cache: Location) -> str:
    """Return the cache's folder as DuckDB normalises it, for the list of folders that queries may read.

    For a remote cache, register a file system whose root is the cache, so that no query can name another place.
    """
    if not isinstance(cache, RemotePath):
        return str(cache.resolve())
    connection.register_filesystem(ranges.for_duckdb(cache, DUCKDB_SCHEME))
    return f"{DUCKDB_SCHEME}://cache"
