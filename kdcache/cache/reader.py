"""An opened cache: its plan, and samples from its row groups. No torch.

    cache = Cache("data/cache")
    files, table = cache.lengths("train")
    samples = cache.read(files[0], row_group=0, rows=[0, 1, 2])

Invariant: a shard is read only once it is proved to be what was written (integrity/proof.py). A remote shard proves it
by the checksums of the pages that are fetched, and by its numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache import storage
from kdcache.cache import integrity, shard, sparsify
from kdcache.cache.documents import read_plan
from kdcache.cache.layout import VOCAB_FILE, file_of_shard, name_of_shard, split_of_shard, stored_files
from kdcache.cache.samples import (
    TENSOR_COLUMNS,
    TOKEN_COLUMNS,
    Sample,
    entropy_unstored,
    normalise,
    unpack,
)
from kdcache.cache.sparsify import Policy
from kdcache.errors import KDError, UsageError
from kdcache.storage import Location

__all__ = ["TENSOR_COLUMNS", "TOKEN_COLUMNS", "Cache", "Sample", "entropy_unstored", "normalise"]


class Cache:
    """A complete cache. No file stays open, and nothing is kept in memory but the plan and the sizes of row groups.

    Its methods name a shard by its file in data/ (``train-00000.parquet``). They raise KDError (3) for a damaged shard
    or one of another cache.
    """

    def __init__(self, path: Location | str):
        self.path = storage.location(path)
        self.plan = read_plan(self.path)
        self.fingerprint: str = self.plan["fingerprint"]
        fields = self.plan["fields"]
        try:
            self.policy: Policy = sparsify.parse(fields["sparsify"], fields.get("capture_k"))
        except UsageError:
            raise KDError(
                f"{self.path} was made with the policy {fields['sparsify']}, which this version does not know"
            ) from None
        storage.linked_files(self.path)
        self._paths = stored_files(self.path)  # by shard name
        self._proved_splits: set[str] = set()
        self._row_groups: dict[str, list[int]] = {}
        self._check_complete()

    def _check_complete(self) -> None:
        planned = [entry["name"] for entry in self.plan["shards"]]
        missing = [name for name in planned if name not in self._paths]
        if missing:
            raise KDError(
                f"{self.path} is not complete: {len(missing)} of {len(planned)} shards are missing (the first is "
                f"{missing[0]}); run the same kd cache-teacher command again to fill them"
            )

    # --- what is in it ---

    def row_groups(self, file: str) -> list[int]:
        """Return the number of rows in each row group of a shard."""
        if file not in self._row_groups:
            with self._opened(file) as opened:
                self._row_groups[file] = opened.row_groups
        return self._row_groups[file]

    def lengths(self, split: str) -> tuple[list[str], np.ndarray]:
        """List the samples of a split in file order, without SQL.

        Returns the files that hold any, and an int64 table [samples, 4]: index of the file, row in it, prompt tokens,
        completion tokens.
        """
        self._prove(split)
        names = sorted(entry["name"] for entry in self.plan["shards"] if split_of_shard(entry["name"]) == split)
        files = [file_of_shard(name) for name in names]
        with ThreadPoolExecutor(8) as pool:  # a remote shard takes a request or two
            lengths_by_file = dict(zip(files, pool.map(self._lengths, files)))
        filled = {file: lengths for file, lengths in lengths_by_file.items() if len(lengths)}
        columns = [
            np.column_stack([np.full(len(lengths), number), np.arange(len(lengths)), lengths])
            for number, lengths in enumerate(filled.values())
        ]
        return list(filled), np.concatenate(columns) if columns else np.zeros((0, 4), np.int64)

    def _lengths(self, file: str) -> np.ndarray:
        """Return int64 [rows, 2]: prompt and completion tokens of each row of a shard."""
        with self._opened(file) as opened:
            self._row_groups[file] = opened.row_groups
            if not opened.row_groups:  # all rows of its slice were rejected
                return np.zeros((0, 2), np.int64)
            table = opened.read(["split", "prompt_tokens", "completion_tokens"])
            if table["split"].unique().to_pylist() != [split_of_shard(file)]:
                raise ValueError(f"it has rows whose split is not {split_of_shard(file)}")
            lengths = [table[name].to_numpy() for name in ("prompt_tokens", "completion_tokens")]
            return np.column_stack(lengths).astype(np.int64, copy=False)

    # --- reading ---

    def read(self, file: str, row_group: int, rows: Sequence[int], columns: Sequence[str] = ()) -> list[Sample]:
        """Return the samples at ``rows`` of a row group, in that order; ``columns`` are of TOKEN_COLUMNS."""
        table = self.table(file, row_group, (*TENSOR_COLUMNS, *columns))
        with shard.reading(self._path(file)):
            return unpack(table, rows)

    def samples(self, split: str, columns: Sequence[str] = ()) -> Iterator[Sample]:
        """Yield the samples of a split in file order, a row group in memory at a time; ``columns`` are of TOKEN_COLUMNS."""
        files, _ = self.lengths(split)
        for file in files:
            for row_group, rows in enumerate(self.row_groups(file)):
                yield from self.read(file, row_group, range(rows), columns)

    def table(self, file: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Return ``columns`` of a row group as they are stored; a column that the shard lacks is left out."""
        with self._opened(file, row_group) as opened:
            return opened.read_row_group(row_group, columns)

    def vocabulary(self, column: str) -> pa.ChunkedArray:
        """Return one column of vocab.parquet: a value per token id."""
        integrity.check_table(self.path, VOCAB_FILE)
        path = self.path / VOCAB_FILE
        with shard.reading(path):
            return pq.read_table(storage.opened(path), columns=[column], page_checksum_verification=True)[column]

    def prefetch(self, file: str, row_group: int) -> None:
        """Begin to fetch a row group of a remote cache that will be read soon."""
        storage.prefetch(self._path(file), row_group)

    def wait(self, file: str, row_group: int) -> None:
        """Wait until another process of this machine has fetched a row group of a remote cache."""
        storage.wait(self._path(file), row_group)

    # --- opening a shard ---

    def _path(self, file: str) -> Location:
        name = name_of_shard(file)
        return self._paths.get(name, self.path / name)

    @contextlib.contextmanager
    def _opened(self, file: str, row_group: int | None = None) -> Iterator[shard.ShardFile]:
        """Open a shard that is proved to be what was written, and is this cache's."""
        self._prove(split_of_shard(file))
        path = self._path(file)
        with shard.opened(path, row_group) as opened:
            if problem := shard.misplaced(opened.metadata, name_of_shard(file), self.fingerprint):
                raise KDError(f"{path} {problem}; {shard.WAY_OUT}", 3)
            yield opened

    def _prove(self, split: str) -> None:
        """Check that the shards of a split are what was written, once per split."""
        if split not in self._proved_splits:
            integrity.readable_shards(self.path, split)
            self._proved_splits.add(split)
