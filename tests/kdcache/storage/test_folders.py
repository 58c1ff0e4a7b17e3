"""Every command follows one rule about which folders it may write into, replace or delete."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cli
from helpers import ROOT, capture_plan
from kdcache.capture import run as capture
from kdcache.capture.folder import claim
from kdcache.commands.passthrough import parse_options
from kdcache.errors import KDError, UsageError
from kdcache.storage import folders, lock


@pytest.fixture
def command(tiny_cache, tiny_model, rows_file, tmp_path):
    """Return a function from a command that writes a folder, and that folder, to the arguments."""
    cached = ("--from-cache", tiny_cache)
    required = {
        "cache-teacher": ("--teacher", tiny_model, "--examples", rows_file, "--engine", "transformers", "--limit", 4),
        "init-student": ("--from", tiny_model, "--keep-layers", 1),
        "train": (*cached, "--student", tiny_model, "--max-steps", 1, "--report-to", "none"),
        "grpo": (*cached, "--student", tiny_model, "--max-steps", 1),
        "quantize": (tiny_model, "--no-measure"),
        "evaluate": (tiny_model, *cached, "--generate", 0),
        "report": (tiny_cache,),
        "compare": (tmp_path / "evaluation",),
    }

    def arguments(name, out, *more):
        flag = "--output-dir" if name in ("train", "grpo") else "--out"
        return [name, *map(str, (*required[name], flag, out, *more))]

    return arguments


def kd(arguments):
    """Run a command in this process, and raise its errors."""
    cli.kd(arguments, prog_name="kd", standalone_mode=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


OVERWRITING = {
    "cache-teacher": folders.CACHE,
    "init-student": folders.STUDENT,
    "train": folders.RUN,
    "grpo": folders.RUN,
    "quantize": folders.QUANTIZED,
}
WRITING = (*OVERWRITING, "evaluate", "report")


def make_folder(folder, kind):
    """Create a folder with nothing but the marker of its kind."""
    folder.mkdir()
    (folder / kind.marker).write_text(json.dumps({kind.key.strip('"'): True}))
    return folder


# --- what is deleted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERWRITING)
@pytest.mark.parametrize(
    "files", [("thesis.tex",), (".ssh/id_rsa",), ("kdcache.json", "plan.json", "quantization.json")]
)
def test_a_foreign_folder_is_not_overwritten(name, files, command, tmp_path):
    for file in files:
        (tmp_path / "foreign" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "foreign" / file).write_text("{}")
    before = contents(tmp_path / "foreign")
    with pytest.raises(KDError, match=r"holds no|is no cache"):
        kd(command(name, tmp_path / "foreign", "--overwrite"))
    assert contents(tmp_path / "foreign") == before


@pytest.mark.parametrize("name, kind", OVERWRITING.items())
@pytest.mark.parametrize("file", ["notes.txt", "data/rows.parquet", "checkpoint-2/thesis.tex", ".git/HEAD"])
def test_a_foreign_file_is_named_and_keeps_its_folder_unchanged(name, kind, file, command, tmp_path):
    out = make_folder(tmp_path / "out", kind)
    (out / file).parent.mkdir(exist_ok=True)
    (out / file).write_text("years of work")
    before = contents(out)
    with pytest.raises(KDError, match=f"would delete .*{file}, which kdcache did not write"):
        kd(command(name, out, "--overwrite"))
    assert contents(out) == before


@pytest.mark.parametrize("name, kind", OVERWRITING.items())
def test_links_the_home_folder_and_the_current_folder_are_not_overwritten(name, kind, command, tmp_path, monkeypatch):
    out = make_folder(tmp_path / "out", kind)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(KDError, match="is a link to"):
        kd(command(name, tmp_path / "link", "--overwrite"))
    monkeypatch.setenv("HOME", str(out))
    with pytest.raises(KDError, match="your home folder"):
        kd(command(name, out, "--overwrite"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (out / "data").mkdir()
    monkeypatch.chdir(out / "data")
    with pytest.raises(KDError, match="the current folder"):
        kd(command(name, out, "--overwrite"))


def test_a_link_in_a_folder_is_foreign(tmp_path, tiny_cache):
    out = make_folder(tmp_path / "out", folders.CACHE)
    (out / "data").symlink_to(tiny_cache / "data")
    assert folders.foreign(out, folders.CACHE) == out / "data"


@pytest.mark.parametrize("name", ["init-student", "train", "grpo", "quantize"])
def test_a_student_that_is_an_input_is_not_overwritten(name, command, tiny_model, tmp_path):
    out = make_folder(tmp_path / "out", OVERWRITING[name])
    shutil.copytree(tiny_model, out / "student")
    before = contents(out)
    arguments = [a.replace(tiny_model, str(out / "student")) for a in command(name, out, "--overwrite")]
    with pytest.raises(UsageError, match=r"which is read|need separate folders"):
        kd(arguments)
    assert contents(out) == before


def test_examples_that_are_an_input_are_not_overwritten(tiny_model, tiny_cache, tmp_path):
    copy = shutil.copytree(tiny_cache, tmp_path / "copy")
    shard = next((copy / "data").glob("train-*"))
    with pytest.raises(UsageError, match="which is read"):
        capture.run(capture_plan(tiny_model, shard, copy, overwrite=True))


@pytest.mark.parametrize("name, file", [("report", "report.html"), ("evaluate", "evaluation.json")])
def test_a_file_of_the_same_name_is_not_replaced(name, file, command, tmp_path):
    (tmp_path / file).write_text("<h1>foreign</h1>")
    with pytest.raises(KDError, match=f"{file} would be replaced"):
        kd(command(name, tmp_path))
    assert (tmp_path / file).read_text() == "<h1>foreign</h1>"


def test_the_disk_cache_evicts_only_its_own_pieces(tmp_path, monkeypatch):
    from kdcache.storage import diskcache

    monkeypatch.setenv("KDCACHE_DISK_CACHE", str(tmp_path))
    for name in ("thesis.tex", "a" * 32, f".{'b' * 32}.{'c' * 8}"):
        (tmp_path / name).write_text("text")
    diskcache.evict(0)
    assert list(contents(tmp_path)) == ["thesis.tex"]


def test_init_student_replaces_only_a_student_with_its_marker(command, tmp_path):
    kd(command("init-student", tmp_path / "s"))
    kd(command("init-student", tmp_path / "s", "--overwrite", "--keep-layers", 2))
    assert json.loads((tmp_path / "s/config.json").read_text())["num_hidden_layers"] == 2
    assert not list((tmp_path / "s").glob(".*"))
    (tmp_path / "s/init-student.json").unlink()  # older versions wrote none
    with pytest.raises(KDError, match="Delete it yourself"):
        kd(command("init-student", tmp_path / "s", "--overwrite"))


# --- when it is deleted -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_cache, tiny_model, tmp_path_factory):
    """A finished run, which tests must not change."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ("--from-cache", tiny_cache, "--student", tiny_model, "--output-dir", out, "--max-steps", 1)
    kd(["train", *map(str, options)])
    return out


def test_no_file_that_a_command_leaves_is_foreign(finished, tiny_cache):
    assert folders.foreign(finished, folders.RUN) is None and not list(finished.glob(".*"))
    assert folders.foreign(tiny_cache, folders.CACHE) is None and not list(tiny_cache.glob("**/.*"))


@pytest.mark.parametrize(
    "more, sentence",
    [
        (("--early-stopping-patience", 2, "--where", "split = 'train'"), "needs a validation split"),
        (("--report-to", "bogus"), "."),  # found when the trainer is created
        (
            ("--lr-scheduler-type", "polynomial", "--lr-scheduler-kwargs", "{'power': 'x'}"),
            ".",
        ),  # found at the first step
    ],
)
def test_a_run_that_cannot_begin_leaves_the_old_one_unchanged(more, sentence, command, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(Exception, match=sentence):
        kd(command("train", out, "--overwrite", *more))
    assert contents(out) == contents(finished)


def test_a_student_that_cannot_be_made_leaves_the_old_one_unchanged(command, tmp_path):
    kd(command("init-student", tmp_path / "s"))
    before = contents(tmp_path / "s")
    with pytest.raises(UsageError, match="--keep-layers 9"):
        kd(command("init-student", tmp_path / "s", "--overwrite", "--keep-layers", 9))
    assert contents(tmp_path / "s") == before


def test_ctrl_c_before_the_first_step_restores_the_old_run(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(KDError, match="holds what it held before") as error, folders.held(out, folders.RUN):
        folders.set_aside(out)
        (out / "kdcache.json").write_text("{}")
        raise KeyboardInterrupt
    assert error.value.exit_code == 130 and contents(out) == contents(finished)


MOMENTS = {  # when a process was killed: files in the folder, files in .kdcache, and which contents recover() keeps
    "while the old ones were moved": ({"kdcache.json": "old"}, {"moving/run.yaml": "old"}, "old"),
    "before the first step": ({"kdcache.json": "new"}, {"old/kdcache.json": "old", "old/run.yaml": "old"}, "old"),
    "while the new ones were moved up": (
        {"run.yaml": "new"},
        {"ready/kdcache.json": "new", "old/kdcache.json": "old", "old/run.yaml": "old"},
        "new",
    ),
    "while the old ones were deleted": ({"kdcache.json": "new", "run.yaml": "new"}, {"gone/run.yaml": "old"}, "new"),
    "while the new ones were written": ({"kdcache.json": "old", "run.yaml": "old"}, {"new/run.yaml": "new"}, "old"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_process_repairs_what_a_killed_one_left(moment, tmp_path):
    visible, hidden, kept = MOMENTS[moment]
    for name, text in {**visible, **{f".kdcache/{name}": text for name, text in hidden.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with folders.held(tmp_path, folders.RUN):
        pass
    assert contents(tmp_path) == {"kdcache.json": kept.encode(), "run.yaml": kept.encode()}


def test_results_of_a_new_run_are_never_deleted_to_restore_the_old_one(tmp_path):
    for name in (".kdcache/old/kdcache.json", "kdcache.json", "checkpoint-5/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with pytest.raises(RuntimeError), folders.held(tmp_path, folders.RUN):
        raise RuntimeError
    assert sorted(contents(tmp_path)) == ["checkpoint-5/model.safetensors", "kdcache.json"]


# --- a start that failed ----------------------------------------------------------------------------------------------


def test_a_capture_without_a_shard_can_be_repeated_with_other_settings(tiny_model, rows_file, tmp_path):
    claim(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=2, seed=1))
    assert capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=2))["complete"]
    with pytest.raises(KDError, match="made differently"):
        capture.run(capture_plan(tiny_model, rows_file, tmp_path / "out", limit=2, seed=1))


@pytest.mark.parametrize("name, more", [("train", ("--report-to", "bogus")), ("init-student", ("--keep-layers", 9))])
def test_a_start_that_fails_leaves_no_folder(name, more, command, tmp_path):
    with pytest.raises(Exception, match=r"."):
        kd(command(name, tmp_path / "data/new/out", *more))
    assert not (tmp_path / "data").exists()


def test_a_run_without_a_checkpoint_can_be_repeated_with_other_settings(finished, command, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    record = json.loads((finished / "kdcache.json").read_text())
    (out / "kdcache.json").write_text(json.dumps(record | {"finished": False}))
    kd(command("train", out, "--alpha", 0.9))
    assert json.loads((out / "kdcache.json").read_text())["config"]["alpha"] == 0.9


# --- two at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WRITING if name != "grpo"])
def test_a_second_writer_is_refused_with_the_name_of_the_first(name, command, tmp_path):
    with lock.held(tmp_path / "out"):
        before = contents(tmp_path / "out")
        with pytest.raises(KDError, match=rf"out is being written by process {os.getpid()} on") as error:
            kd(command(name, tmp_path / "out"))
        assert error.value.exit_code == 1 and contents(tmp_path / "out") == before
    assert not (tmp_path / "out").exists()


def test_only_the_first_rank_acquires_the_lock(tmp_path, monkeypatch):
    from trainer.run.folder import Start, alone

    class Run:
        class config:
            output_dir = tmp_path / "out"

        start = Start()

    monkeypatch.setenv("RANK", "1")
    with alone(Run()):
        assert not Run.config.output_dir.exists()
    assert not Run.config.output_dir.exists()


def test_a_run_that_another_process_finished_meanwhile_is_not_resumed(tiny_cache, tiny_model, finished, tmp_path):
    from trainer.distill import plan as run
    from trainer.distill import trainer as distill
    from trainer.distill.config import TrainConfig

    resolved = run.prepare(TrainConfig((tiny_cache,), tiny_model, tmp_path / "run", arguments={"max_steps": 1}))
    shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(KDError, match="finished run"):
        distill.train(resolved, lambda *_: None)
    assert contents(tmp_path / "run") == contents(finished)


@pytest.mark.slow
def test_of_two_simultaneous_trainings_one_is_refused_and_one_completes(command, tmp_path):
    arguments = command("train", tmp_path / "run", "--max-steps", 30)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cli", *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    errors = [process.communicate()[1].decode() for process in started]
    assert sorted(process.returncode for process in started) == [0, 1]
    assert "is being written by process" in "".join(errors)
    assert json.loads((tmp_path / "run/kdcache.json").read_text())["finished"]


# --- where it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WRITING, "compare"])
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("inside", ["", "below/it"])
def test_a_file_in_place_of_a_folder_is_reported(name, more, inside, command, tmp_path):
    (tmp_path / "file").write_text("foreign")
    if more and name not in OVERWRITING:
        pytest.skip("it has no --overwrite")
    if name == "compare":
        from trainer.evaluate import compare

        with pytest.raises(UsageError, match="file is a file; expected a folder"):
            compare.write([], tmp_path / "file" / inside)
        return
    with pytest.raises(UsageError, match="file is a file; expected a folder"):
        kd(command(name, tmp_path / "file" / inside, *more))
    assert (tmp_path / "file").read_text() == "foreign"


def test_a_recipe_refuses_a_file_in_place_of_its_folder(tmp_path):
    from kdcache.commands import recipes as recipe

    (tmp_path / "file").write_text("foreign")
    with pytest.raises(UsageError, match="file is a file; expected a folder"):
        recipe.run("demo", tmp_path / "file", print)


PATHS = {
    *("out", "output_dir", "cache", "from_cache", "student", "models", "folder", "folders", "evaluations", "file"),
    *("data_path", "teacher", "examples", "base", "recipe"),
}


def parameters(group=cli.kd):
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from parameters(command)
        else:
            yield from ((f"{name} {p.name}", p) for p in command.params if p.name in PATHS)


@pytest.mark.parametrize("parameter", [pytest.param(p, id=name) for name, p in parameters()])
def test_a_tilde_in_every_path_is_the_home_folder(parameter, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    assert str(parameter.type.convert("~/x", parameter, None)) == str(tmp_path / "x")


def test_a_tilde_is_the_home_folder_in_yaml_files_library_options_and_after_labels(tmp_path, monkeypatch):
    from trainer.commands.train import train
    from trainer.evaluate.run import label_of

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output_dir: ~/run\nfrom_cache: [~/a, ~/b]\nstudent: ~/s\nlogging_dir: ~/logs\n")
    with train.make_context("train", ["--config=~/run.yaml", "--hub-cache=~/hub"]) as context:
        assert context.params["output_dir"] == tmp_path / "run" and context.params["student"] == f"{tmp_path}/s"
        assert context.params["from_cache"] == (tmp_path / "a", tmp_path / "b")
        assert parse_options(context.args) == {"hub_cache": f"{tmp_path}/hub"}
        assert context.meta["kd.config"] == {"logging_dir": f"{tmp_path}/logs"}
    assert label_of("before=~/s") == ("before", f"{tmp_path}/s")


def test_a_student_is_written_into_the_real_home_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    kd(command("init-student", "~/s"))
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and (tmp_path / "home/s/config.json").is_file()
