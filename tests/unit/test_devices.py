"""Phase two on several processes, and with less memory: the same losses as one plain process, by the real command."""

import os
import subprocess
import sys

import pytest
from conftest import INTERRUPTED, ROOT, history
from safetensors.numpy import load_file

STEPS = 6
SETTINGS = ("--max-steps", STEPS, "--learning-rate", 1e-2, "--logging-steps", 1, "--eval-steps", 3)
LEARN = ("--method", "sft", "--max-steps", 20, "--eval-steps", 2, "--learning-rate", 5e-2)  # enough to see it learn
TWO = ("--per-device-train-batch-size", 4)  # on each of two processes, the default 8 of one


@pytest.fixture(scope="module")
def start(tiny_cache, tiny_model, tmp_path_factory):
    """Runs ``kd train`` on some processes; killed after a step, if asked for. Returns the folder and the process."""

    def run(*more, ranks=1, out=None, kill_after=None, student=tiny_model, code=0):
        out = out or tmp_path_factory.mktemp("runs") / "run"
        script = tmp_path_factory.getbasetemp() / "interrupted.py"
        script.write_text(INTERRUPTED)
        launcher = [sys.executable]
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, script, "train", "--from-cache", tiny_cache, "--student", student, "--output-dir", out]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if kill_after:
            environment["KILL_AFTER"] = str(kill_after)
        done = subprocess.run(
            [*map(str, (*command, *SETTINGS, *more))], capture_output=True, text=True, env=environment, timeout=600
        )
        assert done.returncode == code or (kill_after and done.returncode), done.stderr
        return out

    return run


def logged(folder, name):
    return [value for (value,) in history(folder, name)]


def assert_same(one, other, rel=2e-4):
    for name in ("loss", "ce", "kl", "eval_kl", "eval_ce", "eval_tokens"):
        assert logged(other, name) == pytest.approx(logged(one, name), rel=rel, abs=2e-4), name
    one_token = 1.01 / logged(one, "eval_tokens")[0]
    assert logged(other, "eval_agreement") == pytest.approx(logged(one, "eval_agreement"), abs=one_token)
    mine, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == others.keys()
    assert all(abs(mine[name] - others[name]).max() < 5e-3 for name in mine)


def assert_loads(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(start):
    return start()


@pytest.mark.parametrize("more", [(), ("--fsdp",)], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_losses_and_weights_of_one(start, plain, more):
    two = start(*TWO, *more, ranks=2)
    assert len(logged(two, "loss")) == STEPS and len(logged(two, "eval_kl")) == 2
    assert_same(plain, two)
    assert_loads(two)


def test_a_run_of_one_process_is_continued_by_two(start, plain, tmp_path):
    start(out=tmp_path / "cut", kill_after=4)
    assert (tmp_path / "cut/checkpoint-3").is_dir() and not (tmp_path / "cut/model.safetensors").exists()
    start(*TWO, out=tmp_path / "cut", ranks=2)
    assert_same(plain, tmp_path / "cut")


@pytest.mark.parametrize(
    "more",
    [("--gradient-checkpointing",), ("--optim", "adamw_bnb_8bit"), ("--torch-compile",)],
    ids=["gradient checkpointing", "8-bit AdamW", "torch.compile"],
)
def test_what_saves_memory_or_time_leaves_the_losses(start, plain, more):
    # bitsandbytes keeps tensors of fewer than 4,096 numbers in 32 bits, so that this student is trained almost as before.
    assert_same(plain, start(*more), rel=2e-3)


def test_lora_trains_little_and_leaves_a_whole_student(start, tiny_model):
    import torch

    run = start("--lora-r", 4, *LEARN)
    assert logged(run, "eval_ce")[-1] < logged(run, "eval_ce")[0] - 0.5
    before, after = assert_loads(tiny_model).state_dict(), assert_loads(run).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed), "linear layers but the head"
    assert (run / "adapter/adapter_model.safetensors").stat().st_size < 1e5
    assert logged(start("--lora-r", 4, *LEARN), "loss") == logged(run, "loss"), "the seed gives the matrices too"


@pytest.fixture(scope="module")
def wide_student(tiny_model, tmp_path_factory):
    """bitsandbytes quantizes 64 numbers together, so that a layer has to be that wide."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model)
    config.hidden_size = config.intermediate_size = 128
    config.head_dim = 64
    folder = tmp_path_factory.mktemp("models") / "wide"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_qlora_trains_beside_four_bit_weights_and_is_merged_into_whole_ones(start, wide_student):
    run = start("--lora-r", 4, "--load-in-4bit", *LEARN, student=wide_student)
    assert logged(run, "eval_ce")[-1] < logged(run, "eval_ce")[0] - 0.5
    model = assert_loads(run)
    assert model.dtype.is_floating_point and not getattr(model.config, "quantization_config", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, ranks",
    [
        (("--optim", "adamw_bnb_8bit", "--gradient-checkpointing"), 1),
        (("--torch-compile",), 1),
        (("--lora-r", 4, "--lora-dropout", 0.1), 1),
        (("--lora-r", 4, "--load-in-4bit"), 1),
        (("--fsdp", *TWO), 2),
        (("--lora-r", 4, *TWO), 2),
    ],
    ids=["8-bit AdamW, checkpointing", "torch.compile", "LoRA", "QLoRA", "FSDP2", "LoRA, DDP"],
)
def test_each_is_killed_and_resumed(start, wide_student, tmp_path, more, ranks):
    whole = start(*more, ranks=ranks, student=wide_student)
    start(*more, ranks=ranks, student=wide_student, out=tmp_path / "cut", kill_after=4)
    start(*more, ranks=ranks, student=wide_student, out=tmp_path / "cut")
    assert_same(whole, tmp_path / "cut")
