"""`kd grpo`: rewards, guards and guided answers, with the real TRL underneath, mostly through the real command."""

import json
import os

import pytest

from helpers import ROOT, capture_plan, history
from kdcache.cache import query
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.prompts.thoughts import whole_turn
from kdcache.storage import folders, lock
from trainer.grpo import guards, rewards
from trainer.grpo import plan as grpo
from trainer.grpo.config import GrpoConfig
from trainer.grpo.train import train
from trainer.run import checkpoints

ADD = json.dumps({"kind": "asserts", "language": "python", "tests": ["assert add(1, 2) == 3"]})
NUMBER = json.dumps({"kind": "numeric", "answer": "7"})


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_format_never_outweighs_being_right_and_what_is_cut_off_gets_nothing():
    right, wrong = verifiers.Verdict(1.0, ""), verifiers.Verdict(0.0, "")
    worst_right, best_wrong = rewards.compose(right, False, True), rewards.compose(wrong, True, True)
    assert worst_right.reward > best_wrong.reward + 0.5
    for verdict in (right, wrong, verifiers.Verdict(None, "")):
        assert rewards.compose(verdict, True, finished=False).reward == 0
    assert rewards.compose(verifiers.Verdict(None, "no verifier"), False, True).reward == 0


def test_answers_are_judged_by_running_them_and_each_part_is_reported():
    good = "<think>sum</think><answer>def add(a, b): return a + b</answer>"
    texts = [
        good,
        good.replace("+", "-"),
        "def add(a, b): return a + b",
        "<think></think><answer></answer>",
        "",
        "it is 7",
    ]
    judging = [([(ADD, None)], True)] * 5 + [([(NUMBER, None)], False)]
    judged = rewards.judge(texts, judging, [True] * 6, Sandbox())
    assert [(j.correctness, j.form) for j in judged] == [(1, 1), (0, 1), (1, 0), (0, 0), (0, 0), (1, 1)]
    assert [j.reward for j in judged] == pytest.approx([1.1, 0.1, 1.0, 0, 0, 1.1])


@pytest.mark.parametrize(
    "completion, correctness, form",
    [("sum</think><answer>7</answer>", 1, 1), ("I try 7", 0, 0), ("sum</think>7", 1, 0)],
)
def test_an_answer_that_begins_in_the_thought_its_prompt_opens_is_judged_with_it(completion, correctness, form):
    turn = whole_turn("<|Assistant|><think>\n", completion)
    [judged] = rewards.judge([turn], [([(NUMBER, None)], True)], [True], None)
    assert (judged.correctness, judged.form) == (correctness, form)


def test_the_best_of_a_prompts_references_counts():
    exact = '{"kind": "exact"}'
    judges = [(exact, "the Nile"), (exact, "the Amazon"), ("not JSON", None)]
    answers = rewards.judge(["the Amazon", "the Rhine"], [(judges, False)] * 2, [True] * 2, None)
    assert [judged.correctness for judged in answers] == [1, 0]


def test_a_prompt_of_several_rows_is_learned_from_once_with_all_its_judges(tiny_model, tmp_path):
    rows = [{"id": str(i), "prompt": "Name a river.", "reference": r} for i, r in enumerate(["Nile", "Rhine", "Nile"])]
    text = "".join(json.dumps(row | {"completion": "x", "verifier": {"kind": "exact"}}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    everything = {"split_ratios": (1.0, 0.0, 0.0), "near_duplicates": "keep", "mode": "score"}
    capture.run(capture_plan(tiny_model, tmp_path / "rows.jsonl", tmp_path / "cache", **everything))
    config = GrpoConfig((tmp_path / "cache",), tiny_model, tmp_path / "run")
    [prompt] = grpo.prepare(config).prompts
    assert [reference for _, reference in prompt.judges] == ["Nile", "Rhine"]


# --- guards -----------------------------------------------------------------------------------------------------------


def steps(count, **changes):
    healthy = {"correctness": 0.3, "form": 0.5, "length_tokens": 80.0, "entropy_nats": 1.0, "varied": 0.7}
    return [guards.StepMeans(**(healthy | changes)) for _ in range(count)]


def caught(some, window=10):
    watching = guards.Guards(window)
    for number, step in enumerate(some, 1):
        try:
            watching.check(step)
        except guards.Collapsed as collapsed:
            return number, str(collapsed)
    return None


def test_a_policy_that_emits_the_empty_template_forever_is_caught_within_the_window():
    template = "<think></think><answer></answer>"
    [judged] = rewards.judge([template], [([(NUMBER, None)], True)], [True], None)
    assert judged.reward == 0
    number, why = caught(steps(40, correctness=judged.correctness, form=judged.form, length_tokens=17, varied=0.0))
    assert number == 10 and "no answer was right over 10 steps" in why and "--no-guards" in why


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({"correctness": 0.0, "form": 0.9, "varied": 0.3}, "format is rewarded"),
        ({"length_tokens": 17.0, "correctness": 0.2}, "answers shrank from 80 to 17"),
        ({"entropy_nats": 0.01}, "entropy fell"),
        ({"varied": 0.0}, "rewarded alike"),
    ],
)
def test_a_collapse_that_no_run_recovers_from_is_caught_with_its_reason(then, says):
    assert caught(steps(10)) is None
    number, why = caught(steps(10) + steps(15, **then))
    assert 10 < number <= 21 and says in why


def test_a_run_that_learns_is_left_alone():
    learning = [
        s for i in range(40) for s in steps(1, correctness=i / 40, length_tokens=80 - i * 1.6, entropy_nats=1 - i / 41)
    ]
    assert caught(learning) is None and caught(steps(60)) is None
    assert caught(steps(10, correctness=1.0, varied=0.0)) is None  # solved


# --- through the command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(tiny_model, tmp_path_factory):
    """Make a cache whose verifiers accept a random model's answer now and then: one digit is enough."""
    folder = tmp_path_factory.mktemp("sums")
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(12):
            verifier = {"kind": "numeric", "answer": str(i)}
            row = {"id": f"r{i}", "prompt": f"Say {i}.", "completion": f"Here it is: {i}", "verifier": verifier}
            file.write(json.dumps(row) + "\n")
    capture.run(capture_plan(tiny_model, folder / "rows.jsonl", folder / "c", split_ratios=(0.8, 0.1, 0.1)))
    return folder / "c"


def test_the_view_prompts_says_how_often_the_teacher_was_right(sums):
    names, rows = query.run(sums, "SELECT * FROM prompts WHERE split = 'train'")
    first = dict(zip(names, rows[0]))
    assert first["samples"] == first["judged"] == 1 and first["success"] in (0.0, 1.0)
    given = [ids for (ids,) in query.run(sums, "SELECT completion_ids FROM samples WHERE origin = 'given'")[1]]
    assert all(any(trace in given for trace in dict(zip(names, row))["traces"]) for row in rows)


SMALL = ("--num-generations", 2, "--per-device-train-batch-size", 4, "--max-completion-length", 8, "--save-steps", 2)


def test_grpo_trains_from_the_cache_alone_and_resumes_after_an_interruption(kd, sums, tiny_model, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "vllm.py").write_text("raise ImportError('the teacher is not to be loaded')")
    (tmp_path / "blocked" / "sitecustomize.py").write_text("import sys\nsys.modules['kdcache.teachers'] = None\n")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "blocked"), str(ROOT)])}
    command = (
        "grpo",
        "--from-cache",
        sums,
        "--student",
        tiny_model,
        "--where",
        "success >= 0",
        "--guide",
        "prefix",
        *SMALL,
    )

    dry = json.loads(kd(*command, "--output-dir", tmp_path / "r", "--dry-run", "--json").stdout)
    assert dry["prompts"] == dry["prompts_with_a_trace"] > 4 and not (tmp_path / "r").exists()
    done = kd(*command, "--output-dir", tmp_path / "r", "--max-steps", 4, "--no-guards", env=environment)
    assert "step 4/4" in done.stderr and "right" in done.stderr
    assert json.loads((tmp_path / "r" / "kdcache.json").read_text())["finished"]
    assert json.loads((tmp_path / "r" / "config.json").read_text())["use_cache"], "as the student had it"
    assert (tmp_path / "r" / "checkpoint-4" / checkpoints.FILES_FILE).is_file()
    assert checkpoints.problem(tmp_path / "r" / "checkpoint-4") is None

    for leftover in ("model.safetensors", "config.json"):
        (tmp_path / "r" / leftover).unlink()
    record = json.loads((tmp_path / "r" / "kdcache.json").read_text())
    record |= {"finished": False, "config": record["config"] | {"teacher_weight": 0.0}}  # as earlier versions wrote it
    (tmp_path / "r" / "kdcache.json").write_text(json.dumps(record))
    before = history(tmp_path / "r" / "checkpoint-4", "success")
    again = kd(*command, "--output-dir", tmp_path / "r", "--max-steps", 4, "--no-guards", "--json")
    assert json.loads(again.stdout)["success"] == pytest.approx(
        before[-1][0], abs=1e-9
    )  # it resumes with its running mean
    assert "continues at checkpoint-4" in again.stderr and (tmp_path / "r" / "model.safetensors").is_file()
    assert "finished run" in kd(*command, "--output-dir", tmp_path / "r", "--max-steps", 4, code=1).stderr


def test_an_adapter_learns_and_leaves_a_whole_student(kd, sums, tiny_model, tmp_path):
    kd(
        *("grpo", "--from-cache", sums, "--student", tiny_model, "--output-dir", tmp_path / "r", "--where", "true"),
        *(*SMALL, "--max-steps", 2, "--no-guards", "--lora-r", 4, "--beta", 0.1),
    )
    assert len(history(tmp_path / "r", "rewards/correctness/mean", "kl")) == 2
    assert (tmp_path / "r" / "model.safetensors").is_file() and (tmp_path / "r" / "adapter").is_dir()
    assert folders.foreign(tmp_path / "r", folders.RUN) is None, "--overwrite must know all that a run leaves"


def test_prompts_arrive_as_the_caches_ids_and_prefixes_are_not_trained_on(sums, tiny_model, tmp_path, monkeypatch):
    from trainer.grpo import trainer as policy

    config = GrpoConfig(
        (sums,),
        tiny_model,
        tmp_path / "r",
        where="success >= 0",
        guide="prefix",
        guards=False,
        arguments={"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8, "max_steps": 2},
    )
    seen = []
    inner = policy.FromCache._generate

    def watched(self, prompts):
        generated = inner(self, prompts)
        seen.append((prompts, self._guided, generated))
        return generated

    monkeypatch.setattr(policy.FromCache, "_generate", watched)
    run = grpo.prepare(config)
    train(run, lambda *_: None)
    by_text = {prompt.text: prompt for prompt in run.prompts}
    assert len(seen) == 2
    for prompts, guided, (prompt_ids, completion_ids, mask, *_rest) in seen:
        assert [list(ids) for ids in prompt_ids] == [by_text[text].ids for text in prompts]
        assert any(guided) and not all(guided)  # half of each group
        for prefix, ids, line in zip(guided, completion_ids, mask):
            assert list(ids[: len(prefix)]) == prefix and list(line) == [0] * len(prefix) + [1] * (
                len(ids) - len(prefix)
            )


def test_wrong_use_is_a_clear_sentence(kd, sums, tiny_model, tiny_cache, tmp_path):
    def refusal(cache=sums, **changes):
        with pytest.raises(KDError) as refused:
            grpo.prepare(GrpoConfig((cache,), tiny_model, tmp_path / "r", **changes))
        return str(refused.value)

    config = GrpoConfig((sums,), tiny_model, tmp_path / "locked", where="true")
    with lock.held(tmp_path / "locked"), pytest.raises(KDError, match="locked is being written by process"):
        train(grpo.prepare(config), print)
    assert "no training row of this cache says how an answer is judged" in refusal(tiny_cache)
    assert "have a verifier, and none fulfils success > 2" in refusal(where="success > 2")
    assert "use-vllm" in refusal(guide="prefix", arguments={"use_vllm": True})
    assert "--where 'succes > 0'" in refusal(where="succes > 0")
    assert "expected prefix" in refusal(guide="suffix")
    base = ("grpo", "--student", tiny_model, "--output-dir", tmp_path / "r", "--from-cache", sums)
    assert "did you mean --num-generations" in kd(*base, "--num-generation", 2, code=2).stderr
    assert "brought no measurable gain and was removed" in kd(*base, "--teacher-weight", 0.3, code=2).stderr
