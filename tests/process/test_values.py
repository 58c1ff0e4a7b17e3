"""Values that make no sense are refused in one sentence, before anything is written: through the real commands, in one process."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cli import kd as command
from helpers import capture_plan
from kdcache.cache.reader import Cache
from kdcache.capture import run as capture
from kdcache.capture.requests import questions_of
from kdcache.errors import KDError, UsageError

ABSURD = ("nan", "inf", "-1", "0", "1e99", "", str(10**30), "9" * 5000)


def refused(arguments) -> str | None:
    """Return why a command line was refused, in a sentence or two; None if it was accepted."""
    try:
        command.main([str(argument) for argument in arguments], prog_name="kd", standalone_mode=False)
    except click.ClickException as error:
        message = error.format_message()
    except KDError as error:
        assert error.exit_code in (1, 2)
        message = str(error)
    except OSError as error:  # the system's message about a path, which main() prints
        message = error.strerror
    else:
        return None
    assert message.strip() and len(message.splitlines()) == 1
    return message


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> str:
    """Return a model of eight tokens, without a chat template; it loads in milliseconds."""
    return make_model(tmp_path_factory.mktemp("models") / "small")


def make_model(folder: Path, adds_bos: bool = False, head_rows: int | None = None, **changes) -> str:
    """Save a random Llama whose words are a, b, c, d and whose tokenizer names a BOS, which it may add."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 1.0}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=head_rows or len(words), **(sizes | heads | ids | changes))
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def rows_at(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_plan(model: str, folder: Path, *rows: dict, **changes):
    rows = rows or ({"prompt": "a b", "completion": "c d"},)
    settings = {"sparsify": "topk:4", "split_ratios": (1.0, 0.0, 0.0), "mode": "score"}
    return capture_plan(model, rows_at(folder, *rows), folder / "out", **(settings | changes))


def samples_of(plan):
    prompts = plan.open_prompts()
    return [
        question
        for shard in plan.shards
        for example in shard.examples
        for question in questions_of(plan, prompts, shard, example)
    ]


# --- every option -----------------------------------------------------------------------------------------------------


def options_of(name):
    return [
        p
        for p in command.get_command(click.Context(command), name).params
        if isinstance(p, click.Option) and not p.is_flag
    ]


@pytest.mark.parametrize(
    "option, value",
    [
        *(("--temperature", value) for value in ("nan", "inf", "-1", "1e99", "0.001")),
        *(("--top-p", value) for value in ("nan", "inf", "-1", "0", "1e99")),
        *(("--seed", value) for value in ("-1", str(10**30))),
        *((option, value) for option in ("--samples", "--max-tokens", "--limit") for value in ("-1", "0", str(10**30))),
        *((option, value) for option in ("--rows-per-shard", "--capture-k") for value in ("-1", "0", str(10**30))),
        *(("--max-model-len", value) for value in ("-1", "0", str(10**30))),
        *((option, "") for option in ("--teacher", "--examples", "--out", "--revision", "--dtype", "--sparsify")),
        *(("--split-ratios", value) for value in ("nan,0,0", "inf,0,0", "-1,1,1", "")),
        *(("--sparsify", value) for value in ("topk:nan", "topk:inf", "topk:1e99", "threshold:nan", "threshold:inf")),
        *(("--plan-slice", value) for value in ("1/0", "-1/2", "1/" + "9" * 5000)),
        *(("--gpus-per-worker", value) for value in ("nan", "inf")),
        ("--dtype", "float99"),
    ],
)
def test_cache_teacher_refuses_a_value_that_makes_no_sense(small_model, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    rows = rows_at(tmp_path, {"prompt": "a b", "completion": "c"})
    base = [
        "cache-teacher",
        "--teacher",
        small_model,
        "--engine",
        "transformers",
        "--examples",
        rows,
        "--sparsify",
        "topk:4",
    ]
    assert refused([*base, option, value]) and os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.fixture(scope="module")
def small_cache(small_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rows = [{"prompt": f"a {' '.join('abcd'[int(d)] for d in f'{i:03d}')}", "completion": "c d"} for i in (10, 21, 32)]
    capture.run(small_plan(small_model, folder, *rows, split_ratios=(0.0, 0.0, 1.0), near_duplicates="keep"))
    return folder / "out"


@pytest.mark.parametrize(
    "option, value",
    [
        *(("--temperature", value) for value in ("nan", "inf", "-1", "1e99", "0.001")),
        *(("--top-p", value) for value in ("nan", "inf", "-1", "0", "1e99")),
        *(
            (option, value)
            for option in ("--seeds", "--max-new-tokens", "--batch-size")
            for value in ("-1", "0", str(10**30))
        ),
        *(("--max-length", value) for value in ("-1", "0", str(10**30))),
        *(("--generate", value) for value in ("-1", str(10**30))),
        *((option, "") for option in ("--from-cache", "--split", "--engine", "--dtype")),
    ],
)
def test_evaluate_refuses_a_value_that_makes_no_sense(small_model, small_cache, tmp_path, monkeypatch, option, value):
    monkeypatch.chdir(tmp_path)
    base = ["evaluate", small_model, "--from-cache", small_cache, "--engine", "transformers"]
    assert refused([*base, option, value]) and not os.listdir(tmp_path)


@pytest.mark.parametrize("model", ["", "label=", "=model"])
def test_evaluate_refuses_an_empty_model_or_label(small_cache, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert refused(["evaluate", model, "--from-cache", small_cache]) and not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cache-teacher", "evaluate"])
def test_every_option_accepts_or_refuses_every_absurd_value_in_a_sentence(
    small_model, small_cache, tmp_path, monkeypatch, name
):
    """A refused value leaves no file behind, and an accepted one works; neither ends in a traceback."""
    for parameter in options_of(name):
        for number, value in enumerate(ABSURD):
            folder = tmp_path / f"{parameter.name}-{number}"
            folder.mkdir()
            monkeypatch.chdir(folder)
            if name == "cache-teacher":
                if parameter.name in ("ray_address", "workers"):
                    continue  # they start other processes
                rows = rows_at(tmp_path, {"prompt": "a b", "completion": "c"})
                base = [
                    name,
                    "--teacher",
                    small_model,
                    "--engine",
                    "transformers",
                    "--examples",
                    rows,
                    "--sparsify",
                    "topk:4",
                ]
            else:
                base = [name, small_model, "--from-cache", small_cache, "--engine", "transformers"]
            why = refused([*base, f"{parameter.opts[0]}={value}"])
            assert why is None or not os.listdir(folder), (parameter.name, value[:30], why)


# --- texts ------------------------------------------------------------------------------------------------------------

HALF = "\ud83d"


@pytest.mark.parametrize(
    "column", ["id", "group_id", "task", "language", "reference", "prompt", "completion", "verifier"]
)
def test_half_a_surrogate_in_any_column_is_a_rejected_row_that_is_named(small_model, tmp_path, column):
    good = {"prompt": "a b", "completion": "c"}
    manifest = capture.run(small_plan(small_model, tmp_path, good, good | {"id": "x", column: f"a {HALF}"}))
    [rejected] = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert manifest["rows"] == 1 and f"its {column} is not valid Unicode" in rejected["reason"]


def test_a_row_that_is_bad_for_another_reason_may_have_half_a_surrogate_in_its_id(small_model, tmp_path):
    manifest = capture.run(
        small_plan(small_model, tmp_path, {"prompt": "a b", "completion": "c"}, {"id": HALF, "prompt": ""})
    )
    assert manifest["rejected"] == 1 and r"\ud83d" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize("levels", [101, 990, 100_000])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_that_is_nested_too_deeply_is_one_sentence(small_model, tmp_path, levels, name):
    row = '{"prompt": "a", "completion": "b", "more": ' + "[" * levels + "]" * levels + "}"
    (tmp_path / name).write_text(f"[{row}]" if name == "rows.json" else row)
    with pytest.raises(KDError, match="nested more than 100 levels"):
        capture_plan(small_model, tmp_path / name, tmp_path / "out")


def test_verifiers_that_are_not_understood_are_counted_with_the_first_reason(small_model, tmp_path):
    rows = [
        {"prompt": f"a {w}", "completion": "b", "verifier": v}
        for w, v in (("a", {"kind": "exact"}), ("b", {"kind": "magic"}), ("c", "{"))
    ]
    [note] = [
        note for note in small_plan(small_model, tmp_path, *rows, near_duplicates="keep").notes if "BOS" not in note
    ]
    assert (
        "verifiers of 2 of 3 rows are not understood" in note and "rows:1: a verifier is an object whose kind" in note
    )


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_token_beyond_the_models_vocabulary_rejects_its_row_alone(tmp_path):
    model = make_model(tmp_path / "m", head_rows=7)
    rows = [
        {"prompt": "a d", "completion": "a"},
        {"prompt": "a", "completion": "d"},
        {"prompt": "b c", "completion": "a"},
    ]
    manifest = capture.run(small_plan(model, tmp_path, *rows, near_duplicates="keep"))
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert manifest["rows"] == 1 and [r[:18] for r in reasons] == ["prompt: token 7, i", "completion: token "]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 5}', "[" * 100_000])
def test_a_broken_configuration_is_one_sentence(small_model, tmp_path, monkeypatch, name, text):
    model = shutil.copytree(small_model, tmp_path / "model")
    (model / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    rows = rows_at(tmp_path, {"prompt": "a b", "completion": "c"})
    why = refused(
        ["cache-teacher", "--teacher", model, "--engine", "transformers", "--examples", rows, "--sparsify", "topk:4"]
    )
    assert why or (name, text) == ("generation_config.json", '{"model_type": 5}')
    assert why is None or sorted(os.listdir(tmp_path)) == ["model", "rows.jsonl"]


@pytest.mark.parametrize("value", ["null", '"x"', "-1", "0", "1.5", "NaN"])
def test_a_vocabulary_that_is_no_number_is_one_sentence(small_model, tmp_path, value):
    model = shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": "HERE"}).replace('"HERE"', value))
    with pytest.raises(KDError, match=r"vocab_size|not a model that transformers can read"):
        small_plan(str(model), tmp_path)


# --- where an answer begins and ends ----------------------------------------------------------------------------------


def test_a_model_that_names_bos_beside_a_tokenizer_that_adds_none_is_warned_of(small_model, tmp_path):
    [note] = small_plan(small_model, tmp_path).notes
    assert "(<s>, id 1)" in note and "--bos add" in note


@pytest.mark.parametrize(
    "bos, adds, begins",
    [("auto", False, [4]), ("auto", True, [1]), ("add", False, [1]), ("add", True, [1]), ("never", True, [4])],
)
def test_bos_stands_before_a_prompt_once_or_not_at_all(tmp_path, bos, adds, begins):
    plan = small_plan(make_model(tmp_path / "m", adds_bos=adds), tmp_path, bos=bos)
    [sample] = samples_of(plan)
    assert sample.request.prompt_ids == [*begins, *[4, 5][len(begins) - (begins == [1]) :]]
    assert not plan.notes or (bos, adds) == ("auto", False)


def test_a_chat_template_keeps_the_bos_it_has(tiny_model, tmp_path):
    prompts = {
        bos: samples_of(small_plan(tiny_model, tmp_path, bos=bos))[0].request.prompt_ids
        for bos in ("auto", "add", "never")
    }
    assert prompts["auto"][0] == 1 and prompts["add"] == prompts["never"] == prompts["auto"]


def test_bos_is_in_the_fingerprint_where_it_was_chosen(small_model, tmp_path):
    plans = {bos: small_plan(small_model, tmp_path, bos=bos) for bos in ("auto", "add", "never")}
    assert len({plan.fingerprint for plan in plans.values()}) == 3 and "bos" not in plans["auto"].fields


def test_a_student_of_a_cache_with_bos_is_asked_with_it(small_model, tmp_path):
    from trainer.distill import plan as run
    from trainer.distill import trainer as distill
    from trainer.distill.config import TrainConfig
    from trainer.student.chat import Conversation

    plan = small_plan(small_model, tmp_path, bos="add")
    capture.run(plan)
    config = TrainConfig((tmp_path / "out",), small_model, tmp_path / "run", arguments={"max_steps": 1})
    distill.train(run.prepare(config), lambda *_: None)
    assert Cache(tmp_path / "out").plan["fields"]["bos"] == "add"
    assert Conversation(str(tmp_path / "run"), None, 0.0, 1).prompts.prompt_ids("a") == [1, 4]


def test_sampling_ends_at_the_end_of_turn_that_the_tokenizer_alone_names(tmp_path):
    model = make_model(tmp_path / "m", eos_token_id=None)
    (Path(model) / "generation_config.json").unlink()
    plan = small_plan(model, tmp_path, mode="sample", samples=20)
    capture.run(plan)
    import duckdb

    rows = duckdb.sql(f"SELECT completion_ids, finish_reason FROM '{tmp_path}/out/data/*.parquet'").fetchall()
    assert any(reason == "stop" for _, reason in rows)
    assert all(2 not in ids[:-1] and (ids[-1] == 2) == (reason == "stop") for ids, reason in rows)


def test_an_unknown_bos_choice_is_a_usage_error(small_model, tmp_path):
    with pytest.raises(UsageError, match="expected one of auto, add, never"):
        small_plan(small_model, tmp_path, bos="maybe")
