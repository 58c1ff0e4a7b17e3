"""No fault loses or mixes rows: kills, damaged and truncated files, a full disk, a false manifest, a second writer."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import ROOT, capture_plan
from kdcache.cache import documents, integrity, manifest, query, reader
from kdcache.cache.format import parquet_options
from kdcache.capture import folder
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.storage import lock
from kdcache.teachers import Answer, Refusal

ALL = "SELECT * EXCLUDE (file_row_number) FROM samples ORDER BY sample_id"


@pytest.fixture
def copy(tiny_cache, tmp_path):
    return shutil.copytree(tiny_cache, tmp_path / "copy")


def redo(model, rows, cache):
    """Run the same command again, as a user does after --repair."""
    return capture.run(capture_plan(model, rows, cache))


# --- killed ----------------------------------------------------------------------------------------------------------


def capture_once(model, rows, out):
    capture.run(capture_plan(model, rows, out, rows_per_shard=8, sparsify="threshold:0.02", capture_k=64))


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing_and_duplicate_nothing(kills, tiny_model, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Number {i}", "completion": f"{i} " * 9}) + "\n" for i in range(300))
    )
    capture_once(tiny_model, rows, tmp_path / "whole")
    # The imports happen once; each child is forked from a process that has computed nothing yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "kdcache.capture.run", "helpers", "datasets"])
    chance, in_the_middle, kept = random.Random(kills), 0, {}
    for _ in range(kills):
        process = context.Process(target=capture_once, args=(tiny_model, rows, out))
        process.start()
        if not (out / "data").exists():  # the first kill is after the first shard
            while process.is_alive() and not list(out.glob("data/*.parquet")):
                process.join(0.05)
        process.join(chance.uniform(0.1, 3))
        in_the_middle += process.exitcode is None
        process.kill()
        process.join()
        shards = {path: path.read_bytes() for path in out.glob("data/*.parquet")}
        assert all(shards[path] == data for path, data in kept.items()), "a shard once written never changes"
        kept = shards
    assert in_the_middle >= 2
    capture_once(tiny_model, rows, out)
    assert query.run(out, ALL) == query.run(tmp_path / "whole", ALL)
    assert integrity.verify(out).sound and not list(out.glob("**/.*")), "no half-written file, no lock is left"


# --- damaged ---------------------------------------------------------------------------------------------------------


def parts_of(shard):
    """Return an offset in each part of a shard: both magics, every page of every column, the footer and its length."""
    data = shard.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    parts = {"first magic": 1, "last magic": len(data) - 2, "footer length": len(data) - 7}
    parts |= {
        f"footer at {share:.0%}": len(data) - 8 - footer + int(footer * share) for share in (0.01, 0.3, 0.6, 0.99)
    }
    with pq.ParquetFile(shard) as file:
        for group in range(file.metadata.num_row_groups):
            for number in range(file.metadata.num_columns):
                chunk = file.metadata.row_group(group).column(number)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                name = chunk.path_in_schema
                parts[f"header of {name}"] = start + 2
                if chunk.total_compressed_size > 300:  # else it may be a page of nulls, which is all header
                    parts[f"data of {name}"] = start + chunk.total_compressed_size // 2
                parts[f"end of {name}"] = start + chunk.total_compressed_size - 1
    return parts


@pytest.mark.parametrize("vouched", [True, False])
def test_a_flipped_bit_in_each_part_of_a_shard_is_noticed(vouched, copy):
    """The manifest's sha256 finds it, and without a manifest the shard's own seal."""
    shard = sorted((copy / "data").glob("train-*"))[0]
    name, plan = f"data/{shard.name}", documents.read_plan(copy)
    recorded = manifest.recorded(copy)[name] if vouched else None
    whole, missed = shard.read_bytes(), []
    for part, place in parts_of(shard).items():
        for bit in (1, 128):
            data = bytearray(whole)
            data[place] ^= bit
            shard.write_bytes(data)
            if not integrity.examine(shard, name, plan, recorded).problems:
                missed.append((part, bit))
    assert not missed


def test_a_damaged_shard_is_set_aside_and_only_it_is_redone(copy, tiny_cache, tiny_model, rows_file):
    shard = sorted((copy / "data").glob("train-*"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 16
    shard.write_bytes(data)
    others = {p: p.stat().st_mtime_ns for p in (copy / "data").iterdir() if p != shard}
    report = integrity.verify(copy)
    assert list(report.problems) == [f"data/{shard.name}"] and not report.missing
    integrity.repair(report)
    assert (copy / "set-aside" / shard.name).read_bytes() == bytes(data), "nothing is deleted"
    redo(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)
    assert others == {p: p.stat().st_mtime_ns for p in (copy / "data").iterdir() if p != shard}


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_a_truncated_shard_is_found_and_redone(length, copy, tiny_cache, tiny_model, rows_file):
    shard = sorted((copy / "data").glob("train-*"))[0]
    shard.write_bytes(shard.read_bytes()[:length])
    report = integrity.verify(copy)
    assert list(report.problems) == [f"data/{shard.name}"]
    integrity.repair(report)
    redo(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


@pytest.mark.parametrize(
    "falsify",
    [
        lambda m: m["shards"][0].update(rows=m["shards"][0]["rows"] + 1),
        lambda m: m["shards"][0].update(completion_tokens=7),
        lambda m: m["shards"][0].update(sha256="0" * 64),
        lambda m: m["shards"][0].pop("sha256"),
        lambda m: m.pop("shards"),
        lambda m: m["shards"][0].pop("name"),
    ],
)
def test_a_false_manifest_is_noticed(falsify, copy, tiny_cache, tiny_model, rows_file):
    content = json.loads((copy / "manifest.json").read_text())
    first = content["shards"][0]["name"]
    falsify(content)
    (copy / "manifest.json").write_text(json.dumps(content))
    report = integrity.verify(copy)
    assert list(report.problems) in (["manifest.json"], [first])
    integrity.repair(report)
    redo(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


def test_a_shard_that_is_not_what_was_written_is_not_laundered_by_a_new_manifest(copy, tiny_model, rows_file):
    shard = sorted((copy / "data").glob("train-*"))[0]
    table = pq.read_table(shard)
    pq.write_table(table.slice(0, 3), shard)  # readable, plausible, and not what the teacher's run wrote
    with pytest.raises(KDError, match="is not what was written") as error:
        manifest.summary(copy)
    assert error.value.exit_code == 3 and list(integrity.verify(copy).problems) == [f"data/{shard.name}"]


def rewritten(shard, **changes):
    """Change values of some columns and write the shard again with valid checksums, so that only the numbers are wrong."""
    table = pq.read_table(shard)
    for name, change in changes.items():
        place = table.schema.get_field_index(name)
        values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), values)
    pq.write_table(table, shard, **parquet_options("q8"))


def in_first(change):
    def apply(rows):
        change(rows[0])
        return rows

    return apply


@pytest.mark.parametrize(
    "column, change, word",
    [
        ("candidate_ids", in_first(lambda row: row[0].__setitem__(0, 49152)), "outside the vocabulary"),
        ("completion_ids", in_first(lambda row: row.__setitem__(0, -1)), "outside the vocabulary"),
        ("candidate_logprobs", in_first(lambda row: row[0].reverse()), "not sorted"),
        ("candidate_logprobs", in_first(lambda row: row[0].__setitem__(-1, float("-inf"))), "not finite"),
        ("candidate_ids", in_first(lambda row: row[0].__setitem__(1, row[0][0])), "are repeated"),
        ("tail_logprobs", in_first(lambda row: row.__setitem__(0, 0.0)), "do not sum to 1"),
        ("tail_logprobs", in_first(lambda row: row.pop()), "not as long"),
        ("token_logprobs", in_first(lambda row: row.__setitem__(0, 0.5)), "no log-probabilities"),
        ("candidate_ids", in_first(lambda row: row[0].pop()), "not equally long"),
        ("split", lambda rows: ["test"] * len(rows), "split is not"),
        ("sample_id", lambda rows: [rows[0]] * len(rows), "occurs"),
    ],
)
def test_impossible_numbers_are_noticed(column, change, word, copy):
    shard = sorted((copy / "data").glob("train-*"))[0]
    rewritten(shard, **{column: change})
    (copy / "manifest.json").unlink()  # so that only the numbers show it
    problems = integrity.verify(copy).problems
    assert word in " ".join(problems[f"data/{shard.name}"]) and len(problems) == 1


def test_files_that_are_missing_foreign_or_edited_are_named(copy, tiny_cache, tiny_model, rows_file, tmp_path):
    names = sorted(os.listdir(copy / "data"))
    (copy / "data" / names[0]).unlink()
    shutil.copy(copy / "data" / names[1], copy / "data/train-00099.parquet")
    (copy / "vocab.parquet").write_bytes(b"PAR1")
    report = integrity.verify(copy)
    assert report.missing == [f"data/{names[0]}"]
    assert sorted(report.problems) == ["data/train-00099.parquet", "vocab.parquet"]
    integrity.repair(report)
    redo(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound
    plan = json.loads((copy / "plan.json").read_text())
    plan["fields"]["seed"] = 4
    (copy / "plan.json").write_text(json.dumps(plan))
    report = integrity.verify(copy)
    assert list(report.problems) == ["plan.json"]
    integrity.repair(report)
    redo(tiny_model, rows_file, copy)
    assert integrity.verify(copy).sound and query.run(copy, ALL) == query.run(tiny_cache, ALL)


def test_kd_cache_verify_reports_problems_with_exit_code_3_and_repairs_them(kd, copy):
    report = json.loads(kd("cache", "verify", copy, "--json").stdout)
    assert report["sound"] and report["samples"] == 78 and report["problems"] == {}
    shard = sorted((copy / "data").glob("train-*"))[0]
    shard.write_bytes(shard.read_bytes()[:500])
    done = kd("cache", "verify", copy, code=3)
    assert f"bad      data/{shard.name}: " in done.stdout and "--repair" in done.stderr
    done = kd("cache", "verify", copy, "--repair", code=3)
    assert "set-aside" in done.stderr and "same kd cache-teacher command" in done.stderr
    done = kd("cache", "verify", copy, code=3)
    assert f"missing  data/{shard.name}" in done.stdout


# --- shared, interrupted, full ---------------------------------------------------------------------------------------


def test_a_second_writer_learns_which_process_holds_the_cache(tiny_model, rows_file, tmp_path):
    with (
        lock.held(tmp_path / "out"),
        pytest.raises(KDError, match=rf"is being written by process {os.getpid()} on .* since 2"),
    ):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out"))


def test_the_lock_of_a_crashed_writer_does_not_block(tiny_model, rows_file, tmp_path):
    code = f"import os; from pathlib import Path; from kdcache.storage import lock; held = lock.held(Path({str(tmp_path / 'out')!r})); held.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert (tmp_path / "out/.lock").exists()
    assert capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=2))["complete"]


def test_an_engine_that_cannot_start_leaves_no_folder_behind(tiny_model, rows_file, tmp_path):
    with pytest.raises(KDError):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", engine_extra={"max_num_seqs": 1}))
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_finishes_the_shards_that_it_has_begun_and_no_others(tiny_cache, tiny_model, rows_file, tmp_path):
    reports = []
    plan = capture_plan(tiny_model, rows_file, tmp_path / "out")
    summary = capture.run(plan, reports.append, stop=lambda: len(reports) > 3)
    assert len(summary["shards"]) == 1 and not summary["complete"]
    assert capture.run(plan)["complete"] and query.run(tmp_path / "out", ALL) == query.run(tiny_cache, ALL)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_the_shard_twice_stops(times, tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Number {i}", "completion": f"{i} " * 20}) + "\n" for i in range(300))
    )
    command = ["cache-teacher", "--teacher", tiny_model, "--examples", rows, "--out", tmp_path / "out"]
    command += ["--engine", "transformers", "--sparsify", "topk:8", "--rows-per-shard", "100"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kdcache", *map(str, command)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "tokens/s" in line or (times == 2 and "finishing" in line):
            process.send_signal(signal.SIGINT)
        if "finishing" in line:
            break
    lines.append(process.communicate(timeout=120)[1])
    text = "".join(lines)
    assert process.returncode == 130 and "To continue:\n  kd cache-teacher" in text and "Traceback" not in text
    assert len(list((tmp_path / "out/data").glob("*.parquet"))) == (1 if times == 1 else 0)


def test_a_full_disk_stops_with_what_is_needed_and_keeps_whole_shards(kd, tiny_cache, tiny_model, rows_file, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        plan = capture_plan(tiny_model, rows_file, disk / "out")

        def fill_but(free):
            room = shutil.disk_usage(disk).free - free
            (disk / "ballast").write_bytes(b"x" * max(room, 0))

        fill_but(100_000)
        with pytest.raises(KDError, match=r"disk full: vocab.parquet needs about 0.7 MB, and 0.\d MB are free"):
            capture.run(plan)
        (disk / "ballast").unlink()
        folder.claim(plan)
        fill_but(50_000)
        with pytest.raises(
            KDError, match=r"disk full: data/\S+ needs about \d\.\d MB, and 0\.\d MB are free at .*Whole shards"
        ):
            capture.run(plan)
        before = {p: p.read_bytes() for p in (disk / "out").glob("data/[!.]*")}
        assert before and not integrity.verify(disk / "out").problems and not list((disk / "out").glob("data/.*"))
        (disk / "ballast").unlink()
        assert capture.run(plan)["complete"] and query.run(disk / "out", ALL) == query.run(tiny_cache, ALL)
        assert all(path.read_bytes() == data for path, data in before.items())
    finally:
        subprocess.run(["umount", disk], check=True)


# --- bad examples ----------------------------------------------------------------------------------------------------


class HalfBlindTeacher:
    """Answers what it is asked, but for some: refuses one, says NaN of another, and nothing of a third."""

    version = "half-blind 1"

    def run(self, requests):
        for number, request in enumerate(requests):
            ids = request.completion_ids or [5]
            logprobs = np.log(np.full((len(ids), 8), 0.1, dtype=np.float32))
            if number == 1:
                logprobs = logprobs * np.nan
            answer = Answer(ids, np.tile(np.arange(8), (len(ids), 1)), logprobs, logprobs[:, 0], np.ones(len(ids), int))
            if number == 2:
                answer = Answer([], logprobs[:0], logprobs[:0], logprobs[0, :0], logprobs[0, :0])
            yield request, Refusal("it did not like it") if number == 0 else answer


def test_a_request_that_fails_is_recorded_with_the_reason_and_the_run_goes_on(tiny_model, rows_file, tmp_path):
    plan = capture_plan(tiny_model, rows_file, tmp_path / "out", mode="score")
    folder.claim(plan)
    capture.fill(plan, plan.shards, HalfBlindTeacher(), capture.Tally())
    summary = manifest.rebuild(tmp_path / "out")
    assert summary["complete"] and summary["rows"] == 36 and summary["rejected"] == 4
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()}
    assert {
        *(
            "it did not like it",
            "the teacher answered nothing",
            "the teacher's log-probabilities are not finite numbers",
        )
    } < reasons
    assert integrity.verify(tmp_path / "out").sound


def test_strict_fails_at_a_row_that_cannot_be_used(tiny_model, rows_file, tmp_path):
    with pytest.raises(KDError, match=r"--strict: rows:r17: row 18: no prompt"):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", strict=True))
    capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out"))
    with pytest.raises(KDError, match="--strict: 1 rows were rejected"):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", strict=True))


def test_an_error_in_the_writing_thread_ends_the_run_with_that_error(tiny_model, rows_file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error", "the disk")

    monkeypatch.setattr(capture.writer, "write_shard", fail)
    with pytest.raises(OSError, match="Input/output error"):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out"))


# --- both policies, any vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["topk:8", "threshold:0.05"])
@pytest.mark.parametrize("precision", ["q8", "f32"])
@pytest.mark.parametrize("vocabulary", [49_152, 151_936, 262_144])
def test_a_large_vocabulary_round_trips(vocabulary, precision, spec, tiny_model, rows_file, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = shutil.copytree(tiny_model, tmp_path / "model")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model, vocab_size=vocabulary)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    plan = capture_plan(
        str(model), rows_file, tmp_path / "out", limit=6, mode="score", sparsify=spec, capture_k=64, precision=precision
    )
    capture.run(plan)
    assert integrity.verify(tmp_path / "out").sound
    name = sorted(os.listdir(tmp_path / "out/data"))[0]
    samples = reader.Cache(tmp_path / "out").read(name, 0, [0])
    teacher = AutoModelForCausalLM.from_pretrained(model)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids.tolist(), *sample.completion_ids.tolist()]])
        full = teacher(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        best = sample.candidates.starts
        assert np.array_equal(sample.candidates.ids[best], full.argmax(-1).numpy())
        assert sample.candidates.logprobs[best] == pytest.approx(full.max(-1).values.detach().numpy(), abs=0.2)
    _, ((most,),) = query.run(tmp_path / "out", "SELECT max(list_max(flatten(candidate_ids))) FROM samples")
    assert most > 0.8 * vocabulary
