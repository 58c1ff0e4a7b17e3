"""Reading parts of a remote cache: what pyarrow, DuckDB and a trainer ask for is fetched, and nothing else of a shard.

Footers and row groups go through the disk cache, so that each is fetched once. Pages carry checksums, as in a folder.
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

#: The end of a Parquet file that DuckDB asks for first; our footers are seldom longer.
ENDING_BYTES = 16384


class Ranges(io.RawIOBase):
    """An object as a file: reads are ranged requests, unless ``pieces`` {start: bytes} hold what is asked for."""

    def __init__(self, path: RemotePath, pieces: dict[int, bytes] | None = None):
        assert path.size is not None
        self.path, self.size, self.at = path, path.size, 0
        self.pieces = pieces or {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size is None or size < 0 else min(self.at + size, self.size)
        start, self.at = self.at, max(end, self.at)
        if end <= start:
            return b""
        for first, piece in self.pieces.items():
            if first <= start and end <= first + len(piece):
                return piece[start - first : end - first]
        return self.path.read_range(start, end)

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def opened(path: RemotePath) -> pa.PythonFile:
    """What pyarrow reads a file from: each read is one request for just those bytes, but that the ending is kept."""
    return pa.PythonFile(_with_ending(path.with_info()), mode="r")


def parquet(path: RemotePath, row_group: int | None) -> pq.ParquetFile:
    """A shard, opened to read its footer or one row group: these alone are fetched."""
    path = path.with_info()
    metadata = _footer(path)
    pieces = {}
    if row_group is not None:
        start, end = _span(metadata, row_group)
        pieces[start] = _piece(path, start, end)
    file = pa.PythonFile(Ranges(path, pieces), mode="r")
    return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)


def prefetch(path: RemotePath, row_group: int) -> None:
    """Begin to fetch a row group that will be read soon."""
    diskcache.soon(lambda: parquet(path, row_group).close())


def expect(path: RemotePath, row_group: int) -> None:
    """Wait until another process of this machine has fetched a row group, if it does in reasonable time."""
    path = path.with_info()
    diskcache.expect(_key(path, *_span(_footer(path), row_group)))


def _footer(path: RemotePath) -> pq.FileMetaData:
    size = path.size or 0
    ending = _piece(path, max(size - ENDING_BYTES, 0), size)
    length = int.from_bytes(ending[-8:-4], "little") + 8
    if ending[-4:] != b"PAR1" or length > size:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    footer = ending[-length:] if length <= len(ending) else _piece(path, size - length, size)
    return pq.read_metadata(pa.BufferReader(footer))


def _span(metadata: pq.FileMetaData, row_group: int) -> tuple[int, int]:
    """The bytes [start, end) of a row group: its column chunks stand one after the other."""
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
    """A file system for DuckDB whose root is the cache: it can name nothing else, and opens nothing for writing.

    What is there is looked up once: a cache that grows is seen by the next connection.
    """
    from fsspec import AbstractFileSystem

    there = {"cache": cache.listing(), "cache/data": (cache / "data").listing()}
    known = {f"{folder}/{path.name}": path for folder, paths in there.items() for path in paths}

    class CacheFiles(AbstractFileSystem):
        protocol = scheme
        cachable = False

        def _find(self, path: str) -> RemotePath:
            name = self._strip_protocol(path).strip("/")
            if name not in known:
                raise FileNotFoundError(f"{path} is not in the cache")
            return known[name]

        def glob(self, path: str, **_: Any) -> list[str]:
            name = self._strip_protocol(path).strip("/")
            return [name] if name in known else fnmatch.filter(known, name)

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            return {"name": self._strip_protocol(path), "size": self._find(path).size, "type": "file"}

        def exists(self, path: str, **_: Any) -> bool:
            return self._strip_protocol(path).strip("/") in known

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
            names = [f"{path}/{found.name}" for found in there.get(self._strip_protocol(path).strip("/"), ())]
            return [self.info(name) for name in names] if detail else names

        def modified(self, path: str) -> datetime:
            return datetime.fromtimestamp(self._find(path).mtime_ns / 1e9, UTC)

        def open(self, path: str, mode: str = "rb", **_: Any) -> Ranges:
            if mode != "rb":
                raise KDError("only SELECT and EXPLAIN are run: a cache is read, never written", 2)
            return _with_ending(self._find(path))

    return CacheFiles()
