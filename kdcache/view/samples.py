"""What the page of `kd view` shows: pages of the list of samples, one sample's tokens, and candidates of positions.

    kd view data/cache

A cache is never held in memory: only its catalog, and the few samples that were looked at last. This needs neither
torch nor HTTP: methods return plain values that JSON can hold, and may be called from several threads.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache.format import SPLITS
from kdcache.cache.reader import TOKEN_COLUMNS, Cache, Sample
from kdcache.view.catalog import MEASURED_SORTS, Catalog, Measures, check_filters, remember
from kdcache.view.texts import common_frame, escape, number, numbers, pieces, split_frame

PAGE = 50  # samples
SNIPPET = 160  # characters of a text in the list

TEXT_COLUMNS = ("sample_id", "source", "split", "task", "language", "origin", "prompt", "completion", "reference")


@dataclass(frozen=True)
class LoadedSample:
    """One sample as it was read: its number in the index, the texts of its row, and its arrays with TOKEN_COLUMNS."""

    number: int
    row: dict[str, Any]
    sample: Sample
    drawn: np.ndarray  # [N] bool: candidates of a threshold cache that stand for others


class View:
    """A cache that somebody looks at. Its catalog is built from the start, in the background, until ``close``."""

    def __init__(self, path: Path):
        self.cache = Cache(path)
        self.catalog = Catalog(self.cache, path)
        self.close = self.catalog.close
        self._loaded: OrderedDict[str, LoadedSample] = OrderedDict()
        self._vocabulary: pa.ChunkedArray | None = None
        self._frame: tuple[str, str] | None = None

    def about(self) -> dict[str, Any]:
        """Return what stands above the list: the cache's name, teacher and sizes."""
        index, fields = self.catalog.index, self.cache.plan["fields"]
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
        """Return ``PAGE`` rows of the selected samples from ``offset`` on, and how many were selected.

        If the sort needs measures that do not exist yet, measuring begins, and only {"measuring": share} is returned.
        """
        check_filters(sort, split)
        measures = self.catalog.measures(begin=sort in MEASURED_SORTS)
        if sort in MEASURED_SORTS and measures is None:
            return {"measuring": self.catalog.measured_share}
        selected = self.catalog.select(search, sort, split, measures)
        return {
            "total": len(selected),
            "offset": offset,
            "rows": self._rows(selected[offset : offset + PAGE], measures),
        }

    def _rows(self, samples: np.ndarray, measures: Measures | None) -> list[dict[str, Any]]:
        index, texts = self.catalog.index, self._texts(samples, ("prompt", "completion"))
        before, after = self._template()
        return [
            {
                "id": index.sample_ids[n].as_py(),
                "split": SPLITS[index.split[n]],
                "tokens": int(index.tokens[n]),
                "reward": number(index.reward[n]),
                "entropy": number(measures.entropy_nats[n]) if measures else None,
                "ce": number(measures.cross_entropy_nats[n]) if measures else None,
                "prompt": split_frame(text["prompt"], before, after)[1][:SNIPPET],
                "completion": (text["completion"] or "")[:SNIPPET],
            }
            for n, text in zip(samples.tolist(), texts)
        ]

    def _texts(self, samples: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Return ``columns`` of the samples, in that order; each of their row groups is read once."""
        places = {n: self.catalog.place(int(n)) for n in samples}
        rows: dict[int, dict[str, Any]] = {}
        for file, group in sorted({place[:2] for place in places.values()}):
            table = self.cache.table(file, group, columns)
            rows |= {n: table.slice(p[2], 1).to_pylist()[0] for n, p in places.items() if p[:2] == (file, group)}
        return [dict.fromkeys(columns) | rows[n] for n in places]

    def _template(self) -> tuple[str, str]:
        """Return what the first prompts all begin and end with: the chat template, which the list leaves out."""
        if self._frame is None:
            texts = self._texts(range(min(len(self.catalog.index), PAGE)), ("prompt",))
            self._frame = common_frame([text["prompt"] or "" for text in texts])
        return self._frame

    # --- one sample ---------------------------------------------------------------------------------------------------

    def sample(self, sample_id: str) -> dict[str, Any]:
        """Return one sample's texts and tokens. Lists have one value per token of the completion."""
        loaded = self.load(sample_id)
        sample, row = loaded.sample, loaded.row
        texts, escaped = pieces(self.bytes_of(sample.completion_ids))
        before, after = self._template()
        return {
            **{name: row[name] for name in ("source", "split", "task", "language", "origin")},
            "id": sample_id,
            "reference": row["reference"] if row["reference"] != row["completion"] else None,
            "reward": number(self.catalog.index.reward[loaded.number]),
            "prompt": split_frame(row["prompt"], before, after),
            "prompt_tokens": len(sample.prompt_ids),
            "texts": texts,
            "escaped": escaped,
            "logprobs": numbers(sample.token_logprobs),
            "ranks": sample.token_ranks.tolist(),
            "entropies": numbers(sample.entropies),
            "supervised": sample.supervised.tolist(),
        }

    def candidates(self, sample_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """Return, for each position in [first, last), its candidates' texts and probabilities, and the tail's mass."""
        loaded = self.load(sample_id)
        stored = loaded.sample.candidates
        positions = []
        for position in range(max(first, 0), min(last, len(stored))):
            part = stored.at(position)
            ids = stored.ids[part]
            positions.append(
                {
                    "texts": [escape(token) for token in self.bytes_of(ids)],
                    "given": (ids == loaded.sample.completion_ids[position]).tolist(),
                    "probabilities": numbers(np.exp(stored.logprobs[part])),
                    "drawn": loaded.drawn[part].tolist(),
                    "tail": number(math.exp(stored.tails[position])),
                }
            )
        return positions

    def load(self, sample_id: str) -> LoadedSample:
        """Return one sample; UsageError if there is none of this id."""
        loaded = self._loaded.get(sample_id)
        if loaded is None:
            loaded = self._read(self.catalog.number_of(sample_id))
            remember(self._loaded, sample_id, loaded)
        return loaded

    def _read(self, n: int) -> LoadedSample:
        file, group, row = self.catalog.place(n)
        [sample] = self.cache.read(file, group, [row], TOKEN_COLUMNS)
        table = self.cache.table(file, group, (*TEXT_COLUMNS, "candidate_logprobs")).slice(row, 1)
        texts = dict.fromkeys(TEXT_COLUMNS) | table.drop_columns(["candidate_logprobs"]).to_pylist()[0]
        stored = table["candidate_logprobs"].combine_chunks().flatten().flatten()
        # A copy, because the arrays of a sample are views that would keep its whole row group in memory.
        return LoadedSample(n, texts, copy.deepcopy(sample), self._drawn(sample, np.asarray(stored)))

    def _drawn(self, sample: Sample, stored: np.ndarray) -> np.ndarray:
        """Return which candidates were drawn: those stored at TAU or below, except the first of a position."""
        largest, candidates = self.cache.policy.largest_drawn_logprob, sample.candidates
        if largest is None:
            return np.zeros(len(stored), bool)
        drawn = stored <= largest + 1e-6
        drawn[candidates.starts[candidates.counts > 0]] = False
        return drawn

    def bytes_of(self, ids: np.ndarray) -> list[bytes]:
        """Return the bytes of each token in the teacher's vocabulary; b"" for a token without any."""
        if self._vocabulary is None:
            self._vocabulary = self.cache.vocabulary("bytes")
        return [token or b"" for token in self._vocabulary.take(pa.array(ids)).to_pylist()]
