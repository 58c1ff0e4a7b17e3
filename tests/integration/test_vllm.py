"""The real vLLM with the real SmolLM2 gives what the transformers engine gives in float32."""

import json
import os
import signal
import subprocess
import sys
import time

import duckdb
import numpy as np
import pytest

from helpers import ROOT
from kdcache import models
from kdcache.examples import load as examples
from kdcache.examples import types
from kdcache.prompts.tokenize import Prompts
from kdcache.teachers import EngineOptions, Refusal, Request, Sampling
from kdcache.teachers.engine import load

pytestmark = pytest.mark.integration
K = 20


@pytest.fixture(scope="module")
def requests(smollm):
    """Given answers of each task, and sampled ones so short that some end by themselves and some are cut."""
    prompts = Prompts(smollm, models.tokenizer(smollm))
    asks = []
    for i, example in enumerate(examples.load("builtin", types.Columns(), 8)):
        ids = prompts.ask(example.messages, example.given)
        asks.append(Request(("x", f"given {i}"), ids.prompt_ids, ids.completion_ids))
        asks.append(Request(("x", f"sampled {i}"), ids.prompt_ids, None, seed=i))
    say = prompts.prompt_ids(prompts.render([{"role": "user", "content": "Say just: yes"}]))
    return [
        *asks,
        Request(("x", "sampled short"), say, None, seed=3),
        Request(("x", "given one"), say, [prompts.end_of_turn]),
    ]


def options(smollm, max_tokens=24, temperature=0.7):
    return EngineOptions(smollm, K, 1024, "float32", 0, Sampling(temperature, 1.0, max_tokens))


@pytest.fixture(scope="module")
def vllm_teacher(smollm):
    return load("vllm", options(smollm))


@pytest.fixture(scope="module")
def vllm_answers(vllm_teacher, requests):
    return {request.key[1]: answer for request, answer in vllm_teacher.run(iter(requests))}


@pytest.fixture(scope="module")
def oracle(smollm):
    return load("transformers", options(smollm))


def score_again(oracle, requests, answers):
    """Score the very completions of vLLM with the oracle."""
    again = [Request(r.key, r.prompt_ids, list(answers[r.key[1]].completion_ids)) for r in requests]
    return {request.key[1]: answer for request, answer in oracle.run(again)}


def differences(ours, theirs):
    """Return the largest difference of log-probabilities, and at how many positions candidates differ by more than a tie."""
    largest, wrong = 0.0, 0
    largest = max(largest, float(np.abs(ours.token_logprobs - theirs.token_logprobs).max()))
    largest = max(largest, float(np.abs(ours.logprobs - theirs.logprobs).max()))
    for t in range(len(ours.completion_ids)):
        both, edge = set(ours.ids[t]) ^ set(theirs.ids[t]), theirs.logprobs[t][-1]
        table = dict(zip(theirs.ids[t].tolist(), theirs.logprobs[t])) | dict(
            zip(ours.ids[t].tolist(), ours.logprobs[t])
        )
        wrong += any(abs(table[i] - edge) > 1e-3 for i in both)
    return largest, wrong


def test_vllm_equals_the_oracle_in_both_modes_end_of_turn_included(requests, vllm_answers, oracle):
    truth = score_again(oracle, requests, vllm_answers)
    assert len(truth) == len(requests) == len(vllm_answers)
    ended = 0
    for name, ours in vllm_answers.items():
        largest, wrong = differences(ours, truth[name])
        assert largest < 1e-3 and wrong == 0, name
        assert (np.abs(ours.token_ranks - truth[name].token_ranks) <= 1 + 0.01 * truth[name].token_ranks).all()
        ended += ours.completion_ids[-1] == 2
        assert (ours.finish_reason == "stop") == (ours.completion_ids[-1] == 2) or name.startswith("given")
    assert ended > sum(name.startswith("given") for name in vllm_answers), "some sampled answer ends by itself"


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_shifted_by_one_would_be_noticed(requests, vllm_answers, oracle, shift):
    truth = score_again(oracle, requests[:2], vllm_answers)
    for name, theirs in truth.items():
        ours = vllm_answers[name]
        moved = type(ours)(
            ours.completion_ids,
            *(np.roll(a, shift, axis=0) for a in (ours.ids, ours.logprobs, ours.token_logprobs, ours.token_ranks)),
        )
        largest, wrong = differences(moved, theirs)
        assert largest > 0.1 and wrong > 0


def test_sampling_is_the_seeds_whatever_the_order_and_the_batch_mates(vllm_teacher, requests, vllm_answers):
    sampled = [r for r in requests if r.completion_ids is None]
    again = {request.key[1]: answer for request, answer in vllm_teacher.run(reversed(sampled))}
    assert {n: list(a.completion_ids) for n, a in again.items()} == {
        n: list(vllm_answers[n].completion_ids) for n in again
    }


def test_the_array_collector_is_in_use_and_equals_the_public_outputs_to_the_bit(vllm_teacher, requests, vllm_answers):
    assert vllm_teacher.collects, "at start-up it was found to differ"
    alone = [[r] for r in requests[:6]]  # one at a time: batches would change the last bits
    collected = [next(iter(vllm_teacher.run(r)))[1] for r in alone]
    vllm_teacher.collects = False
    try:
        public = [next(iter(vllm_teacher.run(r)))[1] for r in alone]
    finally:
        vllm_teacher.collects = True
    for ours, theirs in zip(collected, public):
        assert list(ours.completion_ids) == list(theirs.completion_ids) and ours.finish_reason == theirs.finish_reason
        for name in ("ids", "logprobs", "token_logprobs", "token_ranks"):
            left, right = getattr(ours, name), getattr(theirs, name)
            assert left.dtype == right.dtype and np.array_equal(left, right), name


def test_a_collector_that_differs_or_fails_is_not_used_and_the_user_learns_why(vllm_teacher, monkeypatch):
    from kdcache.teachers import collector

    def shifted(self):
        ids, logprobs, ranks = arrays(self)
        return ids, logprobs + 1e-7, ranks

    arrays, warnings, used = collector.ArrayCollector.arrays, [], []

    def choose():
        vllm_teacher._choose_collector()
        used.append(vllm_teacher.collects)

    monkeypatch.setattr(vllm_teacher, "_say", warnings.append)
    with monkeypatch.context() as broken:
        broken.setattr(collector.ArrayCollector, "arrays", shifted)
        choose()
        broken.setattr(collector.ArrayCollector, "update_from_output", lambda self, output: output.no_such_thing)
        choose()
    choose()
    assert used == [False, False, True] and len(warnings) == 2
    assert "other values than the public way's" in warnings[0] and "no attribute 'no_such_thing'" in warnings[1]


def test_a_request_that_vllm_refuses_is_answered_with_the_reason(vllm_teacher, requests):
    impossible = Request(("x", "too long"), list(range(100)) * 20, [2])
    answers = {r.key[1]: a for r, a in vllm_teacher.run([requests[0], impossible, requests[1]])}
    assert isinstance(answers.pop("too long"), Refusal) and len(answers) == 2
    assert all(len(a.completion_ids) for a in answers.values())


def test_kd_cache_teacher_with_vllm_killed_and_run_again(tmp_path, smollm):
    command = [
        sys.executable,
        "-m",
        "kdcache",
        "cache-teacher",
        "--limit",
        "24",
        "--mode",
        "both",
        "--max-tokens",
        "16",
    ]
    command += ["--rows-per-shard", "8", "--sparsify", "topk:16", "--out", str(tmp_path / "out"), "--max-num-seqs", "4"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("out/data/*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read().decode()[-2000:]
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    kept = {p: p.read_bytes() for p in tmp_path.glob("out/data/*.parquet")}
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert 2 <= len(kept) < len(plan["shards"])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
    rows = duckdb.sql(f"SELECT sample_id, origin FROM '{tmp_path}/out/data/*.parquet'").fetchall()
    assert len(rows) == len(set(rows)) == 48 and sum(origin == "given" for _, origin in rows) == 24


OUT_OF_MEMORY = """
import resource, sys
import numpy as np
from kdcache import models
from kdcache.examples import load as examples
from kdcache.examples.types import Columns
from kdcache.models import embedded
from kdcache.prompts.tokenize import Prompts
from kdcache.teachers import EngineOptions, Request
from kdcache.teachers.engine import load

model = str(embedded.prepare())
prompts = Prompts(model, models.tokenizer(model))
asked = [prompts.ask(e.messages, e.given) for e in examples.load("builtin", Columns(), 24)]
requests = [Request(("x", str(i)), a.prompt_ids, a.completion_ids) for i, a in enumerate(asked)]
teacher = load("vllm", EngineOptions(model, 8, 512, "float32", extra={"max_num_batched_tokens": 2048}))
expected = {r.key: a for r, a in teacher.run(requests)}
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
start = type(teacher)._start

def start_with_memory_again(self):
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    start(self)

type(teacher)._start = start_with_memory_again
resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, -1))
found = {r.key: a for r, a in teacher.run(requests)}
assert resource.getrlimit(resource.RLIMIT_AS)[0] == -1, "it never ran out of memory"
assert found.keys() == expected.keys()
for key in found:
    assert np.abs(found[key].token_logprobs - expected[key].token_logprobs).max() < 1e-3
print(teacher._arguments["max_num_batched_tokens"], teacher._arguments["max_num_seqs"])
"""


@pytest.mark.slow
def test_an_engine_that_runs_out_of_memory_starts_again_with_half_the_batch_and_loses_nothing(smollm):
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens, sequences = map(int, done.stdout.split()[-2:])
    assert 512 <= tokens <= 1024 and sequences >= 1


@pytest.mark.slow
def test_ctrl_c_with_an_engine_in_a_process_of_its_own_finishes_the_shards_that_are_begun(tmp_path, smollm):
    command = [
        sys.executable,
        "-m",
        "kdcache",
        "cache-teacher",
        "--limit",
        "60",
        "--rows-per-shard",
        "10",
        "--sparsify",
    ]
    command += ["topk:8", "--out", str(tmp_path / "out"), "--max-num-seqs", "4", "--max-model-len", "512"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    text = ""
    for line in process.stderr:
        text += line
        if "tokens/s" in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the engine's process too
            break
    text += process.communicate(timeout=300)[1]
    shards = list(tmp_path.glob("out/data/*.parquet"))
    assert process.returncode == 130 and 1 <= len(shards) < 6, text
    assert "finishing the shards" in text and "To continue:" in text and "Traceback" not in text
