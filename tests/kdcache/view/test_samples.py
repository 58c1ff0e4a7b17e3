"""What `kd view` shows of a cache and a student. tests/browser tests the page itself."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from helpers import capture_plan
from kdcache.cache import query, writer
from kdcache.cache.layout import REWARDS_FILE
from kdcache.capture import run as capture
from kdcache.view import catalog, texts
from kdcache.view.samples import View


@pytest.fixture(scope="module")
def threshold_cache(tiny_model, rows_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "threshold"
    capture.run(capture_plan(tiny_model, rows_file, out, sparsify="threshold:0.05", capture_k=32))
    return out


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory) -> str:
    """The first of the teacher's two layers."""
    from trainer.student.make import init_student

    out = tmp_path_factory.mktemp("students") / "half"
    init_student(tiny_model, out, "1")
    return str(out)


def listed_ids(viewed, **filters):
    """Return the ids of all pages, after waiting until the measures they are sorted by are complete."""
    ids, total = [], 1
    while len(ids) < total:
        page = viewed.page(offset=len(ids), **filters)
        if "measuring" not in page:
            ids, total = ids + [row["id"] for row in page["rows"]], page["total"]
            if not page["rows"]:
                break
    return ids


def ids_from_sql(cache, order, where="true"):
    _, rows = query.run(cache, f"SELECT sample_id FROM samples WHERE {where} ORDER BY {order}")
    return [sample_id for (sample_id,) in rows]


IN_ORDER = "list_position(['train', 'validation', 'test'], split), file, file_row_number"


# --- lists ------------------------------------------------------------------------------------------------------------


def test_every_sample_is_listed_once_train_first(viewed, tiny_cache):
    assert listed_ids(viewed) == ids_from_sql(tiny_cache, IN_ORDER)


@pytest.mark.parametrize(
    "sort, order",
    [
        ("uncertain", "list_avg(entropies) DESC"),
        ("worst", "list_avg(token_logprobs)"),
        ("longest", "completion_tokens DESC"),
        ("failed", "reward NULLS LAST"),
    ],
)
def test_a_sorted_list_equals_that_of_sql(viewed, tiny_cache, sort, order):
    assert listed_ids(viewed, sort=sort) == ids_from_sql(tiny_cache, f"{order}, {IN_ORDER}")
    assert listed_ids(viewed, sort=sort, split="test", search="RowS:") == ids_from_sql(
        tiny_cache, f"{order}, {IN_ORDER}", "split = 'test'"
    )


@pytest.mark.parametrize("text", ["number 1", "🙂 ¡AÑO", ":s0", "100%", "_", "'", "\\", "no text holds this"])
def test_search_takes_text_literally(viewed, tiny_cache, text):
    where = " OR ".join(
        f"position(lower('{text.replace(chr(39), chr(39) * 2)}') IN lower({column})) > 0"
        for column in ("sample_id", "prompt", "completion")
    )
    assert listed_ids(viewed, search=text) == ids_from_sql(tiny_cache, IN_ORDER, where)


def test_rewards_of_kd_verify_answers_are_shown(tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    table = pa.table(
        {"sample_id": ["rows:r5:s0", "rows:r3:g"], "reward": pa.array([1.0, 0.0], pa.float32()), "reason": ["", ""]}
    )
    writer.write_table(copy / REWARDS_FILE, table)
    with contextlib.closing(View(copy)) as viewed:
        assert viewed.about()["rewarded"]
        first, second = viewed.page(sort="failed")["rows"][:2]
    assert (first["id"], first["reward"], second["id"], second["reward"]) == ("rows:r3:g", 0, "rows:r5:s0", 1)


def test_prompts_are_listed_without_the_template(viewed):
    row = viewed.page(search="rows:r7:g")["rows"][0]
    assert row["prompt"] == "Say the number 7 twice."
    before, content, after = viewed.sample("rows:r7:g")["prompt"]
    assert before.endswith("<|im_start|>user\n") and after.startswith("<|im_end|>") and content == row["prompt"]


def test_a_template_ends_at_a_line_or_a_tag():
    assert texts.common_frame(["<u>\nWhat is 1?</u>", "<u>\nWhat is 2?</u>"]) == ("<u>\n", "</u>")
    assert texts.common_frame(["one", "onto"]) == ("", "")
    assert texts.common_frame(["<a>", "<a>"]) == ("", "")
    assert texts.common_frame([]) == ("", "")


# --- a sample ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_cache", "threshold_cache"])
def test_a_sample_equals_the_rows_of_sql(request, name):
    cache = request.getfixturevalue(name)
    with contextlib.closing(View(cache)) as viewed:
        for sample_id in ("rows:r7:g", "rows:r20:s0"):
            shown, positions = viewed.sample(sample_id), viewed.candidates(sample_id, 0, 256)
            _, rows = query.run(
                cache, f"SELECT logprob, rank, entropy, tail_mass, candidates FROM sample('{sample_id}')"
            )
            logprobs, ranks, entropies, tails, candidates = map(list, zip(*rows))
            assert shown["logprobs"] == pytest.approx(logprobs, rel=1e-3) and shown["ranks"] == ranks
            assert shown["entropies"] == pytest.approx(entropies, rel=1e-3)
            assert [p["tail"] for p in positions] == pytest.approx(tails, rel=1e-3)
            assert [p["texts"] for p in positions] == [[c["text"] for c in row] for row in candidates]
            for position in positions:
                assert sum(position["probabilities"]) + position["tail"] == pytest.approx(1, abs=1e-3)
            assert viewed.candidates(sample_id, 2, 4) == positions[2:4]


def test_drawn_candidates_are_those_stored_at_tau(threshold_cache, viewed):
    with contextlib.closing(View(threshold_cache)) as thresholded:
        positions = thresholded.candidates("rows:r7:g", 0, 256)
    pairs = [pair for position in positions for pair in zip(position["probabilities"], position["drawn"])]
    drawn = [p for p, is_drawn in pairs if is_drawn]
    kept = [p for p, is_drawn in pairs if not is_drawn]
    assert drawn and max(drawn) < 0.06 and min(kept) > 0.04  # about 0.05: they are scaled to sum to 1 - tail
    assert not any(position["drawn"][0] for position in positions)
    assert not any(any(position["drawn"]) for position in viewed.candidates("rows:r7:g", 0, 256))


def test_parts_of_a_character_are_one_group():
    smile = "🙂".encode()
    pieces, escaped = texts.pieces([b"a", smile[:2], smile[2:3], smile[3:] + b"b", b" c", b"\xff", b"d", smile[:1]])
    assert pieces == ["a", "🙂b", "", "", " c", "\ufffd", "d", "\ufffd"]
    assert escaped == {1: "\\xF0\\x9F", 2: "\\x99", 3: "\\x82b"}


def test_a_view_keeps_few_samples_in_memory(viewed):
    for sample_id in listed_ids(viewed)[:10]:
        viewed.sample(sample_id)
    assert len(viewed._loaded) == catalog.KEPT
    arrays = [loaded.sample.candidates.ids for loaded in viewed._loaded.values()]
    assert all(array.base is None for array in arrays)  # an array with a base would keep its row group in memory


# --- a student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_cache", "threshold_cache"])
def test_a_students_kl_equals_that_of_kd_evaluate(request, name, kd, half, tmp_path):
    from trainer.evaluate.forced import Student

    cache = request.getfixturevalue(name)
    process = kd("evaluate", half, "--from-cache", cache, "--generate", 0, "--out", tmp_path / "e", "--json")
    [evaluated] = [row["value"] for row in json.loads(process.stdout) if (row["label"], row["metric"]) == (half, "kl")]
    with contextlib.closing(View(cache)) as viewed:
        student = Student(half, viewed.cache)
        kls = []
        for sample_id in listed_ids(viewed, split="test"):
            sample = viewed.load(sample_id).sample
            reading = student(sample)
            kls.append(reading.kl[sample.supervised])
            ends = np.cumsum(sample.candidates.counts)
            sums = np.add.reduceat(reading.probabilities, ends - sample.candidates.counts)
            assert sums + reading.tails == pytest.approx(1, abs=1e-4)
    assert np.concatenate(kls).mean() == pytest.approx(evaluated, rel=1e-4)


def test_a_student_with_the_teachers_weights_agrees_with_the_teacher(viewed, tiny_model):
    from trainer.evaluate.forced import Student

    sample = viewed.load("rows:r7:g").sample
    reading = Student(tiny_model, viewed.cache)(sample)
    assert reading.kl == pytest.approx(0, abs=2e-3)
    assert reading.logprobs == pytest.approx(sample.token_logprobs, abs=2e-2)
    assert (reading.ranks == sample.token_ranks).mean() > 0.8  # ties
    assert reading.probabilities == pytest.approx(np.exp(sample.candidates.logprobs), abs=1e-2)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        (["nowhere"], 1, "no such folder"),
        (["."], 1, "not a cache"),
        (["{cache}", "--sample", "rows:r7"], 2, "there is rows:r7:g"),
        (["{cache}", "--student", "./nowhere"], 2, "no such folder"),
        (["{cache}", "--port", "99999"], 2, "--port"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_use_is_one_clear_sentence(kd, tiny_cache, arguments, code, sentence):
    arguments = [argument.format(cache=tiny_cache) for argument in arguments]
    assert sentence in kd("view", *arguments, "--no-browser", code=code).stderr


def test_a_damaged_shard_ends_the_command_with_a_sentence(kd, tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    shard = sorted((copy / "data").glob("*.parquet"))[-1]  # the first is read before the server listens
    shard.write_bytes(shard.read_bytes()[:-200])
    assert "kd cache verify" in kd("view", copy, "--no-browser", "--port", 0, code=3).stderr
