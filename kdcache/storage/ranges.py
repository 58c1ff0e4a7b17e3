"""Read parts of a remote cache: only the bytes that pyarrow, DuckDB or a trainer read are fetched.

Footers and row groups go through the disk cache, so that each is fetched once. Checksums of pages are checked.
"""

from __future__ import annotations

import fnmatch
import io
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import KDError
from kdcache.storage import diskcache
from kdcache.storage.remote import RemotePath

#: How much of a file's end is fetched first: DuckDB reads that much, and our footers are seldom longer.
ENDING_BYTES = 16384


class Ranges(io.RawIOBase):
    """An object as a file: each read is one ranged request, unless ``pieces`` {start: bytes} hold those bytes."""

    def __init__(self, path: RemotePath, pieces: dict[int, bytes] | None = None):
        assert path.size is not None
        self.path, self.size, self.position = path, path.size, 0
        self.pieces = pieces or {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.position + size, self.size)
        start, self.position = self.position, max(end, self.position)
        if end <= start:
            return b""
        for first, piece in self.pieces.items():
            if first <= start and end <= first + len(piece):
                return piece[start - first : end - first]
        return self.path.read_range(start, end)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def opened(path: RemotePath) -> pa.PythonFile:
    """Return a file for pyarrow: each read is one request for those bytes. Only the end is kept on the disk."""
    return pa.PythonFile(_with_ending(path.with_info()), mode="r")


def parquet(path: RemotePath, row_group: int | None) -> pq.ParquetFile:
    """Open a shard to read its footer, or one row group; only these are fetched."""
    path = path.with_info()
    metadata = _footer(path)
    pieces = {}
    if row_group is not None:
        start, end = _span(metadata, row_group)
        pieces[start] = _piece(path, start, end)
    file = pa.PythonFile(Ranges(path, pieces), mode="r")
    return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)


def prefetch(path: RemotePath, row_group: int) -> None:
    """Begin to fetch a row group that will be read soon, in a thread."""
    diskcache.prefetch(lambda: parquet(path, row_group).close())


def wait(path: RemotePath, row_group: int) -> None:
    """Wait until another process of this machine has fetched a row group, for at most a minute."""
    path = path.with_info()
    diskcache.wait(_key(path, *_span(_footer(path), row_group)))


def _footer(path: RemotePath) -> pq.FileMetaData:
    size = path.size or 0
    ending = _piece(path, max(size - ENDING_BYTES, 0), size)
    length = int.from_bytes(ending[-8:-4], "little") + 8
    if ending[-4:] != b"PAR1" or length > size:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    footer = ending[-length:] if length <= len(ending) else _piece(path, size - length, size)
    return pq.read_metadata(pa.BufferReader(footer))


def _span(metadata: pq.FileMetaData, row_group: int) -> tuple[int, int]:
    """Return the bytes [start, end) of a row group: its column chunks are stored one after the other."""
    group = metadata.row_group(row_group)
    chunks = [group.column(i) for i in range(group.num_columns)]
    starts = [min(c.dictionary_page_offset or c.data_page_offset, c.data_page_offset) for c in chunks]
    return min(starts), max(s + c.total_compressed_size for s, c in zip(starts, chunks))


def _piece(path: RemotePath, start: int, end: int) -> bytes:
    return diskcache.get(_key(path, start, end), lambda: path.read_range(start, end))


def _key(path: RemotePath, start: int, end: int) -> str:
    return f"{path} {path.size} {path.version} {start} {end}"


def _with_ending(path: RemotePath) -> Ranges:
    start = max((path.size or 0) - ENDING_BYTES, 0)
    return Ranges(path, {start: _piece(path, start, path.size or 0)})


def for_duckdb(cache: RemotePath, scheme: str) -> Any:
    """Return a read-only file system for DuckDB whose root is the cache, so that no query can name anything else.

    The cache is listed once, here: a file that is added later is visible to the next connection.
    """
    from fsspec import AbstractFileSystem

    folders = {"cache": cache.listing(), "cache/data": (cache / "data").listing()}
    files = {f"{folder}/{path.name}": path for folder, paths in folders.items() for path in paths}

    class CacheFiles(AbstractFileSystem):
        """The cache's files in two folders, under the names ``cache/NAME`` and ``cache/data/NAME``."""

        protocol = scheme
        cachable = False

        def _find(self, path: str) -> RemotePath:
            name = self._strip_protocol(path).strip("/")
            if name not in files:
                raise FileNotFoundError(f"{path} is not in the cache")
            return files[name]

        def glob(self, path: str, **_: Any) -> list[str]:
            name = self._strip_protocol(path).strip("/")
            return [name] if name in files else fnmatch.filter(files, name)

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": self._strip_protocol(path), "size": self._find(path).size, "type": "file"}

        def exists(self, path: str, **_: Any) -> bool:
            return self._strip_protocol(path).strip("/") in files

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
            names = [f"{path}/{file.name}" for file in folders.get(self._strip_protocol(path).strip("/"), ())]
            return [self.info(name) for name in names] if detail else names

        def modified(self, path: str) -> datetime:
            return datetime.fromtimestamp(self._find(path).mtime_ns / 1e9, UTC)

        def open(self, path: str, mode: str = "rb", **_: Any) -> Ranges:
            if mode != "rb":
                raise KDError("only SELECT and EXPLAIN are run: a cache is read, never written", 2)
            return _with_ending(self._find(path))

    return CacheFiles()
