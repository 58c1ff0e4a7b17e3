"""kd evaluate, kd compare, kd init-student and kd chat through the real command."""

import csv
import json
import shutil

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers import capture_plan
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.teachers import Sampling
from trainer.data.prompts import Prompt
from trainer.data.select import open_caches
from trainer.evaluate import answers as judging
from trainer.evaluate import compare, metrics, parts, positions, setup
from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.folder import TEACHER
from trainer.evaluate.run import evaluate
from trainer.student.generate import Ask
from trainer.student.make import parse_layers


def rows_of(completed) -> dict[tuple[str, str], dict]:
    """Return what kd evaluate or kd compare printed: (label, metric) -> row."""
    return {(row["label"], row["metric"]): row for row in json.loads(completed.stdout)}


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tiny_model, tmp_path_factory) -> str:
    """The first of the teacher's two layers."""
    from trainer.student.make import init_student

    out = tmp_path_factory.mktemp("students") / "half"
    init_student(tiny_model, out, "1")
    return str(out)


def test_the_teachers_own_weights_have_no_kl_and_agree(kd, tiny_cache, tiny_model):
    rows = rows_of(
        kd("evaluate", f"same={tiny_model}", "--from-cache", tiny_cache, "--engine", "transformers", "--json")
    )
    assert rows["teacher (cache)", "agreement"]["value"] == 1 and rows["teacher (cache)", "kl"]["value"] == 0
    assert rows["same", "kl"]["value"] < 2e-3 and rows["same", "agreement"]["value"] > 0.97  # rounding; ties
    for name in ("ce", "ece"):
        assert rows["same", name]["value"] == pytest.approx(rows["teacher (cache)", name]["value"], abs=2e-2)
    assert rows["same", "rougeL"]["answers"] == rows["teacher (cache)", "rougeL"]["answers"] > 0


@pytest.fixture(scope="module")
def near(tiny_model, tmp_path_factory) -> str:
    """The teacher with a little noise on its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for parameter in model.model.layers.parameters():
        parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    out = tmp_path_factory.mktemp("students") / "near"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return str(out)


def test_a_threshold_caches_kl_is_that_of_the_cells_captured_for_every_student(
    tiny_model, near, half, rows_file, tmp_path
):
    kl_of = {}
    for spec, k in (("topk:64", None), ("threshold:0.02", 64)):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / spec, sparsify=spec, capture_k=k, mode="score"))
        models = (("same", tiny_model), ("near", near), ("half", half))
        config = EvaluateConfig(models, (tmp_path / spec,), tmp_path / f"e-{spec}", split="train", generate=0)
        rows = compare.rows([evaluate(config)])
        kl_of[spec] = {row.label: row.value.value for row in rows if row.metric == "kl"}
    cells, sampled = kl_of["topk:64"], kl_of["threshold:0.02"]
    assert sampled["same"] == pytest.approx(0, abs=0.01)
    # The capture holds less of a random model's mass than of a real one's, so that the bound is less tight here.
    for student in ("near", "half"):
        assert 0.97 * cells[student] < sampled[student] < 1.2 * cells[student]


def test_models_are_measured_once_and_compared_with_intervals(kd, tiny_cache, tiny_model, half, tmp_path):
    command = ("evaluate", f"whole={tiny_model}", f"half={half}", f"half={tiny_model}", "--from-cache", tiny_cache)
    options = ("--engine", "transformers", "--generate", 2, "--out", tmp_path / "e")
    first = kd(*command, *options)
    assert "samples  half" in first.stderr and first.stdout.split()[:3] == ["model", "temperature", "kl"]
    again = kd(*command, *options)
    assert again.stdout == first.stdout and "samples  half" not in again.stderr
    assert rows_of(kd(*command, *options, "--json"))["half", "kl"]["runs"] == 2

    rows = rows_of(kd("compare", tmp_path / "e", "--against", "whole", "--json"))
    row = rows["half", "kl"]
    assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert row["difference"] == pytest.approx(row["value"] - rows["whole", "kl"]["value"])
    assert "retention" not in row and rows["whole", "rougeL"]["answers"] == 2
    assert json.loads((tmp_path / "e" / "comparison.json").read_text()) == list(rows.values())
    lines = list(csv.DictReader((tmp_path / "e" / "comparison.csv").read_text().splitlines()))
    assert len(lines) == len(rows) and {"value", "low", "high", "difference_low"} <= set(lines[0])
    table = kd("compare", tmp_path / "e", "--metric", "kl").stdout.splitlines()
    assert table[0].split()[:3] == ["metric", "temperature", "model"] and len(table) == 2 + 3
    assert "| metric | temperature |" in kd("compare", tmp_path / "e", "--markdown").stdout
    assert "no such label" in kd("compare", tmp_path / "e", "--against", "nobody", code=2).stderr
    assert "not measured" in kd("compare", tmp_path / "e", "--metric", "bleu", code=2).stderr
    assert "no evaluation" in kd("compare", tmp_path, code=1).stderr

    tables = [pq.read_table(path).to_pylist() for path in (tmp_path / "e").glob("*/forced.parquet")]
    assert len(tables) == 4
    for row in (row for table in tables for row in table):  # the buckets of the teacher's entropy hold every position
        for name in ("tokens", "kl", "agreement"):
            assert sum(row[f"{name}_by_entropy"]) == pytest.approx(row[name], abs=1e-9)


def test_temperatures_and_seeds_are_answered_apart(kd, tiny_cache, tiny_model, tmp_path):
    kd(
        *("evaluate", tiny_model, "--from-cache", tiny_cache, "--engine", "transformers", "--generate", 2),
        *("--temperature", 0, "--temperature", 1, "--seeds", 3, "--max-new-tokens", 6, "--out", tmp_path / "e"),
    )
    entry = json.loads((tmp_path / "e" / "evaluation.json").read_text())["entries"][1]
    answers = pq.read_table(tmp_path / "e" / entry["folder"] / "answers.parquet").to_pylist()
    counted = {t: sum(a["temperature"] == t for a in answers) for t in (0, 1)}
    assert counted == {0: 2, 1: 6}
    for prompt in {a["prompt_id"] for a in answers}:
        assert len({a["answer"] for a in answers if a["prompt_id"] == prompt and a["temperature"] == 1}) > 1


def test_retention_on_other_prompts_than_the_teachers_is_refused(kd, tiny_cache, tiny_model, tmp_path):
    kd("evaluate", f"m={tiny_model}", "--from-cache", tiny_cache, "--engine", "transformers", "--out", tmp_path / "e")
    assert compare.rows([tmp_path / "e"])
    entry = json.loads((tmp_path / "e" / "evaluation.json").read_text())["entries"][1]
    for name, what in (("answers", "prompts"), ("forced", "samples")):
        file = tmp_path / "e" / entry["folder"] / f"{name}.parquet"
        whole = pq.read_table(file)
        pq.write_table(whole.slice(1), file)
        with pytest.raises(KDError, match=f"m was not measured on the {what} that the teacher was: 1 are missing"):
            compare.rows([tmp_path / "e"])
        pq.write_table(whole, file)
    assert compare.rows([tmp_path / "e"])


def test_retention_is_the_ratio_to_the_teacher_at_the_same_temperature(tmp_path):
    def entry(label, rouge, temperature, rewards):
        folder = tmp_path / label
        folder.mkdir()
        answers = [
            {
                "prompt_id": f"p{i}",
                "group_id": f"g{i}",
                "temperature": temperature,
                "seed": s,
                "answer": "",
                "rougeL": r,
            }
            | {"rougeL_paper": r, "rougeL_teacher": None, "exact": 0.0, "reward": reward, "reason": ""}
            for i, (r, judged) in enumerate(zip(rouge, rewards))
            for s, reward in enumerate(judged)
        ]
        from trainer.evaluate.answers import ANSWERS
        from trainer.evaluate.positions import FORCED

        pq.write_table(pa.Table.from_pylist(answers, ANSWERS), folder / "answers.parquet")
        pq.write_table(FORCED.empty_table(), folder / "forced.parquet")
        return {"label": label, "model": label, "folder": label}

    entries = [
        entry(TEACHER, [0.4, 0.8], 1.0, [[1, 1], [1, 0]]),
        entry("student", [0.3, 0.3], 1.0, [[1, 0], [0, 0]]),
        entry("greedy", [0.3, 0.3], 0.0, [[1], [0]]),
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"settings": {}, "entries": entries}))
    rows = {(row.label, row.metric): row for row in compare.rows([tmp_path])}
    assert rows["student", "rougeL"].retention.value == pytest.approx(0.3 / 0.6)
    assert rows["student", "pass@1"].value.value == 0.25 and rows["student", "pass@2"].value.value == 0.5
    assert rows["student", "pass@1"].retention.value == pytest.approx(0.25 / 0.75)
    assert rows["greedy", "rougeL"].retention is None  # the teacher has no answers at this temperature


# --- students ---------------------------------------------------------------------------------------------------------


def test_a_student_from_the_teachers_layers_computes_with_those_layers(kd, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    facts = json.loads(
        kd("init-student", "--from", tiny_model, "--keep-layers", "1", "--out", tmp_path / "s", "--json").stdout
    )
    assert facts["kept"] == "0" and facts["layers"] == "1 of 2"
    whole, cut = AutoModelForCausalLM.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    whole.model.layers = whole.model.layers[:1]
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    assert "not empty" in kd("init-student", "--from", tiny_model, "--out", tmp_path / "s", code=1).stderr


def test_parse_layers():
    assert parse_layers("3", 30) == [0, 14, 29] and parse_layers("30", 30) == list(range(30))
    assert parse_layers("0-2,5,7-8", 9) == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("spec", ["0", "31", "3-40", "a", "5-2"])
def test_wrong_layers_are_a_usage_error(kd, smollm, tmp_path, spec):
    if spec != "a":  # one through the command is enough
        from kdcache.errors import UsageError

        with pytest.raises(UsageError):
            parse_layers(spec, 30)
    else:
        assert (
            "--keep-layers a"
            in kd("init-student", "--from", smollm, "--keep-layers", "a", "--out", tmp_path / "s", code=2).stderr
        )


def test_chat_answers_a_line(kd, tiny_model):
    completed = kd("chat", tiny_model, "--max-new-tokens", 5, input="Hello\n")
    assert completed.stdout.endswith("\n")


# --- several references of one prompt -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def referenced(tiny_model, tmp_path_factory):
    """Three prompts of 14 rows each, whose references are all wrong but for one, the model's own greedy answer."""
    folder = tmp_path_factory.mktemp("rougeL_count")
    greedy = {"mode": "sample", "sampling": Sampling(temperature=0.0, max_tokens=8), "split_ratios": (1.0, 0.0, 0.0)}

    def cached(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plan = capture_plan(tiny_model, folder / f"{name}.jsonl", folder / name, rows_per_shard=4, **greedy)
        capture.run(plan)
        return folder / name

    prompts = [{"id": f"p{n}", "prompt": f"Say something about {n}."} for n in range(3)]
    answers = {
        row["sample_id"].split(":")[1]: row["completion"]
        for path in (cached("asked", prompts) / "data").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    rows = [
        row
        | {
            "id": f"{row['id']}-{n}",
            "reference": answers[row["id"]] if n == 6 else f"another {n}",
            "verifier": {"kind": "exact"},
        }
        for row in prompts
        for n in range(14)
    ]
    return cached("rougeL_count", rows)


def test_the_same_evaluation_gives_the_same_table_however_many_threads_ask(
    referenced, tiny_model, tmp_path, monkeypatch
):
    connect = duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda: connect(config={"threads": 8}))
    tables = []
    for number in range(5):
        config = EvaluateConfig(
            (("same", tiny_model),), (referenced,), tmp_path / str(number), split="train", engine="transformers"
        )
        tables.append(compare.rows([evaluate(config)]))
    assert tables == [tables[0]] * 5


def test_the_best_of_several_references_counts(referenced, tiny_model):
    prompts = setup.prompts_of(EvaluateConfig((), (referenced,), referenced, split="train"))
    asks = [Ask(prompt.prompt_id, prompt.ids, 0.0, 0) for prompt in prompts]
    answers = judging.judged(prompts, asks, [prompt.answers[0] for prompt in prompts], None)
    assert {(row["rougeL"], row["exact"], row["reward"]) for row in answers.to_pylist()} == {(1, 1, 1)}


def test_one_cache_named_twice_is_refused(tiny_cache, tmp_path):
    again = shutil.copytree(tiny_cache, tmp_path / "again")
    with pytest.raises(KDError, match="its samples would count twice"):
        open_caches([tiny_cache, again])


# --- programs ---------------------------------------------------------------------------------------------------------


def test_pass_at_k_of_known_programs_is_known_and_a_bad_program_costs_a_bounded_time():
    import time

    from kdcache.judge.sandbox import Sandbox

    adds = {
        "kind": "stdio",
        "language": "python",
        "tests": [{"input": "1 2", "output": "3"}, {"input": "5 5", "output": "10"}],
    }
    prompts = [
        Prompt(name, name, "", [], ((json.dumps(adds | {"time_limit_seconds": 0.3}), None),), ["x"])
        for name in ("easy", "hard")
    ]
    good, wrong = "print(sum(map(int, input().split())))", "print(3)"
    loops, forks, floods = "while True: pass", "import os\nwhile True: os.fork()", "while True: print('x' * 1000)"
    eats, leaves = "x = []\nwhile True: x.append(bytearray(1 << 20))", "import sys; sys.exit(0)"
    programs = {"easy": [good, good, wrong, good], "hard": [wrong, loops, forks, floods]}
    more = [("hard", eats), ("hard", leaves)]
    programs_of = [(name, program) for name, some in programs.items() for program in some] + more
    asks = [Ask(name, [], 1.0, number) for number, (name, _) in enumerate(programs_of)]
    started = time.monotonic()
    table = judging.judged(prompts, asks, [f"```python\n{p}\n```" for _, p in programs_of], Sandbox())
    assert time.monotonic() - started < 60
    assert [row["reward"] for row in table.to_pylist()] == [1, 1, 0, 1] + 6 * [0]
    sums = parts.sums_of(positions.FORCED.empty_table(), table, {"easy": 0, "hard": 1})
    values = metrics.values({name: value.sum(axis=0) for name, value in sums.items()})
    assert values["pass@1"] == pytest.approx((3 / 4 + 0) / 2) and values["pass@4"] == pytest.approx((1 + 0) / 2)
