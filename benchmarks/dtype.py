"""Which dtype should a teacher on this machine run in? Tokens/s of scoring in bfloat16 and float32, a process each.

python benchmarks/dtype.py            # about three minutes
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from kdcache.machine import cpu


def measure(dtype: str) -> None:
    """Print the tokens/s of three rounds over the same rows, the first (compilation) left out."""
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
        asked = prompts.ask(example.messages, example.given)
        requests.append(Request(("x", str(i)), asked.prompt_ids, asked.completion_ids))
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
    if len(sys.argv) > 1:
        return measure(sys.argv[1])
    found: dict[str, object] = {"date": str(date.today()), "machine": cpu()}
    for dtype in ("bfloat16", "float32"):
        done = subprocess.run([sys.executable, __file__, dtype], stdout=subprocess.PIPE, text=True, check=True)
        rates = sorted(json.loads(done.stdout.splitlines()[-1]))
        found[dtype] = rates
        print(f"{dtype}: {rates[1]:.0f} tokens/s (median of {len(rates)})", flush=True)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "dtype.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
