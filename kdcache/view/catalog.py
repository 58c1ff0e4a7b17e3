"""The catalog of a cache: where every sample is, which samples match a search, and in which order they are listed.

Invariant: no text is held. The index takes about 80 bytes per sample, and two more numbers per sample are measured once
somebody sorts by them. Both are computed in one background thread, and most methods wait for the index.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcache.cache import query
from kdcache.cache.format import SPLITS
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError, first_line

SORTS = ("cache", "uncertain", "worst", "longest", "failed")
MEASURED_SORTS = ("uncertain", "worst")
KEPT = 4  # searches, and in samples.py samples, that are remembered


@dataclass(frozen=True)
class Index:
    """All S samples in the cache's order: where each is, and the values that lists are filtered and sorted by."""

    files: list[str]
    sample_ids: pa.Array  # [S] string
    file: np.ndarray  # [S] int32 index into files
    row: np.ndarray  # [S] int32 row in the file
    split: np.ndarray  # [S] int8 index into SPLITS
    tokens: np.ndarray  # [S] int32 of the completion
    reward: np.ndarray  # [S] float32, NaN where there is none

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Measures:
    """Two means over the completion of each of S samples; NaN for a sample that is not measured."""

    entropy_nats: np.ndarray  # [S] float32
    cross_entropy_nats: np.ndarray  # [S] float32, the mean negative log-probability of the completion's tokens


class Catalog:
    """The samples of one cache. ``indexing`` begins at once; ``close`` ends all work. Methods are thread-safe."""

    def __init__(self, cache: Cache, path: Path):
        self.cache = cache
        self._connection = query.connect(path, memory_limit="512MB", views=("rewards", "samples"))
        self._query_lock = threading.Lock()
        self._searches: OrderedDict[str, np.ndarray] = OrderedDict()
        self._first_rows: dict[str, np.ndarray] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kd-view")
        self.indexing = self._pool.submit(self._read_index)
        self._measure_lock = threading.Lock()
        self._measures: Future[Measures] | None = None
        self._measured_files = 0
        self._closed = False

    def close(self) -> None:
        """Interrupt the work that is in progress, and wait until it has ended."""
        self._closed = True
        self._connection.interrupt()
        self._pool.shutdown(cancel_futures=True)
        with self._query_lock:
            self._connection.close()

    @property
    def index(self) -> Index:
        """The index, for which the first callers wait. KDError if the shards cannot be read or hold no sample."""
        return self.indexing.result()

    def select(self, search: str, sort: str, split: str, measures: Measures | None) -> np.ndarray:
        """Return the numbers of the samples that match, sorted. ``measures`` are needed for the MEASURED_SORTS."""
        index = self.index
        selected = self._matching(search)
        if split:
            selected = selected[index.split[selected] == SPLITS.index(split)]
        if sort == "cache":
            return selected
        keys = {"longest": -index.tokens, "failed": index.reward}
        if measures is not None:
            keys |= {"uncertain": -measures.entropy_nats, "worst": -measures.cross_entropy_nats}
        return selected[np.argsort(keys[sort][selected], kind="stable")]  # NaN comes last

    def place(self, sample: int) -> tuple[str, int, int]:
        """Return the file of a sample, the row group in it, and the row in that group."""
        index = self.index
        file, row = index.files[index.file[sample]], int(index.row[sample])
        if file not in self._first_rows:
            self._first_rows[file] = np.cumsum([0, *self.cache.row_groups(file)])
        group = int(np.searchsorted(self._first_rows[file], row, side="right")) - 1
        return file, group, row - int(self._first_rows[file][group])

    def number_of(self, sample_id: str) -> int:
        """Return the number of a sample. UsageError with ids that exist if there is none of this id."""
        ids, path = self.index.sample_ids, self.cache.path
        sample = pc.index(ids, sample_id).as_py()
        if sample >= 0:
            return sample
        similar = pc.filter(ids, pc.match_substring(ids, sample_id))[:3].to_pylist()
        hint = f"there is {', '.join(similar)}" if similar else f"the first one is {ids[0].as_py()}"
        raise UsageError(f"{path} has no sample {sample_id}; {hint}")

    # --- queries ------------------------------------------------------------------------------------------------------

    def _read_index(self) -> Index:
        split = f"list_position({list(SPLITS)}, split)"
        columns = (
            f"sample_id, file, file_row_number, {split} - 1 AS split, completion_tokens, "
            "coalesce(reward, 'nan') AS reward"
        )
        table = self._query(f"SELECT {columns} FROM samples ORDER BY {split}, file, file_row_number").combine_chunks()
        if not len(table):
            raise KDError(f"{self.cache.path} holds no sample: all rows were rejected (rejected.jsonl says why)")
        columns_by_name = {name: table[name].chunk(0) for name in table.column_names}
        files = columns_by_name["file"].dictionary_encode()
        # DLPack, because pyarrow's own conversion to numpy imports pandas: half of the time until the first list.
        values = {
            name: np.from_dlpack(columns_by_name[name])
            for name in ("file_row_number", "split", "completion_tokens", "reward")
        }
        return Index(
            files=files.dictionary.to_pylist(),
            sample_ids=columns_by_name["sample_id"],
            file=np.from_dlpack(files.indices),
            row=values["file_row_number"].astype(np.int32),
            split=values["split"].astype(np.int8),
            tokens=values["completion_tokens"],
            reward=values["reward"],
        )

    def _matching(self, search: str) -> np.ndarray:
        """Return the samples whose id, prompt or completion contains the text in any case, in the cache's order."""
        index, search = self.index, search.strip()
        if not search:
            return np.arange(len(index))
        if search not in self._searches:
            columns = ("sample_id", "prompt", "completion")
            condition = " OR ".join(f"contains(lower({column}), lower($text))" for column in columns)
            table = self._query(f"SELECT file, file_row_number FROM samples WHERE {condition}", {"text": search})
            numbers = {name: i for i, name in enumerate(index.files)}
            file = np.array([numbers[name] for name in table["file"].to_pylist()], dtype=np.int64)
            # File and row in one number each, so that one isin() finds the rows of the index.
            matches = file << 32 | np.asarray(table["file_row_number"], dtype=np.int64)
            selected = np.flatnonzero(np.isin(index.file.astype(np.int64) << 32 | index.row, matches))
            remember(self._searches, search, selected)
        return self._searches[search]

    def _query(self, sql: str, parameters: dict[str, Any] | None = None) -> pa.Table:
        with self._query_lock:
            try:
                return self._connection.sql(sql, params=parameters).to_arrow_table()
            except duckdb.Error as error:
                path = self.cache.path
                raise KDError(
                    f"{path}: its shards could not be read: {first_line(error)}; run: kd cache verify {path}", 3
                ) from None

    # --- measures -----------------------------------------------------------------------------------------------------

    def measures(self, begin: bool) -> Measures | None:
        """Return the measures of all samples; None until they are complete. ``begin`` starts measuring, once."""
        with self._measure_lock:
            if self._measures is None and begin:
                self._measures = self._pool.submit(self._measure)
            measures = self._measures
        return measures.result() if measures is not None and measures.done() else None

    @property
    def measured_share(self) -> float:
        """How much of the cache is measured, from 0 to 1."""
        return self._measured_files / max(len(self.index.files), 1)

    def _measure(self) -> Measures:
        index = self.index
        entropies = np.full(len(index), np.nan, np.float32)
        measures = Measures(entropies, entropies.copy())
        for number, file in enumerate(index.files):
            samples = np.flatnonzero(index.file == number)  # neighbours, in the order of rows
            start = 0
            for group, rows in enumerate(self.cache.row_groups(file)):
                if self._closed:
                    return measures
                table = self.cache.table(file, group, ("entropies", "token_logprobs"))
                part = samples[start : start + rows]
                measures.entropy_nats[part] = mean_of_lists(table["entropies"])
                measures.cross_entropy_nats[part] = -mean_of_lists(table["token_logprobs"])
                start += rows
            self._measured_files = number + 1
        return measures


def check_filters(sort: str, split: str) -> None:
    """UsageError if there is no such sort or split."""
    if sort not in SORTS:
        raise UsageError(f"sort {sort}: expected one of {', '.join(SORTS)}")
    if split and split not in SPLITS:
        raise UsageError(f"split {split}: expected one of {', '.join(SPLITS)}")


def mean_of_lists(column: pa.ChunkedArray) -> np.ndarray:
    """Return the mean of each of S lists, [S]; NaN for an empty one."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    values, offsets = np.asarray(lists.values, dtype=np.float64), np.asarray(lists.offsets)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    lengths = np.diff(offsets)
    return np.divide(
        sums[offsets[1:]] - sums[offsets[:-1]], lengths, out=np.full(len(lengths), np.nan), where=lengths > 0
    )


def remember(kept: OrderedDict[str, Any], key: str, value: Any) -> None:
    """Keep the last KEPT values. Two threads may compute the same value at once; either is right."""
    kept[key] = value
    while len(kept) > KEPT:
        try:
            kept.popitem(last=False)
        except KeyError:
            return
