"""What `kd view` shows of a cache: pages of samples, one sample's tokens, the candidates of some positions.

    kd view data/cache

Nothing of a cache is held whole: an index of about 80 bytes a sample, two numbers more once someone sorts by them, and
the few samples looked at last. No torch, no HTTP: what comes out are plain values that JSON can hold (a number that it
cannot, as the log of no mass, is None). Methods may be called from several threads.
"""

from __future__ import annotations

import codecs
import copy
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcache.cache import query
from kdcache.cache.format import SPLITS, round_logprobs
from kdcache.cache.reader import TOKEN_COLUMNS, Cache, Sample
from kdcache.cache.sparsify import Threshold
from kdcache.errors import KDError, UsageError, first_line

SORTS = ("cache", "uncertain", "worst", "longest", "failed")
PAGE = 50
SNIPPET = 160  # characters of a text in the list
KEPT = 4  # samples, and searches, remembered

TEXT_COLUMNS = ("sample_id", "source", "split", "task", "language", "origin", "prompt", "completion", "reference")


@dataclass(frozen=True)
class Index:
    """All S samples in the cache's order: where each is, and what lists are filtered and sorted by."""

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
class Shown:
    """One sample as it was read: its row's texts and its arrays, with those of TOKEN_COLUMNS."""

    number: int
    row: dict[str, Any]
    sample: Sample
    drawn: np.ndarray  # [N] bool: candidates of a threshold cache that stand for others


class View:
    """A cache that is being looked at. ``indexing`` goes on from the start, and most else waits for it; ``close`` ends it."""

    def __init__(self, path: Path):
        self.cache = Cache(path)
        self._connection = query.connect(path, memory_limit="512MB", views=("rewards", "samples"))
        self._asking = threading.Lock()
        self._starts: dict[str, np.ndarray] = {}
        self._vocabulary: pa.ChunkedArray | None = None
        self._frame: tuple[str, str] | None = None
        self._found: OrderedDict[str, np.ndarray] = OrderedDict()
        self._shown: OrderedDict[str, Shown] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kd-view")
        self.indexing = self._pool.submit(self._read_index)
        self._beginning = threading.Lock()
        self._measures: Future[dict[str, np.ndarray]] | None = None
        self._measured = 0  # files
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._connection.interrupt()
        self._pool.shutdown(cancel_futures=True)
        with self._asking:
            self._connection.close()

    @property
    def index(self) -> Index:
        return self.indexing.result()

    def about(self) -> dict[str, Any]:
        """What stands above the list: the cache's name, teacher and sizes."""
        index, fields = self.index, self.cache.plan["fields"]
        counts = np.bincount(index.split, minlength=len(SPLITS)).tolist()
        return {
            "cache": self.cache.path.resolve().name,
            "teacher": fields["teacher"],
            "sparsify": fields["sparsify"],
            "samples": len(index),
            "splits": {split: count for split, count in zip(SPLITS, counts) if count},
            "rewarded": bool(np.isfinite(index.reward).any()),
        }

    # --- the list -----------------------------------------------------------------------------------------------------

    def page(self, search: str = "", sort: str = "cache", split: str = "", offset: int = 0) -> dict[str, Any]:
        """``PAGE`` rows of the chosen samples from ``offset`` on, and how many were chosen.

        Where the sort needs what is not measured yet, measuring begins, and {"measuring": share done} is all there is.
        """
        if sort not in SORTS:
            raise UsageError(f"sort {sort}: expected one of {', '.join(SORTS)}")
        if split and split not in SPLITS:
            raise UsageError(f"split {split}: expected one of {', '.join(SPLITS)}")
        index = self.index
        measures = self._measures_of_all(begin=sort in ("uncertain", "worst"))
        if sort in ("uncertain", "worst") and measures is None:
            return {"measuring": self._measured / max(len(index.files), 1)}
        chosen = self._matching(search)
        if split:
            chosen = chosen[index.split[chosen] == SPLITS.index(split)]
        if sort != "cache":
            keys = {"longest": -index.tokens, "failed": index.reward}
            key = keys[sort] if sort in keys else -(measures or {})[sort]
            chosen = chosen[np.argsort(key[chosen], kind="stable")]  # NaN last
        shown = chosen[offset : offset + PAGE]
        return {"total": len(chosen), "offset": offset, "rows": self._rows(shown, measures)}

    def _rows(self, numbers: np.ndarray, measures: dict[str, np.ndarray] | None) -> list[dict[str, Any]]:
        index, texts = self.index, self._texts(numbers, ("prompt", "completion"))
        before, after = self._template()
        return [
            {
                "id": index.sample_ids[n].as_py(),
                "split": SPLITS[index.split[n]],
                "tokens": int(index.tokens[n]),
                "reward": number(index.reward[n]),
                "entropy": number(measures["uncertain"][n]) if measures else None,
                "ce": number(measures["worst"][n]) if measures else None,
                "prompt": _without(text["prompt"], before, after)[1][:SNIPPET],
                "completion": (text["completion"] or "")[:SNIPPET],
            }
            for n, text in zip(numbers.tolist(), texts)
        ]

    def _texts(self, numbers: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """``columns`` of the samples, in that order; each row group they are in is read once."""
        places = {n: self._place(int(n)) for n in numbers}
        found: dict[int, dict[str, Any]] = {}
        for file, group in sorted({place[:2] for place in places.values()}):
            table = self.cache.table(file, group, columns)
            found |= {n: table.slice(p[2], 1).to_pylist()[0] for n, p in places.items() if p[:2] == (file, group)}
        return [dict.fromkeys(columns) | found[n] for n in places]

    def _place(self, n: int) -> tuple[str, int, int]:
        """File, row group, and row in it."""
        index = self.index
        file, row = index.files[index.file[n]], int(index.row[n])
        if file not in self._starts:
            self._starts[file] = np.cumsum([0, *self.cache.row_groups(file)])
        group = int(np.searchsorted(self._starts[file], row, side="right")) - 1
        return file, group, row - int(self._starts[file][group])

    def _template(self) -> tuple[str, str]:
        """What the first prompts all begin and end with, to a tag or a line: the chat template, and no news."""
        if self._frame is None:
            texts = self._texts(range(min(len(self.index), PAGE)), ("prompt",))
            self._frame = common_frame([text["prompt"] or "" for text in texts])
        return self._frame

    # --- of all samples -----------------------------------------------------------------------------------------------

    def _read_index(self) -> Index:
        split = f"list_position({list(SPLITS)}, split)"
        columns = f"sample_id, file, file_row_number, {split} - 1 AS split, completion_tokens, coalesce(reward, 'nan') AS reward"
        table = self._ask(f"SELECT {columns} FROM samples ORDER BY {split}, file, file_row_number").combine_chunks()
        if not len(table):
            raise KDError(f"{self.cache.path} holds no sample: all rows were rejected (rejected.jsonl says why)")
        whole = {name: table[name].chunk(0) for name in table.column_names}
        files = whole["file"].dictionary_encode()
        # By DLPack, without pyarrow's own way to numpy, which imports pandas: half of the time until the first list.
        values = {
            name: np.from_dlpack(whole[name]) for name in ("file_row_number", "split", "completion_tokens", "reward")
        }
        return Index(
            files=files.dictionary.to_pylist(),
            sample_ids=whole["sample_id"],
            file=np.from_dlpack(files.indices),
            row=values["file_row_number"].astype(np.int32),
            split=values["split"].astype(np.int8),
            tokens=values["completion_tokens"],
            reward=values["reward"],
        )

    def _matching(self, search: str) -> np.ndarray:
        """The samples whose id, prompt or completion holds the text, in the cache's order, whatever its case."""
        index, search = self.index, search.strip()
        if not search:
            return np.arange(len(index))
        if search not in self._found:
            held = " OR ".join(f"contains(lower({c}), lower($text))" for c in ("sample_id", "prompt", "completion"))
            table = self._ask(f"SELECT file, file_row_number FROM samples WHERE {held}", {"text": search})
            numbers = {name: i for i, name in enumerate(index.files)}
            file = np.array([numbers[name] for name in table["file"].to_pylist()], dtype=np.int64)
            wanted = file << 32 | np.asarray(table["file_row_number"], dtype=np.int64)
            found = np.flatnonzero(np.isin(index.file.astype(np.int64) << 32 | index.row, wanted))
            _remember(self._found, search, found)
        return self._found[search]

    def _ask(self, sql: str, parameters: dict[str, Any] | None = None) -> pa.Table:
        with self._asking:
            try:
                return self._connection.sql(sql, params=parameters).to_arrow_table()
            except duckdb.Error as error:
                path = self.cache.path
                raise KDError(
                    f"{path}: its shards could not be read: {first_line(error)}; run: kd cache verify {path}", 3
                ) from None

    def _measures_of_all(self, begin: bool) -> dict[str, np.ndarray] | None:
        """Mean entropy and mean -log-probability of every sample, by the sort they serve; None until they are there."""
        with self._beginning:
            if self._measures is None and begin:
                self._measures = self._pool.submit(self._measure)
            measures = self._measures
        return measures.result() if measures is not None and measures.done() else None

    def _measure(self) -> dict[str, np.ndarray]:
        index = self.index
        found = {"uncertain": np.full(len(index), np.nan, np.float32), "worst": np.full(len(index), np.nan, np.float32)}
        for number, file in enumerate(index.files):
            mine = np.flatnonzero(index.file == number)  # neighbours, in the order of rows
            start = 0
            for group, rows in enumerate(self.cache.row_groups(file)):
                if self._closed:
                    return found
                table = self.cache.table(file, group, ("entropies", "token_logprobs"))
                part = mine[start : start + rows]
                found["uncertain"][part] = mean_of_lists(table["entropies"])
                found["worst"][part] = -mean_of_lists(table["token_logprobs"])
                start += rows
            self._measured = number + 1
        return found

    # --- one sample ---------------------------------------------------------------------------------------------------

    def sample(self, sample_id: str) -> dict[str, Any]:
        """One sample's texts and tokens. Lists are by token: T values each."""
        shown = self.shown(sample_id)
        sample, row = shown.sample, shown.row
        texts, escaped = pieces(self.bytes_of(sample.completion_ids))
        before, after = self._template()
        return {
            **{name: row[name] for name in ("source", "split", "task", "language", "origin")},
            "id": sample_id,
            "reference": row["reference"] if row["reference"] != row["completion"] else None,
            "reward": number(self.index.reward[shown.number]),
            "prompt": _without(row["prompt"], before, after),
            "prompt_tokens": len(sample.prompt_ids),
            "texts": texts,
            "escaped": escaped,
            "logprobs": numbers(sample.token_logprobs),
            "ranks": sample.token_ranks.tolist(),
            "entropies": numbers(sample.entropies),
            "supervised": sample.supervised.tolist(),
        }

    def candidates(self, sample_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """Of the positions [first, last): the candidates' texts, probabilities and whether drawn, and the tail's mass."""
        shown = self.shown(sample_id)
        sample = shown.sample
        kept = sample.candidates
        found = []
        for position in range(max(first, 0), min(last, len(kept))):
            part = kept.at(position)
            ids = kept.ids[part]
            found.append(
                {
                    "texts": [escape(token) for token in self.bytes_of(ids)],
                    "given": (ids == sample.completion_ids[position]).tolist(),
                    "probabilities": numbers(np.exp(kept.logprobs[part])),
                    "drawn": shown.drawn[part].tolist(),
                    "tail": number(math.exp(kept.tails[position])),
                }
            )
        return found

    def shown(self, sample_id: str) -> Shown:
        """One sample; KDError if there is none of this id."""
        found = self._shown.get(sample_id)
        if found is None:
            n = pc.index(self.index.sample_ids, sample_id).as_py()
            if n < 0:
                raise UsageError(self._no_such(sample_id))
            found = self._read(n)
            _remember(self._shown, sample_id, found)
        return found

    def _no_such(self, sample_id: str) -> str:
        like = pc.filter(self.index.sample_ids, pc.match_substring(self.index.sample_ids, sample_id))[:3].to_pylist()
        hint = f"there is {', '.join(like)}" if like else f"the first one is {self.index.sample_ids[0].as_py()}"
        return (
            f"{self.cache.path} has no sample {sample_id}; {hint}" if len(self.index) else f"{self.cache.path} is empty"
        )

    def _read(self, n: int) -> Shown:
        file, group, row = self._place(n)
        [sample] = self.cache.read(file, group, [row], TOKEN_COLUMNS)
        table = self.cache.table(file, group, (*TEXT_COLUMNS, "candidate_logprobs")).slice(row, 1)
        texts = dict.fromkeys(TEXT_COLUMNS) | table.drop_columns(["candidate_logprobs"]).to_pylist()[0]
        stored = table["candidate_logprobs"].combine_chunks().flatten().flatten()
        # A copy: the arrays of a sample are views that would keep its whole row group.
        return Shown(n, texts, copy.deepcopy(sample), self._drawn(sample, np.asarray(stored)))

    def _drawn(self, sample: Sample, stored: np.ndarray) -> np.ndarray:
        """Which candidates are a sample of many: those stored at TAU, or below it, but for the teacher's choice."""
        policy, candidates = self.cache.policy, sample.candidates
        if not isinstance(policy, Threshold):
            return np.zeros(len(stored), bool)
        snapped = round_logprobs(np.log(np.array([policy.tau], dtype=np.float32)))[0]
        drawn = stored <= snapped + 1e-6
        drawn[candidates.starts[candidates.counts > 0]] = False
        return drawn

    def bytes_of(self, ids: np.ndarray) -> list[bytes]:
        if self._vocabulary is None:
            self._vocabulary = self.cache.vocabulary("bytes")
        return [token or b"" for token in self._vocabulary.take(pa.array(ids)).to_pylist()]


# --- texts and numbers ------------------------------------------------------------------------------------------------


def pieces(tokens: Sequence[bytes]) -> tuple[list[str], dict[int, str]]:
    """Each token's part of the text, and the bytes (``\\xF0\\x9F``) of those that hold part of a character.

    Tokens that make up characters together are one group: its text is the first one's, and the others' are empty.
    What is no UTF-8 becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts, escaped = [""] * len(tokens), dict[int, str]()
    first = 0
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        texts[first] += decoder.decode(token, final=last)
        if last or not decoder.getstate()[0]:
            if i > first:
                escaped |= {n: escape(tokens[n]) for n in range(first, i + 1)}
            first = i + 1
    return texts, escaped


def escape(token: bytes) -> str:
    """The token's text; bytes that are no characters by themselves as \\xE2\\x96, as in the view vocab."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02X}" for byte in token)


def common_frame(texts: Sequence[str]) -> tuple[str, str]:
    """What texts that differ all begin and end with, cut where a tag or a line ends (begins)."""
    if len(set(texts)) < 2:
        return "", ""
    before = _common_start(texts)
    before = before[: max(before.rfind("\n"), before.rfind(">")) + 1]
    after = _common_start([text[len(before) :][::-1] for text in texts])[::-1]
    starts = [at for at in (after.find("\n"), after.find("<")) if at >= 0]
    return before, after[min(starts) :] if starts else ""


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # in their order these two differ first
    return first[: next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))]


def _without(text: str | None, before: str, after: str) -> tuple[str, str, str]:
    """A prompt in three: its template, its own, its template."""
    text = text or ""
    before = before if text.startswith(before) else ""
    after = after if text[len(before) :].endswith(after) else ""
    return before, text[len(before) : len(text) - len(after)], after


def mean_of_lists(column: pa.ChunkedArray) -> np.ndarray:
    """The mean of each list [S], NaN of an empty one."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    values, offsets = np.asarray(lists.values, dtype=np.float64), np.asarray(lists.offsets)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    lengths = np.diff(offsets)
    return np.divide(
        sums[offsets[1:]] - sums[offsets[:-1]], lengths, out=np.full(len(lengths), np.nan), where=lengths > 0
    )


def number(value: Any) -> float | None:
    """With five digits; None where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def numbers(values: np.ndarray) -> list[float | None]:
    return [number(value) for value in values.tolist()]


def _remember(kept: OrderedDict[str, Any], key: str, value: Any) -> None:
    """Keep the last few. Two threads may find the same at once; either's will do."""
    kept[key] = value
    while len(kept) > KEPT:
        try:
            kept.popitem(last=False)
        except KeyError:
            return
