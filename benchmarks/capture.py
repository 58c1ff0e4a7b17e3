"""How much time does kdcache add to the engine? `kd cache-teacher` against bare vLLM on the same prompts.

    python benchmarks/capture.py                 # a quarter of an hour on two quiet cores

All arms go over the same rows in one process: `kd` (render, tokenise, engine, arrays, sparsify, write whole shards), `flat`
(vLLM's own cheapest log-probabilities, not detokenised, results dropped), `dicts` (its lists of dicts) and `bare` (no
log-probabilities). `kd` and `flat` run in pairs whose order alternates. The ratio is the median over pairs, with a bootstrap
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from shared import hardware, ratio

from kdcache.capture import folder
from kdcache.capture import run as capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.plan import Plan
from kdcache.capture.requests import questions_of
from kdcache.capture.resolve import resolve
from kdcache.teachers import Sampling
from kdcache.teachers.collector import ArrayCollector
from kdcache.teachers.engine import load

K = 64


class Timed:
    """Replaces some functions by timed ones until ``undo``, which returns the seconds that were computed in them.

    Seconds are the calling thread's processor time, because the time on the clock would count what other threads did
    meanwhile. The time that reading the clock takes is subtracted.
    """

    def __init__(self, *places: tuple[Any, str]):
        self.seconds, self.calls = 0.0, 0
        self._old = [(owner, name, getattr(owner, name)) for owner, name in places]
        for owner, name, function in self._old:
            setattr(owner, name, self._wrap(function))

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - begun
                self.calls += 1

        return timed

    def undo(self) -> float:
        for owner, name, function in self._old:
            setattr(owner, name, function)
        seconds, calls = self.seconds, self.calls
        nothing = self._wrap(lambda: None)
        self.seconds = 0.0
        for _ in range(10_000):
            nothing()
        return max(seconds - self.seconds / 10_000 * calls, 0.0)


def drain(engine: Any, plan: Plan, **changes: Any) -> int:
    """Run the bare engine over the plan's requests and drop the results; return the number of completion tokens."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    prompts = plan.open_prompts()
    samples: list[Any] = [
        question
        for shard in plan.shards
        for example in shard.examples
        for question in questions_of(plan, prompts, shard, example)
    ]
    tokens = 0
    for number, sample in enumerate(samples):
        request = sample.request
        common = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY} | changes
        logprobs = common.pop("logprobs")
        if request.completion_ids is not None:
            params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=logprobs, **common)
            ids = [*request.prompt_ids, *request.completion_ids]
        else:
            sampling = plan.config.sampling
            params = vllm.SamplingParams(
                max_tokens=sampling.max_tokens, temperature=1.0, seed=request.seed, logprobs=logprobs, **common
            )
            ids = list(request.prompt_ids)
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    left = len(samples)
    while left:
        for output in engine.step():
            if output.finished:
                left -= 1
                given = samples[int(output.request_id)].request.completion_ids
                tokens += len(output.outputs[0].token_ids if given is None else given)
    return tokens


def with_kd(teacher: Any, plan: Plan) -> int:
    shutil.rmtree(plan.config.out, ignore_errors=True)
    folder.claim(plan)
    tally = capture.Tally()
    capture.fill(plan, plan.shards, teacher, tally)
    return tally.tokens


def seconds(run: Callable[[], int]) -> tuple[float, int]:
    begun = time.perf_counter()
    tokens = run()
    return time.perf_counter() - begun, tokens


def micros(run: Callable[[], int], *places: tuple[Any, str]) -> float:
    """Return the microseconds per token that a run spends in some functions."""
    timed = Timed(*places)
    tokens = run()
    return timed.undo() / tokens * 1e6


def measure(teacher: Any, plan: Plan, pairs: int) -> dict[str, Any]:
    engine = teacher._llm.llm_engine
    arms: dict[str, Callable[[], int]] = {
        "kd": partial(with_kd, teacher, plan),
        "flat": partial(drain, engine, plan, logprobs=K, flat_logprobs=True),
        "dicts": partial(drain, engine, plan, logprobs=K, flat_logprobs=False),
        "bare": partial(drain, engine, plan, logprobs=None),
    }
    for run in arms.values():  # compiles, and warms the caches
        run()
    ratios, rates = [], {name: list[float]() for name in arms}
    for pair in range(pairs):
        seconds_of = {}
        order = ["kd", "flat"] if pair % 2 else ["flat", "kd"]
        for name in [*order, *(("dicts", "bare") if pair % 3 == 0 else ())]:
            seconds_of[name], tokens = seconds(arms[name])
            rates[name].append(tokens / seconds_of[name])
        ratios.append(seconds_of["kd"] / seconds_of["flat"])
        print(f"  pair {pair + 1}/{pairs}: kd {rates['kd'][-1]:.1f}, flat {rates['flat'][-1]:.1f} tokens/s", flush=True)

    from vllm.v1.engine.logprobs import LogprobsProcessor

    places = {
        "arrays": ("kd", (ArrayCollector, "update_from_output"), (ArrayCollector, "arrays")),
        "sparsify_and_write": ("kd", (capture, "answered"), (capture, "write")),
        "flat": ("flat", (LogprobsProcessor, "update_from_output")),
        "dicts": ("dicts", (LogprobsProcessor, "update_from_output")),
    }
    micro = {
        name: statistics.median(micros(arms[arm], *where) for _ in range(3)) for name, (arm, *where) in places.items()
    }

    middle = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens": tokens,
        "tokens_per_second": {name: round(value, 1) for name, value in middle.items()},
        "time_kd_over_flat": ratio(ratios),
        "pairs": pairs,
        "ratios": [round(r, 4) for r in ratios],
        "share_of_bare_rate": {n: round(middle[n] / middle["bare"], 3) for n in ("kd", "flat", "dicts")},
        "front_end_microseconds_a_token": {name: round(value, 3) for name, value in micro.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--limit", type=int, default=32, help="examples")
    parser.add_argument("--max-tokens", type=int, default=48, help="of sampled answers")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--hardware", default=hardware())
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    scratch = Path(tempfile.mkdtemp(prefix="kdcache-benchmark-"))
    plans = {
        mode: resolve(
            CaptureConfig(
                out=scratch / mode,
                teacher=options.teacher,
                limit=options.limit,
                mode=mode,
                sampling=Sampling(1.0, 1.0, options.max_tokens),
                sparsify=f"topk:{K}",
                rows_per_shard=8,
            )
        )
        for mode in ("score", "sample")
    }
    teacher: Any = load("vllm", plans["sample"].engine_options())
    results: dict[str, Any] = {
        "date": str(date.today()),
        "hardware": options.hardware,
        "teacher": plans["score"].fields["teacher"],
        "dtype": plans["score"].dtype,
        "engine": teacher.version,
        "collector_in_use": teacher.collects,
        "k": K,
    }
    try:
        for mode, plan in plans.items():
            print(f"{mode}:", flush=True)
            results[mode] = measure(teacher, plan, options.pairs)
            print(json.dumps({k: v for k, v in results[mode].items() if k != "ratios"}, indent=2), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    results_folder = Path(__file__).parent / "results"
    results_folder.mkdir(exist_ok=True)
    (results_folder / f"capture-{options.hardware}-{date.today()}.json").write_text(
        json.dumps(results, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
