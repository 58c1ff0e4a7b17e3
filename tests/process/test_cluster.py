"""Phase one by several processes, slices of one plan or Ray workers, gives the same cache as one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, capture_plan
from kdcache.cache import integrity, manifest, query
from kdcache.capture import ray as cluster
from kdcache.capture import run as capture
from kdcache.errors import KDError, UsageError
from kdcache.storage import atomic, lock, seal

ALL = "SELECT * EXCLUDE (file_row_number) FROM samples ORDER BY sample_id"


def command(model, rows, out, *more):
    """Return the arguments of `kd cache-teacher` for the configuration of ``capture_plan``."""
    words = ["cache-teacher", "--teacher", model, "--examples", rows, "--out", out, "--engine", "transformers"]
    words += ["--dtype", "float32", "--mode", "both", "--temperature", 0.8, "--max-tokens", 12, "--sparsify", "topk:8"]
    return [*map(str, [*words, "--rows-per-shard", 16, "--split-ratios", "0.6,0.2,0.2", *more])]


def start(*arguments, start_new_session=False, **environment):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-m", "kdcache", *arguments]
    return subprocess.Popen(words, env=environment, start_new_session=start_new_session, **pipes)


def assert_same_cache(cache, other):
    """Assert equal plans, and equal rows to the bit; complete, without duplicates or leftover files."""
    assert json.loads((cache / "plan.json").read_text()) == json.loads((other / "plan.json").read_text())
    assert query.run(cache, ALL) == query.run(other, ALL)
    assert integrity.verify(cache).sound and not list(cache.glob("**/.*"))
    assert json.loads((cache / "manifest.json").read_text())["complete"]


# --- slices ----------------------------------------------------------------------------------------------------------


def test_two_slices_at_the_same_time_make_the_cache_of_one_process(kd, tiny_cache, tiny_model, rows_file, tmp_path):
    out = tmp_path / "out"
    slices = [start(*command(tiny_model, rows_file, out, "--plan-slice", f"{i}/2", "--json")) for i in range(2)]
    answers = [process.communicate(timeout=300) for process in slices]
    assert [process.returncode for process in slices] == [0, 0], answers
    assert not (out / "manifest.json").exists(), "parallel workers never write it"
    facts = [json.loads(stdout) for stdout, _ in answers]
    shards = len(json.loads((out / "plan.json").read_text())["shards"])
    assert sum(f["shards"] for f in facts) == shards and all(f["complete"] for f in facts)
    assert abs(facts[0]["shards"] - facts[1]["shards"]) <= 1 and sum(f["samples_now"] for f in facts) == 78
    assert "kd cache info" in answers[0][1]
    assert json.loads(kd("cache", "info", out, "--json").stdout)["complete"]
    assert_same_cache(out, tiny_cache)


def test_a_slice_is_stopped_and_resumed_and_leaves_the_others_shards_alone(tiny_cache, tiny_model, rows_file, tmp_path):
    out = tmp_path / "out"
    plans = [capture_plan(tiny_model, rows_file, out, plan_slice=(i, 2)) for i in range(2)]
    reports = []
    first = capture.run_slice(plans[0], reports.append, stop=lambda: len(reports) > 3)
    assert first["shards"] == 1 and not first["complete"]
    kept = {path: path.read_bytes() for path in out.glob("data/*")}
    assert [f"data/{path.name}" for path in kept] == [plans[0].shards[0].name]
    assert capture.run_slice(plans[0])["complete"] and all(path.read_bytes() == b for path, b in kept.items())
    assert capture.run_slice(plans[0])["samples_now"] == 0
    assert not manifest.summary(out)["complete"]
    assert capture.run_slice(plans[1])["shards_missing_in_the_cache"] == 0
    assert manifest.summary(out)["complete"]
    assert_same_cache(out, tiny_cache)


def test_a_slice_writes_a_missing_shard_again_although_the_manifest_records_it(
    tiny_cache, tiny_model, rows_file, tmp_path
):
    """The manifest's entry of the missing shard is not held against the new one."""
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    plan = capture_plan(tiny_model, rows_file, copy, plan_slice=(1, 2))
    (copy / plan.assigned_shards()[0].name).unlink()
    assert capture.run_slice(plan)["complete"]
    assert manifest.summary(copy)["complete"]
    assert_same_cache(copy, tiny_cache)


def test_a_slice_of_another_run_is_refused(tiny_cache, tiny_model, rows_file):
    with pytest.raises(KDError, match="seed: 0 -> 5"):
        capture.run_slice(capture_plan(tiny_model, rows_file, tiny_cache, seed=5, plan_slice=(0, 2)))


def test_a_plan_with_other_shards_is_refused(tiny_cache, tiny_model, rows_file, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    plan = json.loads((copy / "plan.json").read_text())
    plan["shards"][0]["examples"] += 1
    atomic.write_json(copy / "plan.json", seal.with_checksum(plan))
    with pytest.raises(KDError, match="into other shards"):
        capture.run(capture_plan(tiny_model, rows_file, copy))


@pytest.mark.parametrize("text", ["2/2", "3/2", "0/0", "1", "a/b", "-1/2", "1/2/3", ""])
def test_a_bad_slice_is_refused_with_an_example(text):
    from click.testing import CliRunner

    import cli

    result = CliRunner().invoke(cli.kd, ["cache-teacher", "--engine", "transformers", f"--plan-slice={text}"])
    assert result.exit_code and "as in 0/4 .. 3/4" in (result.output + str(result.exception))


def test_slices_cannot_overwrite_and_ray_takes_no_slice(tiny_model, rows_file, tmp_path):
    from click.testing import CliRunner

    import cli

    with pytest.raises(UsageError, match="--overwrite would have each slice delete"):
        capture_plan(tiny_model, rows_file, tmp_path / "out", plan_slice=(0, 2), overwrite=True)
    for arguments, words in (
        (["--ray", "--plan-slice", "0/2"], "--plan-slice is for processes"),
        (["--workers", "2"], "go with --ray"),
    ):
        result = CliRunner().invoke(cli.kd, ["cache-teacher", "--engine", "transformers", *arguments])
        assert result.exit_code == 2 and words in result.output


def test_slices_share_the_folder_and_no_other_process_writes(tmp_path):
    out = tmp_path / "out"
    with lock.held_slice(out, 0, 2):
        with lock.held_slice(out, 1, 2):
            with pytest.raises(KDError, match=rf"slice 1/2 of .* is being written by process {os.getpid()}"):
                lock.held_slice(out, 1, 2).__enter__()
            with pytest.raises(KDError, match=r"out is being written by process"):
                lock.held(out).__enter__()
        with pytest.raises(KDError, match=r"out is being written by process"):  # the first slice still holds it
            lock.held(out).__enter__()
    with lock.held(out), pytest.raises(KDError, match=r"out is being written by process"):
        lock.held_slice(out, 0, 2).__enter__()
    assert not out.exists()


# --- Ray -------------------------------------------------------------------------------------------------------------


def workers_of(driver):
    """Return the process ids of the Ray workers that descend from a driver, read from /proc."""

    def parent(process):
        return int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])

    workers = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if not (folder / "cmdline").read_bytes().startswith(b"ray::Worker"):
                continue
            ancestor = int(folder.name)
            while ancestor not in (0, 1, driver):
                ancestor = parent(ancestor)
        except OSError:
            continue
        if ancestor == driver:
            workers.append(int(folder.name))
    return workers


def test_two_ray_workers_one_of_them_killed_make_the_cache_of_one_process(tiny_model, tmp_path):
    pytest.importorskip("ray")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": f"{i} " * 9}) + "\n" for i in range(120)))
    process = start(*command(tiny_model, rows, out, "--ray", "--workers", 2, "--json"))
    deadline = time.monotonic() + 300
    while len(list(out.glob("data/*.parquet"))) < 3 or len(workers_of(process.pid)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    kept = {path: path.read_bytes() for path in out.glob("data/*.parquet")}
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    assert json.loads(stdout)["samples"] == 240 and "workers (1 lost)" in stderr and "tokens/s" in stderr
    assert all(path.read_bytes() == data for path, data in kept.items()), "a shard once written never changes"
    capture.run(capture_plan(tiny_model, rows, tmp_path / "whole"))
    assert 3 <= len(kept) < len(list(out.glob("data/*.parquet")))
    assert_same_cache(out, tmp_path / "whole")


def test_a_cache_is_overwritten_by_one_of_the_same_plan(tiny_cache, tiny_model, rows_file, tmp_path):
    pytest.importorskip("ray")
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    written = {path.name: path.stat().st_mtime_ns for path in copy.glob("data/*.parquet")}
    cluster.run(capture_plan(tiny_model, rows_file, copy, overwrite=True), cluster.RayOptions(workers=1))
    assert_same_cache(copy, tiny_cache)
    assert all((copy / "data" / name).stat().st_mtime_ns > changed for name, changed in written.items())


def test_an_error_in_a_worker_is_one_sentence_and_changes_nothing(tiny_cache, tiny_model, rows_file, tmp_path):
    pytest.importorskip("ray")
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    plan = capture_plan(tiny_model, rows_file, copy, overwrite=True, seed=9, engine_extra={"max_num_seqs": 1})
    with pytest.raises(KDError, match=r"^--max-num-seqs: an option of vLLM; --engine transformers does not take it$"):
        cluster.run(plan, cluster.RayOptions(workers=1))
    assert_same_cache(copy, tiny_cache)
    unexpected = cluster.as_one_sentence(ValueError("no such head\nmore"))
    assert str(unexpected) == "a worker failed: ValueError: no such head. Whole shards are kept"


def test_without_ray_the_error_says_how_to_install_it(tiny_model, rows_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KDError, match=r"ray is not installed: pip install 'kdcache\[ray\]'"):
        cluster.run(capture_plan(tiny_model, rows_file, tmp_path / "out"), cluster.RayOptions(workers=1))
    assert not (tmp_path / "out").exists()


def test_a_worker_has_the_gpus_that_its_engines_parallelism_asks_for(tiny_model, rows_file, tmp_path):
    plan = capture_plan(tiny_model, rows_file, tmp_path / "out", engine_extra={"tensor_parallel_size": 4})
    assert cluster.RayOptions().gpus(plan) == 4 and cluster.RayOptions(gpus_per_worker=8).gpus(plan) == 8
    with pytest.raises(UsageError, match="the engine's parallelism asks for 4"):
        cluster.RayOptions(gpus_per_worker=2).gpus(plan)
    assert cluster.RayOptions().gpus(capture_plan(tiny_model, rows_file, tmp_path / "out")) == 0


def test_a_lost_workers_shards_are_the_next_to_be_drawn():
    shard_queue = cluster.ShardQueue(["a", "b", "c", "d"])
    assert [shard_queue.draw(0), shard_queue.draw(0), shard_queue.draw(1)] == [["a"], ["b"], ["c"]]
    shard_queue.report(0, capture.Tally(shards_written=1, answers=7))
    shard_queue.put_back(0, [1])  # the first was written
    assert shard_queue.tallies()[0].shards_written == 1 and shard_queue.begun(0) == []
    assert [shard_queue.draw(2), shard_queue.draw(2), shard_queue.draw(2)] == [["b"], ["d"], []]
    shard_queue.put_back(2, [1, 3])
    shard_queue.close()
    assert shard_queue.draw(3) == []


@pytest.mark.slow
def test_ctrl_c_once_lets_all_workers_finish_the_shards_they_have_begun(tiny_model, tmp_path):
    pytest.importorskip("ray")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": f"{i} " * 9}) + "\n" for i in range(800)))
    words = command(tiny_model, rows, out, "--rows-per-shard", 100, "--ray", "--workers", 2)
    process = start(*words, start_new_session=True)
    text = ""
    for line in process.stderr:
        text += line
        if "tokens/s" in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            break
    text += process.communicate(timeout=300)[1]
    shards = len(list(out.glob("data/[!.]*.parquet")))
    assert process.returncode == 130 and "finishing the shards" in text and "Traceback" not in text, text
    planned = len(json.loads((out / "plan.json").read_text())["shards"])
    assert 1 <= shards < planned and f"stopped with {shards} of {planned} shards" in text, text
    assert "To continue:" in text
    assert integrity.verify(out).problems == {} and not list(out.glob("**/.*")) and not workers_of(process.pid)


@pytest.mark.slow
@pytest.mark.integration
def test_two_ray_workers_with_the_real_vllm_give_the_cache_of_one_process(tmp_path, smollm):
    """Same plan, same ids, and log-probabilities that differ only by what batching changes in float32."""
    pytest.importorskip("ray")
    pytest.importorskip("vllm")
    words = ["cache-teacher", "--limit", 24, "--mode", "both", "--max-tokens", 12, "--sparsify", "topk:8"]
    words += ["--rows-per-shard", 8, "--max-model-len", 512, "--max-num-seqs", 4, "--dtype", "float32"]
    words += ["--precision", "f32", "--seed", 3]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    for out, more in (("one", []), ("two", ["--ray", "--workers", 2])):
        process = start(*map(str, [*words, "--out", tmp_path / out, *more]), **small)
        _, stderr = process.communicate(timeout=800)
        assert process.returncode == 0 and "Traceback" not in stderr, stderr
    plans = [json.loads((tmp_path / out / "plan.json").read_text()) for out in ("one", "two")]
    assert plans[0] == plans[1] and len(plans[0]["shards"]) >= 6
    assert integrity.verify(tmp_path / "two").sound
    columns = "sample_id, prompt_ids, completion_ids, finish_reason, candidate_ids, candidate_logprobs, token_logprobs"
    one, two = (
        query.run(tmp_path / out, f"SELECT {columns} FROM samples ORDER BY sample_id")[1] for out in ("one", "two")
    )
    assert len(one) == len(two) == 48
    for ours, theirs in zip(two, one):
        assert ours[:4] == theirs[:4]
        assert ours[6] == pytest.approx(theirs[6], abs=1e-3)
        for ids, logprobs, other_ids, other_logprobs in zip(ours[4], ours[5], theirs[4], theirs[5]):
            assert logprobs == pytest.approx(other_logprobs, abs=1e-3)
            assert len(set(ids) ^ set(other_ids)) <= 2  # a tie at the edge
