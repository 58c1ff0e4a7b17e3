"""In which dtype should a teacher run on this machine? Tokens/s of scoring in bfloat16 and in float32.

    python benchmarks/dtype.py            # about three minutes

Each dtype is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from kdcache.machine import cpu

DTYPES = ("bfloat16", "float32")


def measure(dtype: str) -> None:
    """Print the tokens/s of three rounds over the same rows, after a first one that compiles."""
    from kdcache import models
    from kdcache.examples import load as examples
    from kdcache.examples import types
    from kdcache.models import embedded
    from kdcache.prompts.tokenize import Prompts
    from kdcache.teachers import EngineOptions, Request
    from kdcache.teachers.engine import load

    model = str(embedded.prepare())
    prompts = Prompts(model, models.tokenizer(model))
    requests = []
    for i, example in enumerate(examples.load("builtin", types.Columns(), 24)):
        row = prompts.ask(example.messages, example.given)
        requests.append(Request(("x", str(i)), row.prompt_ids, row.completion_ids))
    tokens = sum(len(r.prompt_ids) + len(r.completion_ids or ()) for r in requests)
    teacher = load("vllm", EngineOptions(model, 64, 1024, dtype))
    rates = []
    for _ in range(4):
        begun = time.monotonic()
        for _ in teacher.run(requests):
            pass
        rates.append(tokens / (time.monotonic() - begun))
    print(json.dumps(rates[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype", nargs="?", choices=DTYPES, help="measure this dtype alone, in this process")
    options = parser.parse_args()
    if options.dtype:
        return measure(options.dtype)
    results: dict[str, object] = {"date": str(date.today()), "machine": cpu()}
    for dtype in DTYPES:
        process = subprocess.run([sys.executable, __file__, dtype], stdout=subprocess.PIPE, text=True, check=True)
        rates = sorted(json.loads(process.stdout.splitlines()[-1]))
        results[dtype] = rates
        print(f"{dtype}: {rates[1]:.0f} tokens/s (median of {len(rates)})", flush=True)
    results_folder = Path(__file__).parent / "results"
    results_folder.mkdir(exist_ok=True)
    (results_folder / "dtype.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
