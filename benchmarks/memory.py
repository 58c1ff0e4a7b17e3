"""Does a trainer's memory grow with the cache? Peak resident memory of `kd train` on random caches of 1 GB and 2 GB.

    python benchmarks/memory.py                    # about ten minutes and 2 GB of disk
    python benchmarks/memory.py --gigabytes 0.1 0.2 --steps 100

The caches hold a random teacher's candidates (k = 64) over a vocabulary of 512: copies of one shard under many names.
The student has one layer, so that reading is measured and not the network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from shared import copy_shard, made_up_fields, peak_bytes, write_plan

from kdcache.cache import documents, writer
from kdcache.cache.format import CacheRow, fingerprint
from kdcache.cache.layout import shard_name
from kdcache.cache.sparsify import parse
from kdcache.machine import cpu
from kdcache.models import identity
from kdcache.storage import atomic

VOCABULARY, K, TOKENS, ROWS = 512, 64, 100, 512


def make_student(folder: Path) -> str:
    """Save a one-layer model with its own small vocabulary, and return its tokenizer's identity."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    model = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes)).save_pretrained(folder)
    return identity.tokenizer_identity(tokenizer)


def make_cache(folder: Path, size_bytes: int, tokenizer: str) -> int:
    """Write a random cache of about ``size_bytes``, and return its true size."""
    random = np.random.default_rng(0)
    sparsifier = parse(f"topk:{K}")
    fields = made_up_fields(sparsifier)
    cache_fingerprint = fingerprint(fields)
    rows = []
    for i in range(ROWS):
        logits = random.normal(0, 3, (TOKENS, VOCABULARY))
        full = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        ids = np.argsort(-full, axis=1)[:, :K]
        logprobs = np.take_along_axis(full, ids, axis=1).astype(np.float32)
        completion = random.integers(2, VOCABULARY, TOKENS)
        token_logprobs = full[np.arange(TOKENS), completion].astype(np.float32)
        row = CacheRow(
            sample_id=f"made-up:{i}:g",
            split="train",
            source="made-up",
            origin="given",
            group_id=str(i),
            prompt_ids=random.integers(2, VOCABULARY, 20).tolist(),
            completion_ids=completion.tolist(),
            token_logprobs=token_logprobs,
            token_ranks=np.ones(TOKENS, np.int32),
            entropies=-token_logprobs,
            candidates=sparsifier(ids, logprobs),
        )
        rows.append(row)
    (folder / "data").mkdir(parents=True)
    first = folder / shard_name("train", 0)
    meta = {"format_version": 1, "fingerprint": cache_fingerprint, "rejected": []}
    writer.write_shard(first, rows, "q8", meta)
    shards = max(1, round(size_bytes / first.stat().st_size))
    for number in range(1, shards):
        copy_shard(first, folder / shard_name("train", number), "q8")
    plan = {
        "format_version": 1,
        "fingerprint": cache_fingerprint,
        "fields": fields,
        "vocab_size": VOCABULARY,
        "end_of_turn": 1,
    }
    plan["tokenizer"] = tokenizer
    plan["shards"] = [{"name": shard_name("train", n), "examples": ROWS} for n in range(shards)]
    write_plan(folder, plan)
    import pyarrow as pa

    names = pa.table(
        {"token_id": pa.array(range(VOCABULARY), pa.int32()), "token": [str(i) for i in range(VOCABULARY)]}
    )
    writer.write_table(folder / "vocab.parquet", names.append_column("bytes", pa.array([b"x"] * VOCABULARY)))
    return shards * first.stat().st_size


def peak_of(cache: Path, student: Path, out: Path, steps: int) -> int:
    """Return the peak memory of `kd train`."""
    command = [
        sys.executable,
        "-m",
        "kdcache",
        "train",
        "--from-cache",
        cache,
        "--student",
        student,
        "--output-dir",
        out,
    ]
    command += [
        "--max-steps",
        steps,
        "--per-device-train-batch-size",
        16,
        "--logging-steps",
        1000,
        "--save-strategy",
        "no",
    ]
    return peak_bytes(command, cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs=2, default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, default=1500, help="16 samples each")
    parser.add_argument("--folder", type=Path, help="where to write the random caches [default: a temporary folder]")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    results = {
        "date": str(date.today()),
        "machine": cpu(),
        "steps": options.steps,
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        tokenizer = make_student(folder / "student")
        for number, gigabytes in enumerate(options.gigabytes):
            cache = folder / f"cache{number}"
            size = make_cache(cache, int(gigabytes * 1e9), tokenizer)
            assert len(documents.read_plan(cache)["shards"]) >= 1
            peak = peak_of(cache, folder / "student", folder / f"run{number}", options.steps)
            results[f"cache_{number}"] = {"bytes": size, "peak_resident_bytes": peak}
            print(f"cache {size / 1e9:.2f} GB: peak resident memory {peak / 1e6:,.0f} MB", flush=True)
    difference = results["cache_1"]["peak_resident_bytes"] - results["cache_0"]["peak_resident_bytes"]
    print(f"difference {difference / 1e6:+,.1f} MB")
    options.results.mkdir(exist_ok=True)
    atomic.write_json(options.results / "memory.json", results | {"difference_bytes": difference})


if __name__ == "__main__":
    main()
