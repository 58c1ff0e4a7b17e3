"""Phase two on several processes, and with less memory: the real command gives the losses of one plain process."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from helpers import INTERRUPTED, ROOT, history

STEPS = 6
SETTINGS = ("--max-steps", STEPS, "--learning-rate", 1e-2, "--logging-steps", 1, "--eval-steps", 3)
LEARN = ("--method", "sft", "--max-steps", 20, "--eval-steps", 2, "--learning-rate", 5e-2)  # enough to see it learn
TWO = ("--per-device-train-batch-size", 4)  # on each of two processes, the default 8 of one


@pytest.fixture(scope="module")
def start(tiny_cache, tiny_model, tmp_path_factory):
    """Return a function that runs ``kd train`` on ``ranks`` processes, kills it after ``kill_after`` steps, and returns its folder."""

    def run(*more, ranks=1, out=None, kill_after=None, student=tiny_model, code=0, script=INTERRUPTED, seen=None):
        out = out or tmp_path_factory.mktemp("runs") / "run"
        program = tmp_path_factory.mktemp("scripts") / "kd.py"
        program.write_text(script)
        launcher = [sys.executable]
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, program, "train", "--from-cache", tiny_cache, "--student", student, "--output-dir", out]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SEEN": str(seen)}
        if kill_after:
            environment["KILL_AFTER"] = str(kill_after)
        done = subprocess.run(
            [*map(str, (*command, *SETTINGS, *more))], capture_output=True, text=True, env=environment, timeout=600
        )
        assert code is None or done.returncode == code or (kill_after and done.returncode), done.stderr
        run.said[out] = done.stderr
        return out

    run.said = {}
    return run


def logged(folder, name):
    return [value for (value,) in history(folder, name)]


def assert_same(one, other, rel=2e-4):
    for name in ("loss", "ce", "kl", "eval_kl", "eval_ce", "eval_tokens"):
        assert logged(other, name) == pytest.approx(logged(one, name), rel=rel, abs=2e-4), name
    one_token = 1.01 / logged(one, "eval_tokens")[0]
    assert logged(other, "eval_agreement") == pytest.approx(logged(one, "eval_agreement"), abs=one_token)
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(abs(weights[name] - others[name]).max() < 5e-3 for name in weights)


def assert_loads(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain(start):
    return start()


def test_two_processes_give_the_losses_and_weights_of_one(start, plain):
    two = start(*TWO, ranks=2)
    assert len(logged(two, "loss")) == STEPS and len(logged(two, "eval_kl")) == 2
    assert_same(plain, two)
    assert_loads(two)


#: `kd` that writes what reached the loss, and how the student was held, to the file SEEN.
WATCHED = """
import json, os
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
import cli
from trainer.distill import trainer as distill

losses_of, log = distill.losses_of, distill.DistillTrainer.log
seen = {"exact": True}

def watched(layers, head, batch, alpha, divergence):
    losses = losses_of(layers, head, batch, alpha, divergence)
    rounded = batch["candidate_logprobs"].bfloat16().to(batch["candidate_logprobs"].dtype)
    seen["exact"] &= batch["candidate_logprobs"].dtype == torch.float32 and not torch.equal(rounded, batch["candidate_logprobs"])
    seen["loss"], seen["head"] = str(losses.loss.dtype), str(head.weight.dtype)
    return losses

def logging(self, *arguments, **options):
    weights = list(self.model.parameters())
    seen["sharded"] = sum(isinstance(weight, DTensor) for weight in weights), len(weights)
    seen["modules"] = sum(isinstance(module, FSDPModule) for module in self.model.modules())
    seen["local"] = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
    seen["all"] = sum(weight.numel() for weight in weights)
    if self.args.process_index == 0:
        json.dump(seen, open(os.environ["SEEN"], "w"))
    return log(self, *arguments, **options)

distill.losses_of, distill.DistillTrainer.log = watched, logging
cli.main()
"""


@pytest.fixture(scope="module")
def untied_student(tiny_model, tmp_path_factory):
    """Make a student whose head is not tied to its embeddings."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("models") / "untied"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def sharded(request, start, plain, tiny_model, untied_student, tmp_path_factory):
    """Return a run of one process, one of two under FSDP2, what was seen inside the latter, and its stderr."""
    seen = tmp_path_factory.mktemp("seen") / "seen.json"
    student = tiny_model if request.param == "tied" else untied_student
    one = plain if request.param == "tied" else start(student=student)
    two = start("--fsdp", *TWO, ranks=2, student=student, script=WATCHED, seen=seen)
    return one, two, json.loads(seen.read_text()), start.said[two]


def test_fsdp2_gives_the_losses_and_weights_of_one_process_and_a_whole_student(sharded):
    one, two, _, _ = sharded
    assert len(logged(two, "loss")) == STEPS and len(logged(two, "eval_kl")) == 2
    assert_same(one, two)
    assert_loads(two)


def test_under_fsdp2_every_parameter_is_a_dtensor_and_each_process_holds_half(sharded):
    _, _, seen, _ = sharded
    assert seen["sharded"][0] == seen["sharded"][1] > 0 and seen["modules"] >= 4
    assert seen["local"] == seen["all"] / 2


def test_the_first_line_says_the_mode(sharded):
    assert "parallel FSDP2, 2 processes" in sharded[3]


def test_under_bf16_and_fsdp2_the_teachers_log_probabilities_reach_the_loss_unrounded(start, tmp_path):
    start("--fsdp", "--bf16", "--max-steps", 2, *TWO, ranks=2, script=WATCHED, seen=tmp_path / "seen.json")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["exact"] and (seen["loss"], seen["head"]) == ("torch.float32", "torch.bfloat16")


@pytest.mark.parametrize(
    "environment, options, says",
    [
        ({}, {"fsdp": True}, "this is one"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "ask for it with --fsdp"),
        ({"WORLD_SIZE": "2"}, {"fsdp": True}, None),
    ],
)
def test_fsdp_is_an_error_where_it_cannot_run(monkeypatch, environment, options, says):
    from kdcache.errors import UsageError
    from trainer.run import parallel

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if says is None:
        assert parallel.mode(options) == "FSDP2, 2 processes"
    else:
        with pytest.raises(UsageError, match=says):
            parallel.mode(options)


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once(start, tmp_path):
    out = start("--seed", -1, ranks=2, out=tmp_path / "none", code=None)
    assert start.said[out].count("Error: --seed -1: expected") == 1
    assert not out.exists()


def test_a_run_of_one_process_is_resumed_by_two(start, plain, tmp_path):
    start(out=tmp_path / "cut", kill_after=4)
    assert (tmp_path / "cut/checkpoint-3").is_dir() and not (tmp_path / "cut/model.safetensors").exists()
    start(*TWO, out=tmp_path / "cut", ranks=2)
    assert_same(plain, tmp_path / "cut")


@pytest.mark.parametrize(
    "more",
    [("--gradient-checkpointing",), ("--optim", "adamw_bnb_8bit"), ("--torch-compile",)],
    ids=["gradient checkpointing", "8-bit AdamW", "torch.compile"],
)
def test_options_that_save_memory_or_time_do_not_change_the_losses(start, plain, more):
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
    """Make a student with layers wide enough for bitsandbytes, which quantizes 64 numbers together."""
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
