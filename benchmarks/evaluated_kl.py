"""How far is the KL of `kd evaluate` from the KL over the whole vocabulary, for near and for far students?

    python benchmarks/evaluated_kl.py                                             # the builtin examples: a few minutes
    python benchmarks/evaluated_kl.py --examples dolly --data-path dolly.jsonl    # or any other that kd cache-teacher takes

The teacher is SmolLM2-135M-Instruct in float32, and so are the students: the teacher itself, the teacher with noise on
its weights, and the teacher without some of its layers. Every figure is a mean over all completion tokens, in nats.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import hardware, say

from kdcache.capture import run as capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.resolve import resolve
from kdcache.machine import cpu, versions
from kdcache.models import embedded
from kdcache.storage import atomic
from trainer.data.select import open_caches, select
from trainer.evaluate.forced import at_positions, sampled_from
from trainer.loss.head import head_of
from trainer.loss.reference import log_mass_beyond
from trainer.student.attention import layers_of
from trainer.student.load import load_student

NOISE = (0.03, 0.1)  # of each weight matrix's standard deviation
CHEAPEST_LAYERS = (17, 18, 14, 12, 13, 26, 25, 15, 16, 5)  # of SmolLM2's thirty, the cheapest to leave out first
LEFT_OUT = (1, 3, 10)


def students(teacher: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the model of each student, the nearest first."""
    yield "the teacher itself", teacher
    for scale in NOISE:
        torch.manual_seed(0)
        student = copy.deepcopy(teacher)
        for name, weight in student.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.data += scale * weight.std() * torch.randn_like(weight)
        yield f"{scale:.0%} noise on its weights", student
    for count in LEFT_OUT:
        student = copy.deepcopy(teacher)
        layers = [layer for i, layer in enumerate(student.model.layers) if i not in CHEAPEST_LAYERS[:count]]
        student.model.layers = torch.nn.ModuleList(layers)
        yield f"{count} of 30 layers left out", student


@torch.no_grad()
def logprobs(model: Any, sample: Any) -> torch.Tensor:
    """Return the model's log-probabilities at the positions of the completion, (T, V)."""
    ids = torch.from_numpy(np.concatenate([sample.prompt_ids, sample.completion_ids]))[None].long()
    first = len(sample.prompt_ids) - 1
    return model(ids, use_cache=False).logits[0, first : first + len(sample.completion_ids)].log_softmax(-1)


def measure(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    config = CaptureConfig(
        out=out,
        examples=options.examples,
        data_path=options.data_path,
        limit=options.limit,
        engine="transformers",
        dtype="float32",
        sparsify=options.sparsify,
        max_model_len=300,
        split_ratios=(0, 0, 1),
    )
    capture.run(resolve(config))
    caches = open_caches([out])
    units = select(caches, "test")
    samples = units.load(np.arange(len(units)), ("entropies",))
    captured = caches[0].plan["fields"]["capture_k"]
    teacher = load_student(str(embedded.prepare()), "float32")[0].eval()
    tokens = int(sum(len(sample.completion_ids) for sample in samples))
    rows, beyond_captured = [], 0.0
    for name, student in students(teacher):
        say(name)
        layers, head, sums = layers_of(student), head_of(student), np.zeros(3)
        for sample in samples:
            log_p, log_q = logprobs(teacher, sample), logprobs(student, sample)
            best = log_p.topk(captured)
            student_best = log_q.gather(1, best.indices)
            none = torch.zeros(len(log_p), dtype=torch.int64)
            rest_p, rest_q = (log_mass_beyond(log, best.indices, none) for log in (log_p, log_q))
            cells = (best.values.exp() * (best.values - student_best)).sum() + (rest_p.exp() * (rest_p - rest_q)).sum()
            readings = at_positions(layers, head, [sample], sampled_from(caches[0]))
            sums += [float((log_p.exp() * (log_p - log_q)).sum()), float(cells), readings.kl.sum()]
            beyond_captured += float(rest_p.exp().sum()) * (student is teacher)
        kl, of_cells, evaluated = (sums / tokens).round(4).tolist()
        rows.append({"student": name, "whole_vocabulary": kl, "captured_cells": of_cells, "kd_evaluate": evaluated})
    return {
        "date": str(date.today()),
        "machine": cpu(),
        "versions": versions("torch", "transformers"),
        "examples": options.examples,
        "sparsify": options.sparsify,
        "captured": captured,
        "tokens": tokens,
        "mass_beyond_captured": round(beyond_captured / tokens, 4),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", default="builtin")
    parser.add_argument("--data-path")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--sparsify", default="threshold:0.02")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder) / "cache")
    name = f"evaluated-kl-{options.examples}-{hardware()}-{results['date']}.json"
    atomic.write_json(options.results / name, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
