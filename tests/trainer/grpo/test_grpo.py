"""kd grpo: rewards, guards, guided answers, and the real TRL underneath, through the real command."""

import json
import os

import numpy as np
import pytest

from helpers import ROOT, capture_plan, history
from kdcache.cache import query
from kdcache.cache.candidates import Candidates
from kdcache.cache.reader import Sample
from kdcache.capture import run as capture
from kdcache.errors import KDError
from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.prompts.thoughts import whole_turn
from kdcache.storage import folders, lock
from trainer.grpo import rewards
from trainer.grpo import train as grpo
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


def test_answers_are_judged_by_running_them_and_each_part_is_told():
    good = "<think>sum</think><answer>def add(a, b): return a + b</answer>"
    texts = [
        good,
        good.replace("+", "-"),
        "def add(a, b): return a + b",
        "<think></think><answer></answer>",
        "",
        "it is 7",
    ]
    asked = [([(ADD, None)], True)] * 5 + [([(NUMBER, None)], False)]
    found = rewards.judge(texts, asked, [True] * 6, Sandbox())
    assert [(j.correctness, j.format) for j in found] == [(1, 1), (0, 1), (1, 0), (0, 0), (0, 0), (1, 1)]
    assert [j.reward for j in found] == pytest.approx([1.1, 0.1, 1.0, 0, 0, 1.1])


@pytest.mark.parametrize(
    "completion, correctness, form",
    [("sum</think><answer>7</answer>", 1, 1), ("I try 7", 0, 0), ("sum</think>7", 1, 0)],
)
def test_an_answer_that_begins_in_the_thought_its_prompt_opens_is_judged_with_it(completion, correctness, form):
    turn = whole_turn("<|Assistant|><think>\n", completion)
    [judged] = rewards.judge([turn], [([(NUMBER, None)], True)], [True], None)
    assert (judged.correctness, judged.format) == (correctness, form)


def test_the_best_of_a_prompts_references_counts():
    exact = '{"kind": "exact"}'
    judges = [(exact, "the Nile"), (exact, "the Amazon"), ("not JSON", None)]
    found = rewards.judge(["the Amazon", "the Rhine"], [(judges, False)] * 2, [True] * 2, None)
    assert [judged.correctness for judged in found] == [1, 0]


def test_a_prompt_of_several_rows_is_learned_from_once_with_all_its_judges(tiny_model, tmp_path):
    rows = [{"id": str(i), "prompt": "Name a river.", "reference": r} for i, r in enumerate(["Nile", "Rhine", "Nile"])]
    text = "".join(json.dumps(row | {"completion": "x", "verifier": {"kind": "exact"}}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    everything = {"split_ratios": (1.0, 0.0, 0.0), "near_duplicates": "keep", "mode": "score"}
    capture.run(capture_plan(tiny_model, tmp_path / "rows.jsonl", tmp_path / "cache", **everything))
    config = grpo.GrpoConfig((tmp_path / "cache",), tiny_model, tmp_path / "run")
    [prompt] = grpo.prepare(config).prompts
    assert [reference for _, reference in prompt.judges] == ["Nile", "Rhine"]


def test_the_teachers_word_counts_as_far_as_an_answer_in_the_cache_begins_alike():
    def sample(ids, *candidates):
        return Sample(
            *("s", np.array([1]), np.array(ids), np.ones(len(ids), bool)),
            Candidates(
                ids=np.array([i for c in candidates for i in c]),
                logprobs=np.log([p for c in candidates for p in c.values()]),
                counts=np.array([len(c) for c in candidates]),
                tails=np.full(len(ids), -np.inf),
            ),
        )

    cached = [
        sample([5, 6, 2], {5: 0.6, 7: 0.4}, {6: 0.5, 8: 0.25}, {2: 0.9}),
        sample([7, 2], {5: 0.6, 7: 0.4}, {2: 1}),
    ]
    assert rewards.likeness([5, 6, 2], cached) == pytest.approx((0.6 + 0.5 + 0.9) / 3)
    assert rewards.likeness([5, 8, 2], cached) == pytest.approx((0.6 + 0.25) / 3)  # nothing is known after 8
    assert rewards.likeness([7, 2], cached) == pytest.approx((0.4 + 1.0) / 2)
    assert rewards.likeness([9, 6, 2], cached) == rewards.likeness([], cached) == rewards.likeness([5], []) == 0
    assert rewards.likeness([5, 6, 2, 2], cached) == pytest.approx((0.6 + 0.5 + 0.9) / 4)  # the cached answer ended


# --- guards -----------------------------------------------------------------------------------------------------------


def steps(count, **changes):
    healthy = {"correctness": 0.3, "format": 0.5, "length_tokens": 80.0, "entropy_nats": 1.0, "varied": 0.7}
    return [rewards.Step(**(healthy | changes)) for _ in range(count)]


def caught(some, window=10):
    guards = rewards.Guards(window)
    for number, step in enumerate(some, 1):
        try:
            guards(step)
        except rewards.Collapsed as collapsed:
            return number, str(collapsed)
    return None


def test_a_policy_that_emits_the_empty_template_forever_is_caught_within_the_window():
    template = "<think></think><answer></answer>"
    [judged] = rewards.judge([template], [([(NUMBER, None)], True)], [True], None)
    assert judged.reward == 0
    number, why = caught(steps(40, correctness=judged.correctness, format=judged.format, length_tokens=17, varied=0.0))
    assert number == 10 and "no answer was right over 10 steps" in why and "--no-guards" in why


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ({"correctness": 0.0, "format": 0.9, "varied": 0.3}, "format is rewarded"),
        ({"length_tokens": 17.0, "correctness": 0.2}, "answers shrank from 80 to 17"),
        ({"entropy_nats": 0.01}, "entropy fell"),
        ({"varied": 0.0}, "rewarded alike"),
    ],
)
def test_what_no_run_recovers_from_is_told(then, says):
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
    """A cache whose prompts have verifiers that a random model's answers fulfil now and then: a digit is enough."""
    folder = tmp_path_factory.mktemp("sums")
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(12):
            verifier = {"kind": "numeric", "answer": str(i)}
            row = {"id": f"r{i}", "prompt": f"Say {i}.", "completion": f"Here it is: {i}", "verifier": verifier}
            file.write(json.dumps(row) + "\n")
    capture.run(capture_plan(tiny_model, folder / "rows.jsonl", folder / "c", split_ratios=(0.8, 0.1, 0.1)))
    return folder / "c"


def test_prompts_are_told_with_how_the_teacher_did(sums):
    names, rows = query.run(sums, "SELECT * FROM prompts WHERE split = 'train'")
    first = dict(zip(names, rows[0]))
    assert first["samples"] == first["judged"] == 1 and first["success"] in (0.0, 1.0)
    given = [ids for (ids,) in query.run(sums, "SELECT completion_ids FROM samples WHERE origin = 'given'")[1]]
    assert all(any(trace in given for trace in dict(zip(names, row))["traces"]) for row in rows)


SMALL = ("--num-generations", 2, "--per-device-train-batch-size", 4, "--max-completion-length", 8, "--save-steps", 2)


def test_grpo_trains_from_the_cache_alone_and_goes_on_after_an_interruption(kd, sums, tiny_model, tmp_path):
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
    (tmp_path / "r" / "kdcache.json").write_text(json.dumps(record | {"finished": False}))
    before = history(tmp_path / "r" / "checkpoint-4", "success")
    again = kd(*command, "--output-dir", tmp_path / "r", "--max-steps", 4, "--no-guards", "--json")
    assert json.loads(again.stdout)["success"] == pytest.approx(before[-1][0], abs=1e-9)  # it goes on with what it knew
    assert "continues at checkpoint-4" in again.stderr and (tmp_path / "r" / "model.safetensors").is_file()
    assert "finished run" in kd(*command, "--output-dir", tmp_path / "r", "--max-steps", 4, code=1).stderr


def test_an_adapter_learns_from_the_teachers_word_too_and_leaves_a_whole_student(kd, sums, tiny_model, tmp_path):
    done = kd(
        *("grpo", "--from-cache", sums, "--student", tiny_model, "--output-dir", tmp_path / "r", "--where", "true"),
        *(*SMALL, "--max-steps", 2, "--no-guards", "--lora-r", 4, "--teacher-weight", 0.3, "--beta", 0.1),
    )
    assert "likeness" in done.stderr and len(history(tmp_path / "r", "rewards/likeness/mean", "kl")) == 2
    assert (tmp_path / "r" / "model.safetensors").is_file() and (tmp_path / "r" / "adapter").is_dir()
    assert folders.foreign(tmp_path / "r", folders.RUN) is None, "--overwrite must know all that a run leaves"


def test_a_cached_answer_is_as_likely_as_its_cached_probabilities_say(sums, tiny_model, tmp_path):
    from trainer.grpo import train as grpo

    config = grpo.GrpoConfig((sums,), tiny_model, tmp_path / "r", where="true", teacher_weight=0.1)
    prompts = grpo.prepare(config).prompts
    assert all(prompt.cached for prompt in prompts)
    rows = query.run(sums, "SELECT sample_id, completion_ids, token_logprobs FROM samples WHERE split = 'train'")[1]
    logprobs = {sample_id: (ids, values) for sample_id, ids, values in rows}
    for sample in (sample for prompt in prompts for sample in prompt.cached):
        ids, values = logprobs[sample.sample_id]
        stored = [ids[t] in _candidates(sample, t) for t in range(len(ids))]
        expected = np.mean([np.exp(v) if there else 0.0 for v, there in zip(values, stored)])
        assert rewards.likeness(ids, [sample]) == pytest.approx(expected, abs=0.02)


def _candidates(sample, position):
    return sample.candidates.ids[sample.candidates.at(position)].tolist()


def test_prompts_arrive_as_the_caches_ids_and_what_guides_is_not_trained_on(sums, tiny_model, tmp_path, monkeypatch):
    from trainer.grpo import train as grpo
    from trainer.grpo import trainer as policy

    config = grpo.GrpoConfig(
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
        found = inner(self, prompts)
        seen.append((prompts, self._guided, found))
        return found

    monkeypatch.setattr(policy.FromCache, "_generate", watched)
    run = grpo.prepare(config)
    grpo.train(run, lambda *_: None)
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
    from trainer.grpo import train as grpo

    def refusal(cache=sums, **changes):
        with pytest.raises(KDError) as refused:
            grpo.prepare(grpo.GrpoConfig((cache,), tiny_model, tmp_path / "r", **changes))
        return str(refused.value)

    config = grpo.GrpoConfig((sums,), tiny_model, tmp_path / "locked", where="true")
    with lock.held(tmp_path / "locked"), pytest.raises(KDError, match="locked is being written by process"):
        grpo.train(grpo.prepare(config), print)
    assert "no training row of this cache says how an answer is judged" in refusal(tiny_cache)
    assert "have a verifier, and none fulfils success > 2" in refusal(where="success > 2")
    assert "use-vllm" in refusal(guide="prefix", arguments={"use_vllm": True})
    assert "--where 'succes > 0'" in refusal(where="succes > 0")
    assert "expected prefix" in refusal(guide="suffix")
    assert "cannot outweigh" in refusal(teacher_weight=0.9)
    base = ("grpo", "--student", tiny_model, "--output-dir", tmp_path / "r", "--from-cache", sums)
    assert "did you mean --num-generations" in kd(*base, "--num-generation", 2, code=2).stderr
