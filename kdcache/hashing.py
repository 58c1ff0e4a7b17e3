"""Hashes that are equal on every machine and in every run: of JSON values, as request seeds, and as uniform numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def stable_hash(*parts: object) -> int:
    """Return a 64-bit blake2b hash of the parts' JSON. Unlike Python's ``hash`` it is equal in every process."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def request_seed(seed: int, sample_id: str, sample_index: int) -> int:
    """Return the engine's seed for one sample, which depends on neither the order nor the batch of the requests."""
    return stable_hash(seed, sample_id, sample_index) >> 33  # 31 bits, which every engine accepts


def uniforms(count: int, *parts: object) -> np.ndarray:
    """Return [count] float64 in [0, 1): number i is a hash of (parts, i), by SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.uint64(stable_hash(*parts)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def of_json(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the sha256 of a value's JSON, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def of_json_list(items: Iterable[Any]) -> str:
    """Return ``of_json`` of a list whose items are consumed one by one, so that they need not fit into memory."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update(((", " if number else "") + json.dumps(item, sort_keys=True, default=str)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:32]
