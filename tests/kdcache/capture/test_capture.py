"""Phase one with the transformers engine and a tiny model: a row holds what it should, and nothing is lost or mixed."""

import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import duckdb
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import ROOT, capture_plan
from kdcache.cache import manifest, query
from kdcache.capture import folder
from kdcache.capture import run as capture
from kdcache.capture.dry_run import dry_run
from kdcache.capture.requests import questions_of
from kdcache.errors import KDError, UsageError
from kdcache.storage import atomic, seal

COLUMNS = "sample_id, prompt_ids, completion_ids, candidate_ids, candidate_logprobs, tail_logprobs, token_logprobs, token_ranks"


def all_rows(cache, columns=COLUMNS):
    return duckdb.sql(f"SELECT {columns} FROM '{cache}/data/*.parquet' ORDER BY sample_id").fetchall()


def check_rows(rows, model, shift=0):
    """Compare each row with the model's own distributions at its completion positions, which ``shift`` misaligns."""
    for _, prompt, completion, ids, logprobs, tails, own, ranks in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        first = len(prompt) - 1 + shift
        full = torch.log_softmax(logits[first : first + len(completion)].double(), -1)
        best = full.topk(len(ids[0]), -1)
        stored = torch.tensor(logprobs, dtype=torch.float64)
        assert ((best.values - stored).abs() <= 0.02 * (-best.values).sqrt() + 1e-3).all()  # the codebook's rounding
        assert (torch.tensor(ids)[:, 0] == best.indices[:, 0]).float().mean() > 0.9  # ties may swap
        truth = full.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert (truth - torch.tensor(own, dtype=torch.float64)).abs().max() < 0.02
        assert ((full > truth[:, None] + 1e-4).sum(-1) + 1 <= torch.tensor(ranks)).all()
        assert ((1 - best.values.exp().sum(-1)) - torch.tensor(tails, dtype=torch.float64).exp()).abs().max() < 2e-3


def test_every_row_holds_the_models_own_distributions(tiny_cache, tiny_model):
    check_rows(all_rows(tiny_cache), AutoModelForCausalLM.from_pretrained(tiny_model))


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_shifted_by_one_are_noticed(tiny_cache, tiny_model, shift):
    with pytest.raises((AssertionError, RuntimeError)):
        check_rows(all_rows(tiny_cache)[:5], AutoModelForCausalLM.from_pretrained(tiny_model), shift)


def test_given_and_sampled_rows_are_what_they_should_be(tiny_cache):
    rows = all_rows(
        tiny_cache, "sample_id, origin, completion, completion_ids, finish_reason, sample_index, seed, reference, task"
    )
    assert len(rows) == 78
    for sample_id, origin, completion, ids, reason, index, seed, reference, task in rows:
        number = int(sample_id.split(":")[1][1:])
        assert reference == f"{number}, {number} 🙂 ¡año!" and task == f"t{number % 4}"
        if origin == "given":
            assert completion == reference and ids[-1] == 2 and reason is index is seed is None
        else:
            assert len(ids) <= 12 and index == 0 and seed is not None
            assert (reason == "stop") == (ids[-1] == 2)


def test_a_row_without_a_prompt_is_counted_and_named(tiny_cache):
    rejected = [json.loads(line) for line in (tiny_cache / "rejected.jsonl").read_text().splitlines()]
    assert [(r["row_id"], r["reason"][:18]) for r in rejected] == [("r17", "row 18: no prompt ")]
    assert json.loads((tiny_cache / "manifest.json").read_text())["rejected"] == 1


def test_a_group_is_in_one_split_and_the_plan_names_every_shard(tiny_cache):
    rows = all_rows(tiny_cache, "group_id, split")
    assert len({group for group, _ in rows}) == len(set(rows)) == 39
    plan = json.loads((tiny_cache / "plan.json").read_text())
    assert sorted(p.name for p in (tiny_cache / "data").iterdir()) == sorted(s["name"][5:] for s in plan["shards"])


def test_the_same_command_again_does_nothing(tiny_cache, tiny_model, rows_file, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    before = {p.name: p.stat().st_mtime_ns for p in (copy / "data").iterdir()}
    capture.run(capture_plan(tiny_model, rows_file, copy))
    assert before == {p.name: p.stat().st_mtime_ns for p in (copy / "data").iterdir()}


def test_a_missing_shard_is_filled_with_the_same_rows(tiny_cache, tiny_model, rows_file, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    victim = sorted((copy / "data").glob("train-*"))[1]
    victim.unlink()
    assert not manifest.rebuild(copy)["complete"]
    assert capture.run(capture_plan(tiny_model, rows_file, copy))["complete"]
    assert all_rows(copy) == all_rows(tiny_cache)


def test_another_fingerprint_is_refused_with_the_fields_that_differ(tiny_cache, tiny_model, rows_file):
    with pytest.raises(KDError, match=r"(?s)seed: 0 -> 5.*sparsify: \"topk:8\" -> \"topk:4\"") as error:
        capture.run(capture_plan(tiny_model, rows_file, tiny_cache, seed=5, sparsify="topk:4"))
    assert "--overwrite" in str(error.value) and "mode" not in str(error.value)


def test_a_folder_that_is_no_cache_is_left_alone(tiny_model, rows_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(KDError, match="is no cache"):
            capture.run(capture_plan(tiny_model, rows_file, tmp_path, overwrite=overwrite))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_rows_that_do_not_fit_are_rejected_whole(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    long, empty = {"prompt": "x " * 300, "completion": "y"}, {"prompt": "fine", "completion": ""}
    rows.write_text(
        "".join(json.dumps(r) + "\n" for r in (long, empty, {"prompt": "fine", "completion": "yes"}, {"prompt": "a"}))
    )
    plan = capture_plan(
        tiny_model, rows, tmp_path / "out", mode="score", max_model_len=100, split_ratios=(1.0, 0.0, 0.0)
    )
    summary = capture.run(plan)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert summary["rows"] == 1 and summary["rejected"] == 3
    assert "do not fit max_model_len 100" in reasons[0] and reasons[1] == "the completion is empty"
    assert reasons[2] == "no completion to score"


def test_a_slice_whose_rows_were_all_rejected_is_a_shard_without_row_groups(tiny_model, tmp_path):
    from datasets import load_dataset

    rows = tmp_path / "rows.jsonl"
    good, bad = {"prompt": "fine", "completion": "yes"}, {"prompt": "fine", "completion": ""}
    rows.write_text("".join(json.dumps(r) + "\n" for r in (good, bad, good)))
    plan = capture_plan(
        tiny_model, rows, tmp_path / "out", mode="score", rows_per_shard=1, split_ratios=(1.0, 0.0, 0.0)
    )
    summary = capture.run(plan)
    assert [shard["rows"] for shard in summary["shards"]] == [1, 0, 1]
    assert load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))["train"].num_rows == 2
    assert query.run(tmp_path / "out", "SELECT count(*) FROM samples")[1] == [(2,)]


def test_duplicate_ids_are_an_error(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 3, "prompt": "a", "completion": "b"}\n' * 2)
    with pytest.raises(KDError, match="two rows have the id '3'"):
        capture_plan(tiny_model, rows, tmp_path / "out")


def test_messages_are_read_up_to_the_last_assistant_turn(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "last"))
    ]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    plan = capture_plan(tiny_model, rows, tmp_path / "out", mode="score", split_ratios=(1.0, 0.0, 0.0))
    capture.run(plan)
    ((prompt, completion),) = all_rows(tmp_path / "out", "prompt, completion")
    assert "assistant\nb<|im_end|>" in prompt and "last" not in prompt and completion == "last"


def test_the_dry_run_counts_and_writes_nothing(tiny_model, rows_file, tmp_path):
    facts = dry_run(capture_plan(tiny_model, rows_file, tmp_path / "out"))
    assert facts["samples_to_do"] == 78 and facts["rejected"] == 1 and facts["shards_to_do"] == facts["shards"]
    assert facts["sampled_completion_tokens_at_most"] == 39 * 12 and not (tmp_path / "out").exists()


def test_more_candidates_than_the_vocabulary_are_refused(tiny_model, rows_file, tmp_path):
    with pytest.raises(UsageError, match="vocabulary of 49152"):
        capture_plan(tiny_model, rows_file, tmp_path / "out", sparsify="topk:50000")


def test_sample_seeds_do_not_depend_on_order(tiny_cache, tiny_model, rows_file, tmp_path):
    """Rows in reverse order give the same answers."""
    reverse = tmp_path / "rows.jsonl"  # of the same name: it is part of the ids
    reverse.write_text(
        "".join(reversed(rows_file.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8"
    )
    capture.run(capture_plan(tiny_model, reverse, tmp_path / "out"))
    wanted = "sample_id, completion_ids, candidate_ids"
    assert all_rows(tmp_path / "out", wanted) == all_rows(tiny_cache, wanted)


def test_killed_in_the_middle_the_same_command_completes_it(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Number {i}", "completion": f"{i} " * 20}) + "\n" for i in range(400))
    )
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "kdcache",
        "cache-teacher",
        "--teacher",
        tiny_model,
        "--examples",
        rows,
        "--out",
        out,
    ]
    command = [*map(str, command), "--engine", "transformers", "--sparsify", "topk:8", "--rows-per-shard", "20"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("data/*.parquet"))) < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read().decode()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {p: p.read_bytes() for p in out.glob("data/*.parquet")}
    assert 4 <= len(kept) < 22 and not (out / "manifest.json").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert all(path.read_bytes() == data for path, data in kept.items())
    ids = [row[0] for row in all_rows(out, "sample_id")]
    assert sorted(ids) == sorted(f"rows:{i}:g" for i in range(400))
    assert not list(out.glob("data/.*")), "no half-written file is left"


def test_the_array_of_a_row_is_in_candidate_order(tiny_cache):
    for *_, logprobs in all_rows(tiny_cache, "candidate_logprobs"):
        assert all((np.diff(position) <= 0).all() for position in logprobs)


def test_two_captures_started_into_one_folder_are_not_mixed(tiny_model, rows_file, tmp_path):
    """Both saw an empty folder; the first claimed it while the second's engine started."""
    first = capture_plan(tiny_model, rows_file, tmp_path / "out")
    second = capture_plan(tiny_model, rows_file, tmp_path / "out", seed=1)
    folder.check(first), folder.check(second)
    folder.claim(first)
    with pytest.raises(KDError, match="seed: 0 -> 1"):
        folder.claim(second)
    folder.claim(capture_plan(tiny_model, rows_file, tmp_path / "out"))  # the same plan may go on


def test_a_run_killed_before_its_first_file_leaves_no_obstacle(tiny_model, rows_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.plan.json.host.1.tmp").write_text("half")
    assert capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=2))["rows"] == 4


def test_overwrite_deletes_the_old_cache_only_after_the_engine_has_started(tiny_cache, tiny_model, rows_file, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    before = all_rows(copy)
    broken = capture_plan(tiny_model, rows_file, copy, overwrite=True, seed=9, engine_extra={"max_num_seqs": 1})
    with pytest.raises(UsageError, match="an option of vLLM"):
        capture.run(broken)
    assert all_rows(copy) == before
    capture.run(capture_plan(tiny_model, rows_file, copy, overwrite=True, seed=9))
    assert all_rows(copy) != before and json.loads((copy / "plan.json").read_text())["fields"]["seed"] == 9


def test_strange_rows_are_rejected_and_the_others_captured(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    parts = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}]
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    half = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "HALF"}]
    text = "".join(json.dumps({"messages": m}) + "\n" for m in (good, parts, half)).replace("HALF", "\\ud83d")
    rows.write_text(text)
    summary = capture.run(capture_plan(tiny_model, rows, tmp_path / "out", mode="score"))
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert summary["rows"] == 1 and len(reasons) == 2
    assert any("a part that is no text (image)" in r for r in reasons) and any(
        "not valid Unicode" in r for r in reasons
    )


def test_a_resumed_capture_tells_templates_the_day_of_its_plan(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "dated")
    template = "Today is {{ strftime_now('%Y-%m-%d') }}. {{ messages[0].content }}: "
    (model / "chat_template.jinja").write_text(template)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    capture.run(capture_plan(str(model), rows, tmp_path / "out", mode="score"))
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    yesterday = "2001-02-03"
    atomic.write_json(tmp_path / "out/plan.json", seal.with_checksum(plan | {"date": yesterday}))
    again = capture_plan(str(model), rows, tmp_path / "out", mode="score")
    [shard] = again.shards
    (question,) = questions_of(again, again.open_prompts(), shard, shard.examples[0])
    assert question.prompt == "Today is 2001-02-03. a: "


@pytest.mark.parametrize("name", ["logprobs_mode", "model", "enable_prefix_caching"])
def test_options_that_would_falsify_the_cache_are_refused(tiny_model, rows_file, tmp_path, name):
    with pytest.raises(UsageError, match="cannot be passed"):
        capture_plan(tiny_model, rows_file, tmp_path / "out", engine_extra={name: "x"})


def test_only_what_differs_is_named_where_another_capture_is_in_the_folder(tiny_cache, tiny_model, rows_file):
    with pytest.raises(KDError) as refused:
        folder.check(capture_plan(tiny_model, rows_file, tiny_cache, seed=1))
    named = str(refused.value).partition("(old -> new):\n")[2].partition("\nA cache")[0]
    assert [line.strip() for line in named.splitlines()] == ["seed: 0 -> 1"]


def test_a_plan_is_data(tiny_model, rows_file, tmp_path):
    plan = capture_plan(tiny_model, rows_file, tmp_path / "out")
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_progress_says_the_shard_the_speed_and_the_time_left(tiny_model, rows_file, tmp_path):
    reports = []
    capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=8), reports.append)
    assert [report.done for report in reports] == [*range(1, 17), 16]
    assert {(report.total, report.unit) for report in reports} == {(16, "samples")}
    assert all(re.fullmatch(r"shard \d/\d  [\d,]+ tokens/s", report.note) for report in reports)
    assert all(report.seconds_left > 0 for report in reports[:15]) and reports[-1].seconds_left == 0
