"""Checkpoints are whole or not at all: kills, full disks and damage never end a training, and never change its result."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from helpers import ROOT
from kdcache.errors import KDError, UsageError
from trainer.distill import plan as run
from trainer.distill import trainer as distill
from trainer.distill.config import TrainConfig
from trainer.grpo import plan as grpo
from trainer.grpo.config import GrpoConfig
from trainer.report import gather as report
from trainer.run import checkpoints, values
from trainer.run.saving import enough_disk

ARGUMENTS = {
    **{"max_steps": 4, "eval_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2},
    **{"report_to": "none", "save_total_limit": 4},
}
SCRIPT = ROOT / "benchmarks/kills_train.py"
TIMES = {"seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


@pytest.fixture(scope="module")
def train(tiny_cache, tiny_model):
    """Return a function that trains in this process and returns the resolved run. The log of step ``until`` ends it like Ctrl-C."""

    def start(out, until=None, **arguments):
        def logged(step, *_):
            if until is not None and step > until:
                raise KeyboardInterrupt

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        config = TrainConfig((tiny_cache,), tiny_model, out, arguments=ARGUMENTS | arguments)
        resolved = run.prepare(config)
        try:
            distill.train(resolved, logged)
        except KeyboardInterrupt:
            pass
        finally:
            torch.set_num_threads(threads)
        return resolved

    return start


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(out)
    return out


@pytest.fixture(scope="module")
def half_way(train, tmp_path_factory):
    """Return a run that was interrupted after step 2: checkpoint-1, its best, and checkpoint-2. Tests must not change it."""
    out = tmp_path_factory.mktemp("runs") / "cut"
    train(out, until=2)
    return out


@pytest.fixture
def cut(half_way, tmp_path):
    return Path(shutil.copytree(half_way, tmp_path / "cut"))


def assert_same(one, other):
    def history(folder):
        logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [{name: value for name, value in entry.items() if name not in TIMES} for entry in logged]

    assert history(one) == history(other)
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys() and all((weights[name] == others[name]).all() for name in weights)


# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moments(tiny_cache, tiny_model):
    """Kill a run at each file operation of the save of checkpoint-3, with --save-total-limit 1."""
    command = [sys.executable, SCRIPT, "--moments", "--cache", tiny_cache, "--student", tiny_model]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(moments):
    killed = [moment for moment in moments if moment["killed"]]
    assert len(killed) > 40 and {moment["continues_at"] for moment in killed} == {"checkpoint-2", "checkpoint-3"}


def test_the_new_checkpoint_counts_from_the_moment_its_list_of_files_has_its_name(moments):
    named = max(
        i
        for i, moment in enumerate(moments)
        if "os.rename" in str(moment["before"]) and "files.json" in moment["before"]
    )
    assert [m["continues_at"] == "checkpoint-3" for m in moments[1:]] == [i > named for i in range(1, len(moments))]


def test_what_a_kill_leaves_half_is_swept_at_the_next_start(moments):
    whole = [["checkpoint-2"], ["checkpoint-2", "checkpoint-3"], ["checkpoint-3"]]
    assert all(moment["left"] in whole for moment in moments)


def test_what_was_interrupted_after_its_last_step_takes_no_further_step(train, undisturbed, tmp_path):
    out = Path(shutil.copytree(undisturbed, tmp_path / "last"))
    for path in [path for path in out.iterdir() if path.is_file() and path.name != "kdcache.json"]:
        path.unlink()
    record = json.loads((out / "kdcache.json").read_text())
    (out / "kdcache.json").write_text(json.dumps(record | {"finished": False}))
    assert train(out).start.checkpoint == str(out / "checkpoint-4")
    assert_same(undisturbed, out)


def test_a_folder_that_was_killed_at_its_first_write_can_be_used(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.kdcache.json.machine.1.tmp").write_text("{")
    train(tmp_path / "run", max_steps=1)
    assert (tmp_path / "run/model.safetensors").is_file()


@pytest.mark.slow
def test_the_same_command_always_continues_to_the_same_student(tiny_cache, tiny_model):
    command = [sys.executable, SCRIPT, "--cache", tiny_cache, "--student", tiny_model, "--kills", 30, "--disks", 6]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- full disks -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_for_a_checkpoint_is_told_before_anything_is_written(tmp_path):
    says = r"disk is full: it needs at least 1,000,000,000.0 MB, and [\d,.]+ MB are free there"
    with pytest.raises(KDError, match=says), enough_disk(tmp_path / "checkpoint-1", 10**15):
        raise AssertionError("it is not to be tried")


@pytest.mark.parametrize("limit, written_by", [(3_000_000, "safetensors or tokenizers"), (10_000_000, "torch")])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_one_sentence(train, cut, undisturbed, limit, written_by):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # for the writers, the same as a disk that is full
    try:
        with pytest.raises(
            KDError, match=r"checkpoint-3 could not be saved, as the disk is full.*continues at checkpoint-2"
        ):
            train(cut)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (cut / "checkpoint-3").exists()
    train(cut)
    assert_same(undisturbed, cut)


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"),
    *("config.json", "files.json"),
)


class Program:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_program(path):
    path.write_bytes(pickle.dumps(Program()))


@pytest.mark.parametrize("damage", [Path.unlink, truncate, flip, replace_by_program], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_training_continues_at_the_checkpoint_before_a_damaged_one_and_says_so(cut, monkeypatch, name, damage):
    monkeypatch.chdir(cut)
    damage(cut / "checkpoint-2" / name)
    resume = checkpoints.resume_point(cut)
    if (name, damage) == ("files.json", Path.unlink):
        assert resume.checkpoint.name == "checkpoint-2", "as those of earlier versions, it is read instead"
        return
    assert resume.checkpoint.name == "checkpoint-1" and not Path("it-ran").exists()
    assert [name in note and "checkpoint-2 is left out" in note for note in resume.notes] == [True]


def test_a_checkpoint_of_an_earlier_version_is_whole_if_all_of_it_can_be_read(cut):
    (cut / "checkpoint-2/files.json").unlink()
    assert checkpoints.resume_point(cut) == checkpoints.ResumePoint(cut / "checkpoint-2", cut / "checkpoint-1", [])


@pytest.mark.parametrize("damage", [Path.unlink, truncate, replace_by_program], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES[:5])
def test_a_damaged_checkpoint_of_an_earlier_version_is_left_out_too(cut, monkeypatch, name, damage):
    monkeypatch.chdir(cut)
    (cut / "checkpoint-2/files.json").unlink()
    damage(cut / "checkpoint-2" / name)
    assert checkpoints.resume_point(cut).checkpoint.name == "checkpoint-1" and not Path("it-ran").exists()


def test_training_does_not_silently_start_anew_if_no_checkpoint_is_whole(cut, train):
    for number in (1, 2):
        truncate(cut / f"checkpoint-{number}/optimizer.pt")
    with pytest.raises(
        KDError, match=r"cannot be continued: checkpoint-2 is left out: optimizer.pt has .* --overwrite"
    ):
        train(cut)


def test_from_an_older_checkpoint_the_result_is_the_same(train, cut, undisturbed):
    flip(cut / "checkpoint-2/scheduler.pt")
    assert train(cut).start.checkpoint == str(cut / "checkpoint-1")
    assert_same(undisturbed, cut)


def test_a_run_whose_best_checkpoint_is_lost_resumes_and_says_so(cut, train):
    assert json.loads((cut / "checkpoint-2/trainer_state.json").read_text())["best_global_step"] == 1
    shutil.rmtree(cut / "checkpoint-1")
    resolved = train(cut)
    assert "the best is chosen from what is measured after it" in resolved.start.notes[-1]
    assert (cut / "model.safetensors").is_file()


def test_a_run_that_was_moved_knows_its_best_checkpoint(train, cut, undisturbed):
    out = cut.rename(cut.with_name("moved"))
    train(out)
    assert_same(undisturbed, out)


def test_checkpoints_without_optimizer_cannot_be_continued(train, cut):
    for checkpoint in checkpoints.listed(cut):
        for name in ("files.json", "optimizer.pt"):  # as an earlier version left them under --save-only-model
            (checkpoint / name).unlink()
    with pytest.raises(KDError, match="--save-only-model leaves weights that cannot be trained further"):
        train(cut)


def test_another_number_of_processes_is_told_that_its_random_numbers_begin_anew(cut):
    assert "begin anew from --seed" in checkpoints.resume_point(cut, ranks=2).notes[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"finished": false}'])
def test_a_damaged_record_is_one_sentence(train, cut, content):
    (cut / "kdcache.json").write_text(content)
    with pytest.raises(KDError, match="holds no record of a run"):
        train(cut)


def test_the_report_shows_a_run_whose_last_checkpoint_is_half(cut):
    (cut / "checkpoint-3").mkdir()
    (cut / "checkpoint-3/trainer_state.json").write_text('{"log_hist')
    assert report.training_run(cut, []).steps == 2


# --- what is saved, and for how long ----------------------------------------------------------------------------------


def test_a_student_keeps_its_own_use_cache(undisturbed):
    saved = [undisturbed / "config.json", undisturbed / "checkpoint-4/config.json"]
    assert [json.loads(path.read_text())["use_cache"] for path in saved] == [True, True]


@pytest.mark.parametrize("steps", [0, -7, 1.5, True, "many"])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(UsageError, match=r"--max-steps .*: expected a whole number of at least 1"):
        values.check_values({"max_steps": steps}, {})


@pytest.mark.parametrize("kind, prepare", [(TrainConfig, run.prepare), (GrpoConfig, grpo.prepare)])
def test_zero_steps_are_not_three_epochs(tiny_cache, tiny_model, tmp_path, kind, prepare):
    with pytest.raises(UsageError, match="--max-steps 0"):
        prepare(kind((tiny_cache,), tiny_model, tmp_path / "run", arguments={"max_steps": 0}))
