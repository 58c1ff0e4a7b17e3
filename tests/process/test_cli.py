"""What users type and read: help, errors, exit codes."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys

import click
import pytest

import cli
from helpers import ROOT


def commands(group=cli.kd, prefix=()):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def test_help_is_quick_and_imports_neither_torch_nor_vllm():
    check = "import sys, cli\ntry: cli.kd(['--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'vllm', 'transformers', 'pyarrow') if m in sys.modules])"
    seconds = []  # of this processor's time, whatever else it does meanwhile
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert done.stdout.strip().endswith("[]")
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name, command", list(commands()), ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_every_command_has_an_example_in_its_help_and_says_what_each_option_does(name, command):
    assert "kd " + " ".join(name) in command.help
    assert all(parameter.help for parameter in command.params if parameter.param_type_name == "option")


def test_the_reference_of_commands_is_their_help():
    """To update it: python -m kdcache.commands.reference > docs/cli.md"""
    # In a process of its own: click keeps the help option of a command that another test has parsed without `kd`.
    command = [sys.executable, "-m", "kdcache.commands.reference"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/cli.md").read_text(encoding="utf-8") == page


def rows(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (["cache-teacher", "--examples", "nowhere.jsonl"], 2, "no such file"),
        (["cache-teacher", "--limt", "3"], 2, "did you mean --limit"),
        (["cache-teacher", "--gpu-memory-utilisation", "0.5"], 2, "did you mean --gpu-memory-utilization"),
        (["cache-teacher", "--sparsify", "topk:0"], 2, "as in topk:64"),
        (["cache-teacher", "--sparsify", "topk:60000"], 2, "vocabulary of 49152"),
        (["cache-teacher", "--split-ratios", "0.5,0.5"], 2, "three shares"),
        (["cache-teacher", "--split-ratios", "0.5,0.5,0.5"], 2, "sum to 1"),
        (["cache-teacher", "--samples", "0"], 2, "from 1 to"),
        (["cache-teacher", "--top-p", "2"], 2, "at most 1"),
        (["cache-teacher", "--max-model-len", "100000"], 2, "positions end at 8192"),
        (["cache-teacher", "--teacher", "./nowhere"], 2, "no such folder"),
        (["cache-teacher", "--max-logprobs", "5", "--limit", "2"], 2, "below the 256 candidates"),
        (["cache-teacher", "--engine", "transformers", "--max-num-seqs", "5", "--limit", "2"], 2, "an option of vLLM"),
        (["cache", "info", "nowhere"], 1, "no such folder"),
        (["sql", "nowhere", "SELECT 1"], 1, "no such folder"),
        (["sql", ".", "SELECT 1"], 1, "not a cache"),
        (["sql", "."], 2, "--list"),
        (["train", "--from-cache", "nowhere", "--student", "x/y", "--output-dir", "o"], 1, "no such folder"),
        (["evaluate", "embedded", "--from-cache", "nowhere"], 1, "no such folder"),
        (["init-student", "--from", "./nowhere", "--out", "o"], 2, "no such folder"),
        (["nonsense"], 2, "No such command"),
    ],
    ids=lambda x: " ".join(x[:4]) if isinstance(x, list) else "",
)
def test_wrong_use_is_one_clear_sentence(kd, arguments, code, says, smollm):
    done = kd(*arguments, code=code)
    assert says in done.stderr


@pytest.mark.parametrize(
    "lines, code, says",
    [
        ([], 1, "no rows"),
        (["{"], 1, "line 1: not JSON"),
        (["[1]"], 1, "line 1: expected a JSON object"),
        (['{"question": "a", "answer": "b"}'], 2, "found: question, answer"),
        (['{"prompt": "", "completion": "b"}'], 1, "row 1: no prompt"),
    ],
)
def test_a_bad_example_file_is_named_with_its_line(kd, tmp_path, tiny_model, lines, code, says):
    done = kd(
        "cache-teacher",
        "--teacher",
        tiny_model,
        "--engine",
        "transformers",
        "--examples",
        rows(tmp_path, *lines),
        code=code,
    )
    assert says in done.stderr


def test_columns_can_be_named(kd, tmp_path, tiny_model):
    path = rows(tmp_path, '{"question": "a b", "answer": "c"}')
    base = (
        "cache-teacher",
        "--teacher",
        tiny_model,
        "--engine",
        "transformers",
        "--examples",
        path,
        "--dry-run",
        "--json",
    )
    facts = json.loads(kd(*base, "--prompt-column", "question", "--completion-column", "answer").stdout)
    assert facts["samples_to_do"] == 1 and facts["given_completion_tokens"] == 2
    assert "no such column; found: question, answer" in kd(*base, "--prompt-column", "nope", code=2).stderr


def test_progress_goes_to_stderr_and_facts_to_stdout(kd, tmp_path, tiny_model):
    path = rows(tmp_path, '{"prompt": "a b", "completion": "c"}')
    done = kd(
        "cache-teacher", "--teacher", tiny_model, "--engine", "transformers", "--examples", path, "--out", "c", "--json"
    )
    assert json.loads(done.stdout)["samples"] == 1
    assert re.search(r"1/1 samples +shard 1/1 +[\d,]+ tokens/s", done.stderr)


def test_a_closed_pipe_is_no_error(tiny_cache):
    command = f"{sys.executable} -m kdcache sql {tiny_cache} 'FROM candidates' --csv | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stdout.startswith("sample_id,") and done.stderr == ""


def test_a_wrong_folder_is_refused_with_what_it_is_or_where_the_cache_is(kd, tiny_cache, tiny_model, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "cache").symlink_to(tiny_cache)
    assert f"is {tmp_path}/all/cache meant?" in kd("sql", tmp_path / "all", "SELECT 1", code=1).stderr
    assert "it is a model" in kd("cache", "info", tiny_model, code=1).stderr
    train = ("train", "--student", tiny_model, "--output-dir", "r", "--dry-run")
    said = kd(*train, "--from-cache", tiny_cache, "--temperature", "2", code=2).stderr
    assert "--temperature" in said and "needs the full vocabulary" in said and "nothing" not in said
    (tmp_path / "one.yaml").write_text(f"from_cache: {tiny_cache}\n")
    assert "steps per epoch" in kd(*train, "--config", tmp_path / "one.yaml").stdout
    grpo = ("grpo", "--from-cache", tiny_cache, "--student", tiny_model, "--output-dir", "r", "--dry-run")
    assert "no training row of this cache says how an answer is judged" in kd(*grpo, code=1).stderr


def test_looking_at_a_cache_changes_it_only_where_its_shards_have_changed(kd, tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    kd("cache", "info", copy)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    kd("cache", "info", copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    lost = sorted((copy / "data").glob("*.parquet"))[0]
    lost.unlink()
    said = kd("cache", "info", copy).stdout
    assert f"data/{lost.name}; the same kd cache-teacher command fills" in said
    assert not json.loads((copy / "manifest.json").read_text())["complete"]
