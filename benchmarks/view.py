"""How long does `kd view` keep one waiting, and what memory does it take, over a cache of 100,000 samples?

    python benchmarks/view.py                      # two minutes and 300 MB of disk
    python benchmarks/view.py --samples 10000 --out data/view-cache

The cache is made up (16 candidates, about 40 tokens a completion, vocabulary of 49,152, half of it with a reward) and written
by the real writer; every sample has its own text and numbers. What is timed is the real command in a process of its own,
asked over HTTP as the page asks, each question on a fresh connection. Its memory is VmHWM, by the operating system.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from shared import hardware, machine, versions

from kdcache import format, writer
from kdcache.sparsify import parse

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, K, ROWS = 49_152, 16, 1024
SYLLABLES = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]


def made_up_words(random: np.random.Generator) -> list[str]:
    """As many tokens as the vocabulary has: a space and one to three syllables, or the syllables alone."""
    picks = random.integers(0, len(SYLLABLES), (VOCABULARY, 3))
    lengths = random.integers(1, 4, VOCABULARY)
    joins = random.random(VOCABULARY) < 0.3
    return [("" if joined else " ") + "".join(SYLLABLES[i] for i in row[:n]) for row, n, joined in zip(picks, lengths, joins)]


def made_up_candidates(random: np.random.Generator, count: int) -> list[Any]:
    """``count`` completions' candidates, of 10 to 70 tokens."""
    sparsifier, found = parse(f"topk:{K}"), []
    for _ in range(count):
        length = int(random.integers(10, 71))
        logits = random.normal(0, 1, (length, K)) * random.uniform(0.5, 4, (length, 1))
        logprobs = -np.sort(-(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) - 0.1), axis=1)
        ids = np.argsort(random.random((length, 200)), axis=1)[:, :K] + random.integers(0, VOCABULARY - 200, (length, 1))
        found.append(sparsifier(ids, logprobs.astype(np.float32)))
    return found


def make_cache(folder: Path, samples: int) -> None:
    """A made-up cache with as many samples, in shards of 1,024; the last two are validation and test."""
    random = np.random.default_rng(0)
    words, pool = made_up_words(random), made_up_candidates(random, 128)
    fields = {"teacher": "made-up", "engine": "none", "dtype": "none", "mode": "score", "precision": "q8"}
    fields |= {"sparsify": f"topk:{K}", "weights": "", "sampling": None, "samples": None}  # type: ignore[dict-item]
    meta = {"format_version": 1, "fingerprint": format.fingerprint(fields), "rejected": []}
    (folder / "data").mkdir(parents=True)
    counts = [min(ROWS, samples - first) for first in range(0, samples, ROWS)]
    shards = []
    for number, count in enumerate(counts):
        split = {len(counts) - 1: "test", len(counts) - 2: "validation"}.get(number, "train")
        rows = []
        for i in range(number * ROWS, number * ROWS + count):
            candidates = pool[random.integers(len(pool))]
            length = len(candidates.counts)
            prompt, completion = random.integers(0, VOCABULARY, 30), random.integers(0, VOCABULARY, length)
            columns = {
                **{"sample_id": f"made-up:{i}:g", "prompt_id": f"{i:032x}", "group_id": str(i), "source": "made-up"},
                **{"split": split, "task": "t", "language": "en", "origin": "given"},
                "prompt": "".join(words[t] for t in prompt),
                "completion": "".join(words[t] for t in completion),
                "reward": float(i % 4 > 0) if i % 2 else None,
            }
            entropies = random.gamma(2.0, random.uniform(0.2, 1), length).astype(np.float32)
            own = -random.gamma(2.0, random.uniform(0.2, 1), length).astype(np.float32)
            ranks = random.integers(1, 9, length).astype(np.int32)
            rows.append(writer.Row(columns, prompt.tolist(), completion.tolist(), own, ranks, entropies, candidates))
        shards.append({"name": format.shard_name(split, number), "examples": count})
        writer.write_shard(folder / shards[-1]["name"], rows, "q8", meta)
    plan = {"format_version": 1, "fingerprint": meta["fingerprint"], "fields": fields, "teacher_revision": None}
    plan |= {"vocab_size": VOCABULARY, "end_of_turn": 2, "tokenizer": "made-up", "shards": shards}
    writer.write_json(folder / "plan.json", plan)
    ids = pa.array(range(VOCABULARY), pa.int32())
    vocabulary = {"token_id": ids, "token": words, "bytes": [word.encode() for word in words]}
    writer.write_table(folder / "vocab.parquet", pa.table(vocabulary))
