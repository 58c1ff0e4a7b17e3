"""The cache format, version 1: Arrow schema, codebook, Parquet encodings, fingerprint, splits (docs/format.md).

One row of a shard is one sample: a prompt and one completion of T tokens, with K candidates per token. There is no
codec: Parquet's own encodings save the bytes, so that every Parquet reader opens a cache as it is.

Invariant: no other module defines a column, an encoding or how a number is rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.cache.candidates import Candidates
from kdcache.hashing import stable_hash

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
PRECISIONS = ("q8", "f32")

#: vLLM's log-probabilities are float32: a smaller tail cannot be told from rounding, and is stored as none.
MIN_TAIL_MASS = 1e-6

#: Rounding may lift the log-probability of a certain token, or of a whole mass, a little above 0.
MAX_LOGPROB = 1e-3

#: 256 float32 log-probabilities, 0 down to -24, evenly spaced in the square root of -logprob.
CODEBOOK = -((np.arange(256, dtype=np.float64) / 255 * np.sqrt(24.0)) ** 2).astype(np.float32) + np.float32(0)


def _strings(*names: str) -> list[pa.Field]:
    return [pa.field(name, pa.string()) for name in names]


SCHEMA = pa.schema(
    [
        *_strings("sample_id", "prompt_id", "group_id", "source", "split", "task", "language"),
        *_strings("prompt", "completion", "reference"),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("completion_ids", pa.list_(pa.int32())),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("completion_mask", pa.list_(pa.bool_())),  # null: every completion position is supervised
        pa.field("token_logprobs", pa.list_(pa.float32())),  # [T] nats
        pa.field("token_ranks", pa.list_(pa.int32())),  # [T] 1-based; ties count against the token
        pa.field("candidate_ids", pa.list_(pa.list_(pa.int32()))),  # [T, K] best first
        pa.field("candidate_logprobs", pa.list_(pa.list_(pa.float32()))),  # [T, K] nats, full softmax, temperature 1
        pa.field("tail_logprobs", pa.list_(pa.float32())),  # [T] log mass outside the candidates; -inf: none
        pa.field("entropies", pa.list_(pa.float32())),  # [T] nats, of the (K+1)-cell partition: a lower bound
        *_strings("origin"),  # given | sampled
        pa.field("sample_index", pa.int32()),
        pa.field("seed", pa.int64()),
        *_strings("finish_reason", "verifier"),
        pa.field("reward", pa.float32()),
    ]
)

_IDS = ("prompt_ids.list.element", "completion_ids.list.element", "candidate_ids.list.element.list.element")
_HALVES = ("token_logprobs.list.element", "tail_logprobs.list.element", "entropies.list.element")
_DICTIONARY = (
    *("prompt_id", "group_id", "source", "split", "task", "language", "prompt", "reference", "origin"),
    *("finish_reason", "verifier", "token_ranks.list.element"),
)
_CANDIDATE_LOGPROBS = "candidate_logprobs.list.element.list.element"
CANDIDATE_LEAVES = ("candidate_ids.list.element.list.element", _CANDIDATE_LOGPROBS)


def parquet_options(precision: str) -> dict[str, Any]:
    """Return the keyword arguments of ``pyarrow.parquet.ParquetWriter`` for a shard.

    Encodings are named by leaf, because pyarrow ignores a top-level name without an error. A test reads the footers.
    """
    floats = _HALVES if precision == "q8" else (*_HALVES, _CANDIDATE_LOGPROBS)
    return {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": [*_DICTIONARY, *([_CANDIDATE_LOGPROBS] if precision == "q8" else [])],
        "column_encoding": {leaf: "BYTE_STREAM_SPLIT" for leaf in (*_IDS, *floats)},
        "write_page_checksum": True,
        # Statistics of lists help no reader, and cost bytes in every footer.
        "write_statistics": ["sample_id", "split", "completion_tokens", "prompt_tokens"],
    }


def round_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Round log-probabilities to the codebook's nearest values, in the square root of -logprob; float32, same shape."""
    codes = np.rint(np.sqrt(np.clip(-logprobs, 0.0, 24.0)) * np.float32(255 / np.sqrt(24.0))).astype(np.intp)
    return CODEBOOK[codes]


def round_half(values: np.ndarray) -> np.ndarray:
    """Round to half precision, kept as float32 because DuckDB cannot read BYTE_STREAM_SPLIT on float16."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


# --- hashes: the same on every machine and in every run ---------------------------------------------------------------


def split_of(group_id: str, ratios: tuple[float, float, float], split_seed: int) -> str:
    """Return the split of a problem: all samples of one group are in one split, whatever else is in the cache."""
    point = stable_hash(split_seed, group_id) / 2**64
    for split, edge in zip(SPLITS, np.cumsum(ratios)):
        if point < edge:
            return split
    return next(s for s, r in zip(reversed(SPLITS), reversed(ratios)) if r > 0)


def fingerprint(fields: dict[str, Any]) -> str:
    """Return a hex hash over what decides the numbers in a cache. Caches with one fingerprint are interchangeable."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return ``field: old -> new`` for every fingerprint field that differs."""
    return [
        f"{key}: {json.dumps(old.get(key), ensure_ascii=False)} -> {json.dumps(new.get(key), ensure_ascii=False)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


# --- one row as a type -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """One sample, ready to be written: a prompt, one completion of it, and the teacher's candidates at each token."""

    sample_id: str
    split: str
    prompt_ids: Sequence[int]  # [P]
    completion_ids: Sequence[int]  # [T]
    token_logprobs: np.ndarray  # [T] float32, nats
    token_ranks: np.ndarray  # [T] int32, 1-based
    entropies: np.ndarray  # [T] float32, nats
    candidates: Candidates  # of T positions

    prompt_id: str | None = None
    group_id: str | None = None
    source: str | None = None
    task: str | None = None
    language: str | None = None
    prompt: str | None = None
    completion: str | None = None
    reference: str | None = None
    completion_mask: Sequence[bool] | None = None  # [T]; None: every completion position is supervised
    origin: str | None = None  # given | sampled
    sample_index: int | None = None
    seed: int | None = None
    finish_reason: str | None = None
    verifier: str | None = None
    reward: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.completion_ids)
