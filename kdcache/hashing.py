"""Hashes that are the same on every machine and in every run: of values, of requests, and as uniform numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def stable_hash(*parts: object) -> int:
    """A 64-bit blake2b hash of the parts' JSON, the same everywhere (unlike Python's ``hash``)."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def request_seed(seed: int, sample_id: str, sample_index: int) -> int:
    """The engine's seed for one sample: neither order nor batch mates change what is asked."""
    return stable_hash(seed, sample_id, sample_index) >> 33  # 31 bits: every engine takes them


def uniforms(count: int, *parts: object) -> np.ndarray:
    """[count] float64 in [0, 1): number i is a hash of (parts, i). SplitMix64 (Steele et al. 2014) from a stable seed."""
    with np.errstate(over="ignore"):
        x = np.uint64(stable_hash(*parts)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_json_list(items: Iterable[Any]) -> str:
    """``of_json`` of a list that is never whole in memory."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update(((", " if number else "") + json.dumps(item, sort_keys=True, default=str)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]
