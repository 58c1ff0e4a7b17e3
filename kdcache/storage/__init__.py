"""Where a cache is: a folder, or wherever fsspec goes (``s3://bucket/cache``, ``gs://``, ``hf://``).

A location is a ``pathlib.Path`` or a ``RemotePath`` with the same methods. What is done differently for the two (how a
file gets its name, who may write, how DuckDB and a trainer read) is decided here, so that no other module asks which it has.
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
    """A folder, or the location a URL names."""
    if not isinstance(where, str) or "://" not in where:
        return where if isinstance(where, RemotePath) else Path(where)
    if where.startswith(("file://", "local://")):
        return Path(where.partition("://")[2])
    return parse(where)


def files(folder: Location) -> dict[str, Any]:
    """The files of a folder by name, without hidden ones, in one listing."""
    if isinstance(folder, RemotePath):
        found: list[Any] = folder.listing()
    else:
        found = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return {path.name: path for path in found if not path.name.startswith(".")}


# --- links ------------------------------------------------------------------------------------------------------------


def real_file(path: Path, folder: Path) -> Path:
    """The file behind a name in ``folder``. KDError if a link leads out of it, by name.

    A snapshot of the Hub's own cache is made of links into the ``blobs`` beside it: those are the folder's files.
    """
    real, root = path.resolve(), folder.resolve()
    if not any(real.is_relative_to(inside) for inside in (root, *_blobs(root))):
        raise KDError(f"{path} is a link to {real}, which is outside of {folder}: put what it leads to in its place")
    return real


def _blobs(root: Path) -> list[Path]:
    """Where the files of a Hub snapshot are (REPO/snapshots/REVISION/... -> REPO/blobs); nothing for another folder."""
    return [p.parent / "blobs" for p in root.parents if p.name == "snapshots" and (p.parent / "blobs").is_dir()]


def linked_files(cache: Location) -> list[Path]:
    """The real files of those of a cache's files that are links. KDError for one that leads elsewhere.

    ``data`` may be a link to a folder anywhere, as on a larger disk; what is in it may not lead on to another.
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
    """A local name to write what will be ``path``: beside it, or for a remote one in the temporary folder."""
    if isinstance(path, RemotePath):
        temporary = Path(tempfile.gettempdir()) / f"kdcache-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
    else:
        temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def create(temporary: Path, path: Location) -> bool:
    """Give a whole file its name, which nothing has yet: False if something has (the first to come wins)."""
    if isinstance(path, RemotePath):
        return path.upload(temporary, create=True)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: rename is atomic too, and the slice's shards are equal
        os.replace(temporary, path)
    sync(path.parent)
    return True


def replace(temporary: Path, path: Location) -> None:
    """Put a whole file in the place of whatever has its name."""
    if isinstance(path, RemotePath):
        path.upload(temporary)
        return
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names."""
    # Not every file system lets a folder be synced.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_bytes(folder: Location) -> int:
    """Free where files are written: of a remote location, in the temporary folder they are staged in."""
    path = Path(tempfile.gettempdir()) if isinstance(folder, RemotePath) else folder.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


# --- reading ----------------------------------------------------------------------------------------------------------


def opened(path: Location) -> Any:
    """What pyarrow reads a file from; of a remote one, the bytes it asks for are fetched as it does."""
    return ranges.opened(path) if isinstance(path, RemotePath) else path


def whole(path: Location) -> Path | io.BytesIO:
    """What pyarrow reads all of a file from; a remote one is fetched once, into memory."""
    return io.BytesIO(path.read_bytes()) if isinstance(path, RemotePath) else path


def sha256(source: Location | io.BytesIO) -> str:
    if isinstance(source, RemotePath):
        return source.sha256()
    with open(source, "rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet(path: Location, row_group: int | None = None) -> pq.ParquetFile:
    """A shard, opened to read its footer or one row group; of a remote one, those alone are fetched."""
    if isinstance(path, RemotePath):
        return ranges.parquet(path, row_group)
    return pq.ParquetFile(path, page_checksum_verification=True)


def prefetch(path: Location, row_group: int) -> None:
    """Begin to fetch a row group that will be read soon; nothing for a folder. An error waits for the reading."""
    if isinstance(path, RemotePath):
        ranges.prefetch(path, row_group)


def expect(path: Location, row_group: int) -> None:
    """Wait until another process of this machine has fetched a row group, if it does in reasonable time."""
    if isinstance(path, RemotePath):
        ranges.expect(path, row_group)


def raise_remote_error(error: Exception) -> None:
    """Raise what went wrong in the file system given to DuckDB, which hands it on as text; nothing if that is not it."""
    if found := re.search(r"KDError: ([^\n]*)", str(error)):
        raise KDError(found[1]) from None


def duckdb_pattern(path: str) -> str:
    """What DuckDB takes for this path and no other: it reads ``*``, ``?`` and ``[`` in a name as a pattern."""
    return re.sub(r"([*?[])", r"[\1]", path)


def duckdb_folder(connection: Any, cache: Location) -> str:
    """The name under which DuckDB finds the cache, and nothing beside it, as it normalises it itself.

    A remote one gets a file system of its own: rooted at the cache, so that no query can name another place.
    """
    if not isinstance(cache, RemotePath):
        return str(cache.resolve())
    connection.register_filesystem(ranges.for_duckdb(cache, DUCKDB_SCHEME))
    return f"{DUCKDB_SCHEME}://cache"
