"""Rewards: judged at capture, added afterwards, asked for by SQL; reasoning asked for; recipes."""

import json

import pyarrow.parquet as pq
import pytest

from helpers import capture_plan
from kdcache.cache import query
from kdcache.capture import run as capture
from kdcache.capture.requests import Question, questions_of
from kdcache.commands import recipes as recipe
from kdcache.errors import KDError, UsageError
from kdcache.judge import rewards_file as judging

PROGRAM = "Add two numbers."


@pytest.fixture(scope="module")
def judged_rows(tmp_path_factory):
    """Given answers, right and wrong, to be judged in each way; and one that nothing is known of."""
    adds = {"kind": "stdio", "language": "python", "tests": [{"input": "3 4", "output": "7"}]}
    asserts = {"kind": "asserts", "language": "python", "tests": ["assert add(3, 4) == 7"]}
    number, text = {"kind": "numeric", "answer": "7"}, {"kind": "exact"}
    rows = [
        ("good", "```python\nprint(sum(map(int, input().split())))\n```", adds),
        ("bad", "```python\nprint(input())\n```", adds),
        ("loops", "```python\nwhile True: pass\n```", adds | {"time_limit_seconds": 0.2}),
        ("asserted", "<think>easy</think><answer>\ndef add(a, b):\n    return a + b\n</answer>", asserts),
        ("number", "So it is 7.", number),
        ("wrong-number", "So it is 8.", number),
        ("text", "siete", text),
        ("unknown", "7", None),
    ]
    path = tmp_path_factory.mktemp("rows") / "judged.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for name, completion, verifier in rows:
            row = {"id": name, "prompt": f"{PROGRAM} ({name})", "completion": completion, "verifier": verifier}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


REWARDS = {"good": 1, "bad": 0, "loops": 0, "asserted": 1, "number": 1, "wrong-number": 0, "text": 1, "unknown": None}


def rewards(cache):
    _, rows = query.run(cache, "SELECT sample_id, reward FROM samples WHERE origin = 'given'")
    return {sample_id.split(":")[1]: reward for sample_id, reward in rows}


def test_answers_are_judged_at_capture(tiny_model, judged_rows, tmp_path):
    plan = capture_plan(tiny_model, judged_rows, tmp_path / "c", mode="both", rows_per_shard=6)
    capture.run(plan)
    assert rewards(tmp_path / "c") == REWARDS
    sampled = query.run(tmp_path / "c", "SELECT count(*), count(reward) FROM samples WHERE origin = 'sampled'")[1]
    assert sampled == [(8, 7)]  # of a random model: judged too
    assert query.run(tmp_path / "c", "SELECT count(*) FROM rewards")[1] == [(0,)]
    shard = next((tmp_path / "c" / "data").glob("train-*.parquet"))
    assert "reward" in pq.read_schema(shard).names


def test_rewards_are_added_renewed_and_trained_on_without_touching_a_shard(kd, tiny_model, judged_rows, tmp_path):
    cache = tmp_path / "c"
    plan = capture_plan(
        tiny_model, judged_rows, cache, mode="score", verify=False, split_ratios=(0.5, 0.25, 0.25), rows_per_shard=4
    )
    capture.run(plan)
    assert set(rewards(cache).values()) == {None}
    before = {path.name: path.read_bytes() for path in (cache / "data").iterdir()}
    done = json.loads(kd("verify-answers", cache, "--json").stdout)
    assert done["judged"] == 7 and done["right"] == 4 and done["wrong"] == 3
    assert rewards(cache) == REWARDS
    assert json.loads(kd("verify-answers", cache, "--json").stdout)["judged"] == 0
    assert judging.verify_answers(cache, renew=True, where="sample_id LIKE '%:text:%'")["judged"] == 1
    assert before == {path.name: path.read_bytes() for path in (cache / "data").iterdir()}
    reasons = dict(query.run(cache, "SELECT split_part(sample_id, ':', 2), reason FROM rewards")[1])
    assert "test 1" in reasons["bad"] and "unknown" not in reasons
    right = sum(len(query.select(cache, "sample_id", "reward = 1", split)) for split in query.splits(cache))
    assert right == 4


def test_a_cache_from_before_there_were_rewards_can_be_asked_and_judged(tiny_model, judged_rows, tmp_path):
    capture.run(capture_plan(tiny_model, judged_rows, tmp_path / "c", mode="score", verify=False))
    (tmp_path / "c" / "rewards.parquet").unlink()
    assert set(rewards(tmp_path / "c").values()) == {None}
    judging.verify_answers(tmp_path / "c")
    assert rewards(tmp_path / "c") == REWARDS


def test_without_a_sandbox_no_program_is_run_and_nothing_is_written(kd, tiny_model, judged_rows, tmp_path):
    command = (
        *("cache-teacher", "--teacher", tiny_model, "--examples", judged_rows, "--engine", "transformers"),
        *("--dtype", "float32", "--sparsify", "topk:8", "--out", tmp_path / "c"),
    )
    (tmp_path / "bin").mkdir()
    done = kd(*command, env={"PATH": str(tmp_path / "bin")}, code=1)
    assert "bubblewrap" in done.stderr and "--no-verify" in done.stderr and not (tmp_path / "c").exists()
    kd(*command, "--no-verify", env={"PATH": str(tmp_path / "bin")})
    assert set(rewards(tmp_path / "c").values()) == {None}


def test_reasoning_is_asked_for_in_the_rows_language_and_is_part_of_the_fingerprint(tiny_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"id": "a", "prompt": "Why?", "language": "en"}, {"id": "b", "prompt": "¿Por qué?", "language": "es"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    plain, reasoned = (
        capture_plan(tiny_model, path, tmp_path / "c", mode="sample", reasoning=reasoning)
        for reasoning in (False, True)
    )
    assert plain.fingerprint != reasoned.fingerprint
    opened = reasoned.open_prompts()
    questions = [
        q for shard in reasoned.shards for e in shard.examples for q in questions_of(reasoned, opened, shard, e)
    ]
    prompts = {q.row_id: q.prompt for q in questions if isinstance(q, Question)}
    assert "Think first, between <think> and </think>" in prompts["a"] and "Piensa primero" in prompts["b"]
    with pytest.raises(UsageError, match="alpaca"):
        capture_plan(tiny_model, path, tmp_path / "c", reasoning=True, prompt_format="alpaca")


def test_shuffled_a_limit_is_a_sample_that_the_seed_decides(tiny_model, rows_file, tmp_path):
    def taken(**changes):
        plan = capture_plan(tiny_model, rows_file, tmp_path / "c", limit=10, **changes)
        return sorted(example.row_id for shard in plan.shards for example in shard.examples)

    assert taken() == [f"r{i}" for i in range(10)]
    assert len(set(taken(shuffle=True))) == 10 and taken(shuffle=True) == taken(shuffle=True)
    assert taken(shuffle=True) != taken(shuffle=True, seed=1)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in recipe.names() for size in recipe.load(name).sizes or [None]]
)
def test_every_recipe_is_whole_and_each_of_its_commands_is_understood(name, size, tmp_path):
    from click.testing import CliRunner

    from cli import kd as command

    (tmp_path / "rows.jsonl").write_text("{}")
    options = ["--data-path", str(tmp_path / "rows.jsonl"), "--dry-run"] + (["--size", size] if size else [])
    done = CliRunner().invoke(command, ["run", name, *options])
    assert done.exit_code == 0, done.output + str(done.exception)
    assert (
        done.output.count("\nkd ") == len(recipe.steps(recipe.load(name), tmp_path, size=size))
        and "{" not in done.output
    )
    if name not in ("demo", "arithmetic"):
        commands = [line.split()[1] for line in done.output.splitlines() if line.startswith("kd ")]
        assert {"cache-teacher", "train", "evaluate", "compare"} <= set(commands)
        assert done.output.count("--method kd") == done.output.count("--method sft") > 1  # seeds of each


def test_the_papers_recipes_have_its_size_and_one_for_a_cpu(tmp_path):
    for name in ("dolly-en", "dolly-es", "bugnet", "codeforces", "pytorrent"):
        loaded = recipe.load(name)
        assert list(loaded.sizes) == ["paper", "cpu"]
        teachers = {"paper": "--teacher Qwen/Qwen2.5-3B-Instruct", "cpu": "--teacher embedded"}
        for size, teacher in teachers.items():
            commands = [step.command for step in recipe.steps(loaded, tmp_path, size=size)]
            assert teacher in commands[0] and commands[-1] == f"kd report {tmp_path} --out {tmp_path}/report"
        assert recipe.steps(loaded, tmp_path) == recipe.steps(loaded, tmp_path, size="paper")


def test_each_size_has_a_folder_of_its_own():
    folders = [str(recipe.default_folder(recipe.load("bugnet"), size)) for size in (None, "paper", "cpu")]
    assert folders == ["data/bugnet", "data/bugnet", "data/bugnet-cpu"]


def test_the_names_that_sizes_have_replaced_say_what_to_type():
    with pytest.raises(UsageError, match=r"type: kd run dolly-en --size cpu$"):
        recipe.load("dolly-en-cpu")
    with pytest.raises(UsageError, match=r"type: kd run arithmetic$"):
        recipe.load("arithmetic-cpu")


def test_a_size_that_a_recipe_does_not_have_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--size large: the sizes of bugnet are: paper, cpu"):
        recipe.steps(recipe.load("bugnet"), tmp_path, size="large")
    with pytest.raises(UsageError, match="--size cpu: the sizes of demo are: none"):
        recipe.steps(recipe.load("demo"), tmp_path, size="cpu")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [{name: a}]", "step 1 needs `name` and `run`"),
        ("steps: [{name: a, run: rm -rf /}]", "expected a kd command"),
        ("steps: [{name: a, run: kd sql, when: now}]", "unknown key 'when'"),
        ("steps: [{name: a, run: kd sql, only: cpu}]", "there is no size 'cpu'; the sizes are: none"),
        ("steps: [{name: a, run: kd sql, for: {seed: seeds}}]", "the values of 'seed' are 'seeds'"),
        ("sizes: {paper: {a: 1}, cpu: {b: 1}}\nsteps: [{name: a, run: kd sql}]", "do not have the same variables"),
        ("steps: [", "not YAML"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(KDError, match=says):
        recipe.load(str(tmp_path / "r.yaml"))
    with pytest.raises(KDError, match=r"there are: .*bugnet"):
        recipe.load("nothing")
