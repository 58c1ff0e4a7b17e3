"""Data sets in their own layouts -> examples, and no problem (or near duplicate) on two sides of a split."""

import gzip
import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import capture_plan
from kdcache.cache.format import SPLITS, differing_fields
from kdcache.capture import run as capture
from kdcache.capture.requests import questions_of
from kdcache.errors import KDError, UsageError
from kdcache.examples import load as examples
from kdcache.examples import near_duplicates as splits
from kdcache.examples import templates
from kdcache.examples.data_sets import pytorrent
from kdcache.examples.types import BadRow, Columns, Example

ENGLISH_ALPACA = (
    b"Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    b"that appropriately completes the request.\n\n### Instruction:\nWho swam?\n\n### Input:\nAna swam.\n\n### Response:\n"
)
DOLLY = [
    {"instruction": "Who swam?", "context": "Ana swam.", "response": "Ana.", "category": "closed_qa"},
    {"instruction": "Name a fish.", "context": "", "response": "Trout", "category": "open_qa"},
    {"instruction": "Name  a FISH", "context": None, "response": "Cod", "category": "open_qa"},
    {"instruction": "", "context": "", "response": "No.", "category": "open_qa"},
    {"instruction": "Sing.", "context": "", "response": None, "category": "open_qa"},
    {"instruction": "Sing.", "context": ["a list"], "response": "La.", "category": "open_qa"},
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(name, path, prompt_format="chat", system=None):
    return examples.load(name, Columns(system=system), None, str(path), prompt_format)


def reasons(rows):
    return [row.reason for row in rows if isinstance(row, BadRow)]


def prompt_of(example):
    (message,) = example.messages
    assert message["role"] == "user"
    return message["content"]


def test_dolly_takes_what_is_whole_and_says_why_it_left_the_rest(tmp_path):
    rows = load("dolly", write(tmp_path / "dolly.jsonl", DOLLY))
    first, second, third, *bad = rows
    assert prompt_of(first) == "Who swam?\n\nAna swam." and prompt_of(second) == "Name a fish."
    assert (first.source, first.row_id, first.completion, first.reference) == ("dolly", "0", "Ana.", "Ana.")
    assert (first.task, first.language, first.verifier, first.prompt) == ("closed_qa", "en", None, None)
    assert second.group_id == third.group_id != first.group_id  # the same words
    assert [r.split(":")[0] for r in reasons(bad)] == ["row 4", "row 5", "row 6"]
    assert "'instruction' is empty" in bad[0].reason and "'response'" in bad[1].reason and "list" in bad[2].reason


def test_minillms_layout_of_dolly_gives_the_same_examples(tmp_path):
    renamed = [{"instruction": r["instruction"], "input": r["context"], "output": r["response"]} for r in DOLLY[:3]]
    ours, theirs = (
        load("dolly", write(tmp_path / "a.jsonl", DOLLY[:3])),
        load("dolly", write(tmp_path / "b.jsonl", renamed)),
    )
    assert [(e.messages, e.completion, e.group_id) for e in ours] == [
        (e.messages, e.completion, e.group_id) for e in theirs
    ]


def test_an_evaluation_set_of_instances_is_taken_by_its_first(tmp_path):
    rows = [
        {"id": "u0", "instruction": "Shorten it.", "instances": [{"input": "A long line.", "output": "A line."}]},
        {"id": "u1", "instruction": "Name a fish.", "instances": {"input": [""], "output": ["Trout."]}},
        {"id": "u2", "instruction": "Name a fish.", "instances": []},
    ]
    first, second, bad = load("self-instruct", write(tmp_path / "set.jsonl", rows))
    assert prompt_of(first) == "Shorten it.\n\nA long line." and first.reference == first.completion == "A line."
    assert prompt_of(second) == "Name a fish." and second.reference == "Trout."
    assert "'instances'" in bad.reason


def test_arithmetic_is_made_with_its_answers():
    rows = examples.load("arithmetic", Columns())
    assert len({r.row_id for r in rows}) == 162 and len({r.group_id for r in rows}) == 90  # 3 + 4 is 4 + 3
    one = next(r for r in rows if r.row_id == "7×8")
    assert (prompt_of(one), one.completion) == ("What is 7 × 8? Answer with the number.", "56")
    assert json.loads(one.verifier) == {"kind": "numeric", "answer": "56"}


def test_a_spanish_row_has_spanish_words_around_it_and_the_problem_of_its_original(tmp_path):
    row = {
        "id": "7",
        "instruction": "¿Quién nadó?",
        "context": "Ana nadó.",
        "response": "Ana.",
        "category": "closed_qa",
    }
    row |= {"instruction_original_en": "Who swam?", "context_original_en": "Ana swam."}
    for language in "es", "en":  # a folder of all languages: the Spanish file is taken
        write(tmp_path / f"data/{language}-00000.jsonl", [row if language == "es" else DOLLY[0]])
    (spanish,) = load("dolly-es", tmp_path, "alpaca")
    assert spanish.prompt.endswith("### Instrucción:\n¿Quién nadó?\n\n### Entrada:\nAna nadó.\n\n### Respuesta:\n")
    assert (spanish.row_id, spanish.language) == ("7", "es")
    (english, *_) = load("dolly", write(tmp_path / "en.jsonl", DOLLY))
    assert spanish.group_id == english.group_id


def test_alpaca_is_byte_for_byte_what_minillm_writes(tmp_path):
    first, second, *_ = load("dolly", write(tmp_path / "dolly.jsonl", DOLLY), "alpaca")
    assert first.prompt.encode() == ENGLISH_ALPACA
    assert "Input" not in second.prompt and "### Instruction:\nName a fish.\n\n### Response:\n" in second.prompt


@pytest.mark.parametrize("suffix", [".json", ".jsonl.gz", ".parquet", "folder", "hub"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(DOLLY[:3], indent=1))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in DOLLY[:3]).encode()))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(DOLLY[:3]), path)
    else:
        write(path / "a/one.jsonl", DOLLY[:2])
        write(path / "b.jsonl", DOLLY[2:3])
        (path / "README.md").write_text("not rows")
    wanted = load("dolly", write(tmp_path / "plain.jsonl", DOLLY[:3]))
    if suffix == "hub":
        pytest.importorskip("datasets")
        from kdcache.examples import files

        (path / "README.md").write_text(
            "---\nconfigs:\n- config_name: c\n  data_files:\n  - {split: train, path: a/one.jsonl}\n"
            "  - {split: test, path: b.jsonl}\n---\n"
        )
        assert list(files.hub(str(path), "c")) == DOLLY[:3] and list(files.hub(str(path), "c", "test")) == DOLLY[2:3]
    else:
        assert load("dolly", path) == wanted


def test_a_broken_gzip_file_is_an_error_in_a_sentence(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(DOLLY[0]) + "\n").encode() * 999)[:-9])
    with pytest.raises(KDError, match="not a gzip file that can be read to its end"):
        load("dolly", path)


def bugnet_row(
    problem="p1", fail="print(int(input) + 1)\n", fixed="print(int(input()) + 1)\n", language="Python", **more
):
    return {"problem_id": problem, "language": language, "fail": fail, "pass": fixed, "error": None} | more


def test_bugnet_joins_what_the_folder_has_and_runs_its_tests(tmp_path):
    write(tmp_path / "Python_train.jsonl", [bugnet_row(), bugnet_row("p2", "x = 1", "x = 2")])
    write(tmp_path / "Python_test.jsonl", [bugnet_row("p1", "import sys", "import os")])
    write(
        tmp_path / "C++_train.jsonl", [bugnet_row(language="C++", fail="int main(){}", fixed="int main(){return 0;}")]
    )
    (tmp_path / "problem_descriptions.json").write_text(
        json.dumps([{"problem_id": "p1", "description": "<h1>Next</h1>\n<p>n &lt; 9</p>"}])
    )
    (tmp_path / "problem_tests.json").write_text(json.dumps([{"problem_id": "p1", "input": "1\n", "output": "2\n"}]))
    first, second, third = load("bugnet-python", tmp_path)
    verifier = json.loads(first.verifier)
    assert verifier == {
        "kind": "stdio",
        "language": "python",
        "tests": [{"input": "1\n", "output": "2\n"}],
        "baseline": "print(int(input) + 1)\n",
    }
    assert "Problem:\nNext\nn < 9\n\n```python\nprint(int(input) + 1)\n```" in prompt_of(first)
    assert (first.completion, first.reference, first.group_id) == ("print(int(input()) + 1)\n",) * 2 + ("p1",)
    assert json.loads(second.verifier) == {"kind": "exact", "baseline": "x = 1"} and third.group_id == "p1"
    assert third.row_id == "2" and "Problem:" not in prompt_of(second)
    (cpp,) = load("bugnet-cpp", tmp_path)
    assert "```cpp\nint main(){}" in prompt_of(cpp) and json.loads(cpp.verifier)["language"] == "cpp"
    plain = load("bugnet-python", tmp_path, "alpaca")[1].prompt
    assert plain.endswith("### Input:\nx = 1\n\n### Response:\n") and "This Python program has a bug." in plain


def test_bugnet_takes_a_tests_from_the_row_and_refuses_what_is_no_fix(tmp_path):
    rows = [bugnet_row(input="3", output="4"), bugnet_row(language="C++"), bugnet_row(fail="same", fixed="same\n")]
    good, *bad = load("bugnet-python", write(tmp_path / "mine.jsonl", rows))
    assert json.loads(good.verifier)["tests"] == [{"input": "3", "output": "4"}]
    assert [r.partition(": ")[2] for r in reasons(bad)] == [
        "its language is C++, expected Python",
        "its fix changes nothing",
    ]


def test_pytorrent_shows_the_code_without_the_docstring_it_asks_for(tmp_path):
    code = 'def add(a, b):\n    """Sum of a and b.\n\n    Both numbers.\n    """\n    # ñ\n    return a + b\n'
    row = {
        "repo": "o/r",
        "path": "m.py",
        "func_name": "add",
        "docstring": "Sum of a and b.\n\nBoth numbers.",
        "summary": "Sum",
    }
    rows = [row | {"original_string": code}, row | {"original_string": "print 'two'"}]
    path = tmp_path / "jsonl/train/0.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    good, bad = load("pytorrent", tmp_path)
    assert "```python\ndef add(a, b):\n    # ñ\n    return a + b\n```" in prompt_of(good) and "Sum" not in prompt_of(
        good
    )
    assert good.completion == good.reference == row["docstring"] and good.group_id == "o/r"
    assert "not one Python 3 function" in bad.reason


@pytest.mark.parametrize(
    "code, shown",
    [
        ("    def f(self):\n        'Says ñ.'; return 'ñ'\n", "def f(self):\n    return 'ñ'\n"),
        ("@cached\nasync def f():\n    r'''One.'''\n    return 1", "@cached\nasync def f():\n    return 1"),
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
    ],
)
def test_docstrings_are_cut_out_of_any_function(code, shown):
    assert pytorrent.without_docstring(code) == shown


def test_a_function_of_nothing_but_its_docstring_is_rejected():
    with pytest.raises(ValueError, match="no code besides"):
        pytorrent.without_docstring('def f():\n    """Nothing else."""\n')


PROBLEM = {
    **{"id": "1/A", "contest_id": "1", "index": "A", "time_limit": 2.0, "memory_limit": 256.0, "language": "python"},
    **{"description": "Print twice the number.", "prompt": "Solve this in Python.\n# Problem\nPrint twice the number."},
    "examples": [{"input": "2\n", "output": "4\n"}],
}


def test_codeforces_takes_whole_official_tests_and_their_checker(tmp_path):
    tests = [{"input": "1\n", "output": "2\n"}, {"input": "1 2 3...", "output": "6"}]
    row = PROBLEM | {"official_tests": tests, "input_mode": "stdio", "generated_checker": "import sys"}
    rows = [row, row | {"language": "cpp"}, row | {"input_mode": "file"}, row | {"official_tests": [], "examples": []}]
    python, cpp, *bad = load("codeforces", write(tmp_path / "verifiable-prompts/test.jsonl", rows))
    assert json.loads(python.verifier) == {
        **{"kind": "stdio", "language": "python", "tests": tests[:1]},
        **{"time_limit_seconds": 2.0, "memory_limit_mb": 256.0, "checker": "import sys"},
    }
    assert prompt_of(python) == PROBLEM["prompt"] and python.completion is None
    assert (python.row_id, cpp.row_id, python.group_id, cpp.group_id) == ("1/A", "1/A#2", "1/A", "1/A")
    assert json.loads(cpp.verifier)["language"] == "cpp" and cpp.content == ("Print twice the number.",)
    assert "'file'; only stdio" in bad[0].reason and "no tests" in bad[1].reason


def test_codeforces_cots_keeps_traces_that_come_to_an_answer(tmp_path):
    trace = "<think>\nTwice.\n</think>\n```python\nprint(2 * int(input()))\n```"
    row = PROBLEM | {"generation": trace, "finish_reason": "stop"}
    unfinished = [
        {"generation": "<think>\nOn and on"},
        {"generation": "<think>a</think>\n"},
        {"finish_reason": "length"},
    ]
    for config, language in (("solutions_py", "python"), ("solutions", "cpp")):
        write(tmp_path / f"{config}/train.jsonl", [row | {"title": language}, row, *(row | u for u in unfinished)])
    first, second, *bad = load("codeforces-cots", tmp_path)
    assert first.completion == trace and json.loads(first.verifier)["tests"] == PROBLEM["examples"]
    assert (first.group_id, first.row_id, second.row_id) == ("1/A", "1/A", "1/A#2")
    assert "nothing after </think>" in bad[0].reason and "cut off" in bad[2].reason and len(bad) == 3
    assert json.loads(load("codeforces-cots-cpp", tmp_path)[0].verifier)["language"] == "cpp"


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("dolly", {"question": "a", "response": "b"}, r"no column 'instruction', .*; found: question, response"),
        ("bugnet-python", {"problem_id": "p", "language": "Python", "buggy": "a", "pass": "b"}, "no column 'fail'"),
        ("pytorrent", {"repo": "r", "code": "a"}, "no column 'docstring'"),
        ("codeforces", {"prompt": "a", "tests": []}, "no column 'official_tests', 'input_mode'"),
        ("codeforces-cots", {"prompt": "a", "completion": "b"}, "no column 'generation', 'examples'"),
    ],
)
def test_a_missing_column_is_named_with_those_that_were_found(tmp_path, name, row, message):
    with pytest.raises(KDError, match=message):
        load(name, write(tmp_path / "rows.jsonl", [row]))


def test_what_cannot_go_together_is_refused(tmp_path):
    path = write(tmp_path / "dolly.jsonl", DOLLY)
    with pytest.raises(UsageError, match="dolly, dolly-es, bugnet-python, bugnet-cpp, pytorrent"):
        examples.load("doly", Columns())
    with pytest.raises(UsageError, match="--data-path goes with the name of a data set"):
        examples.load("builtin", Columns(), None, path)
    with pytest.raises(UsageError, match="no such file or folder"):
        load("dolly", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--system has no place"):
        load("dolly", path, "alpaca", system="Be kind.")
    with pytest.raises(UsageError, match="has columns of its own"):
        examples.load("dolly", Columns(prompt="instruction"), None, path)
    with pytest.raises(UsageError, match=r"Python_train\.jsonl"):
        load("bugnet-python", tmp_path)


def test_a_table_takes_alpaca_too_and_conversations_are_rejected(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [{"messages": [{"role": "user", "content": "Di hola."}], "language": "es"}, {"messages": turns}]
    good, bad = examples.load(write(tmp_path / "t.jsonl", rows), Columns(), None, None, "alpaca")
    assert good.prompt == templates.alpaca("Di hola.", language="es") and "### Respuesta:" in good.prompt
    assert "one user message" in bad.reason


# --- splits -----------------------------------------------------------------------------------------------------------


def crossing(plan):
    """The problems whose examples are in more than one split of a plan."""
    sides = {}
    for shard in plan.shards:
        for row in shard.examples:
            if isinstance(row, Example):
                sides.setdefault(row.group_id, set()).add(shard.split)
    return {group for group, splits_of_it in sides.items() if len(splits_of_it) > 1}


@pytest.fixture
def bugnet_folder(tmp_path):
    """60 problems with four different fixes each, strewn over the data set's own three files."""
    rows = [bugnet_row(f"p{i % 60}", f"bug {i} " * 9, f"fix {i}") for i in range(240)]
    random.Random(0).shuffle(rows)
    for number, split in enumerate(("train", "validation", "test")):
        write(tmp_path / f"bugnet/Python_{split}.jsonl", rows[number::3])
    return tmp_path / "bugnet"


def test_no_problem_is_on_two_sides_whatever_the_data_sets_own_splits(tiny_model, bugnet_folder, tmp_path, monkeypatch):
    settings = {"data_path": str(bugnet_folder), "mode": "score", "near_duplicates": "keep"}
    plan = capture_plan(tiny_model, "bugnet-python", tmp_path / "out", **settings)
    assert not crossing(plan) and {shard.split for shard in plan.shards} == set(SPLITS)
    assert sum(len(shard.examples) for shard in plan.shards) == 240
    # Split by row instead of by problem: then the check must fail.
    rows = itertools.count()
    monkeypatch.setattr("kdcache.capture.resolve.split_of", lambda *_: SPLITS[next(rows) % 3])
    assert crossing(capture_plan(tiny_model, "bugnet-python", tmp_path / "out", **settings))


def slices(**texts):
    return {
        split: [
            Example("x", f"{split}{i}", ({"role": "user", "content": text},))
            for i, text in enumerate(texts.get(split, []))
        ]
        for split in SPLITS
    }


def test_train_rows_that_repeat_an_evaluation_row_are_dropped_and_no_others():
    story = "the cat sat on the mat and looked at the dog which slept near the old oven in the warm kitchen of the house by the sea at night"
    near = story.replace("warm ", "")
    by_split = slices(
        train=["Name a fish!", near, "an unrelated thing", "story of the cat", "name a bird", "name a bird"],
        validation=[story.upper(), "¿Qué hora es?"],
        test=["name   a ﬁsh", "¿Qué hora es?"],
    )
    kept, dropped = splits.drop_near_duplicates(by_split)
    reasons = {row.row_id: row.reason for rows in kept.values() for row in rows if isinstance(row, BadRow)}
    assert dropped == 3 and reasons == {
        "train0": "near duplicate of test row test0 (similarity 1.00)",
        "train1": f"near duplicate of validation row validation0 (similarity {reasons['train1'][-5:-1]})",
        "validation1": "near duplicate of test row test1 (similarity 1.00)",
    }
    assert {split: len(rows) for split, rows in kept.items()} == {"train": 6, "validation": 2, "test": 2}
    assert by_split["train"][0].row_id == "train0"  # what was handed in is as it was


def test_a_shared_passage_under_another_question_is_no_duplicate(tmp_path):
    passage = " ".join(f"word{i}" for i in range(80))
    questions = [
        ("Who swam?", passage),
        ("Who sang?", passage),
        ("Who swam?", passage + " more"),
        ("Who swam?", "Ana did."),
    ]
    rows = [{"instruction": q, "context": c, "response": "Ana."} for q, c in questions]
    first, *others = load("dolly", write(tmp_path / "rows.jsonl", rows))
    kept, dropped = splits.drop_near_duplicates({"train": others, "test": [first]})
    assert dropped == 1 and [isinstance(row, BadRow) for row in kept["train"]] == [False, True, False]


def test_the_index_finds_what_comparing_all_pairs_finds():
    rng = random.Random(1)
    frame = [f"word{i}" for i in range(18)]
    texts = [" ".join(frame[rng.randint(0, 9) :] + rng.choices("abcdef", k=3)) for _ in range(300)]
    by_split = slices(train=texts[:200], test=texts[200:])
    evaluation = [splits.shingles(text) for text in texts[200:]]
    wanted = [any(splits.jaccard(splits.shingles(t), k) >= splits.MIN_JACCARD for k in evaluation) for t in texts[:200]]
    kept, dropped = splits.drop_near_duplicates(by_split)
    assert [isinstance(row, BadRow) for row in kept["train"]] == wanted and 20 < dropped < 180


# --- through the plan and the command ---------------------------------------------------------------------------------


def dolly_file(tmp_path):
    rows = [{"instruction": f"Say {w} and nothing else.", "context": "", "response": w} for w in map(str, range(60))]
    rows += [{"instruction": f"say {w}, and nothing ELSE", "context": " ", "response": w} for w in map(str, range(3))]
    longer = "Repeat after me, slowly and with feeling: one two three four five six seven eight nine ten eleven twelve"
    rows += [{"instruction": f"{longer}{end}", "context": "", "response": "1"} for end in (" thirteen", "", " please")]
    rows += [{"instruction": "", "context": "", "response": "x"}]
    return write(tmp_path / "dolly.jsonl", rows)


def test_alpaca_arrives_as_plain_token_ids(tiny_model, tmp_path):
    path = write(tmp_path / "dolly.jsonl", DOLLY)
    settings = {"data_path": path, "prompt_format": "alpaca", "mode": "score"}
    plan = capture_plan(tiny_model, "dolly", tmp_path / "out", **settings)
    prompts = plan.open_prompts()
    samples = {
        question.row_id: question
        for shard in plan.shards
        for example in shard.examples
        for question in questions_of(plan, prompts, shard, example)
    }
    prompt = samples["0"].prompt
    assert prompt.encode() == ENGLISH_ALPACA
    tokenizer = prompts.tokenizer
    assert samples["0"].request.prompt_ids == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(samples["0"].request.prompt_ids) == prompt and "<|im_start|>" not in prompt


def test_form_and_duplicates_are_part_of_the_fingerprint(tiny_model, tmp_path):
    path = write(tmp_path / "dolly.jsonl", DOLLY)

    def fields(**changes):
        return capture_plan(tiny_model, "dolly", tmp_path / "out", data_path=path, mode="score", **changes).fields

    usual = fields()
    assert usual == fields()
    differing = [line.split(":")[0] for line in differing_fields(usual, fields(prompt_format="alpaca"))]
    assert differing == ["examples", "prompt_template"]
    differing = [line.split(":")[0] for line in differing_fields(usual, fields(near_duplicates="keep"))]
    assert differing == ["near_duplicates"]


def test_the_plan_counts_near_duplicates_and_the_capture_lists_them(tiny_model, tmp_path):
    settings = {"data_path": dolly_file(tmp_path), "mode": "score", "split_ratios": (0.5, 0.25, 0.25)}
    plan = capture_plan(tiny_model, "dolly", tmp_path / "out", **settings)
    keeps = capture_plan(tiny_model, "dolly", tmp_path / "out", near_duplicates="keep", **settings)
    assert plan.near_duplicates > 0 == keeps.near_duplicates
    facts = capture.run(plan)
    listed = [json.loads(line)["reason"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert sum("near duplicate of" in reason for reason in listed) == plan.near_duplicates
    assert facts["rejected"] == plan.near_duplicates + 1 and facts["rows"] == 67 - facts["rejected"]
    assert json.loads((tmp_path / "out/plan.json").read_text())["near_duplicates_dropped"] == plan.near_duplicates


def test_the_command_reads_a_data_set_from_a_file(kd, tiny_model, tmp_path):
    command = ["cache-teacher", "--teacher", tiny_model, "--engine", "transformers", "--examples", "dolly", "--json"]
    command += ["--prompt-format", "alpaca", "--sparsify", "topk:4", "--split-ratios", "0.5,0.25,0.25", "--out", "out"]
    done = kd(*command, "--data-path", dolly_file(tmp_path))
    facts = json.loads(done.stdout)
    assert facts["near_duplicates_dropped"] > 0 and facts["samples"] + facts["rejected"] == 67
    assert "nearly repeat a row of another split" in done.stderr
    assert "### Response:" in kd("sql", "out", "SELECT prompt FROM samples LIMIT 1", "--csv").stdout
    refused = kd(*command, "--examples", "doly", code=2)
    assert "dolly, dolly-es, bugnet-python" in refused.stderr
