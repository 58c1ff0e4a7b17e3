"""Phase two through the real command, on a tiny student: resume, accumulation, refusals, and no teacher anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from helpers import INTERRUPTED, ROOT, history

SMALL = (
    "--max-steps",
    6,
    "--per-device-train-batch-size",
    4,
    "--learning-rate",
    1e-2,
    "--logging-steps",
    1,
    "--evals-per-epoch",
    2,
)


@pytest.fixture
def train(kd, tiny_cache, tiny_model):
    def run(out, *more, **options):
        arguments = (*SMALL, *more) if "--dry-run" not in more else more
        return kd(
            "train", "--from-cache", tiny_cache, "--student", tiny_model, "--output-dir", out, *arguments, **options
        )

    return run


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_kd_leaves_a_folder_that_transformers_loads_with_the_best_checkpoint(train, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = json.loads(train(tmp_path / "run", "--eval-steps", 4, "--json").stdout)
    assert [s for s, _ in history(tmp_path / "run", "step", "eval_kl")] == [4, 6], "the last step is measured too"
    kls = [kl for _, kl in history(tmp_path / "run", "step", "eval_kl")]
    assert len(kls) >= 2 and result["best_metric"] == min(kls) < kls[0]
    assert len(history(tmp_path / "run", "loss", "kl", "ce")) == 6
    record = json.loads((tmp_path / "run/kdcache.json").read_text())
    assert record["finished"] and len(record["caches"][0]["fingerprint"]) == 32 and record["config"]["alpha"] == 0.5
    AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sum(p.numel() for p in model.parameters()) > 1e6
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "TensorBoard"


def test_sft_ignores_the_teacher_and_kd_does_not(train, tmp_path):
    train(tmp_path / "sft", "--method", "sft")
    train(tmp_path / "kd0", "--alpha", 0)
    train(tmp_path / "kd1", "--alpha", 1)
    assert [x for (x,) in history(tmp_path / "sft", "loss")] == [x for (x,) in history(tmp_path / "kd0", "loss")]
    assert [x for (x,) in history(tmp_path / "sft", "loss")] != [x for (x,) in history(tmp_path / "kd1", "loss")]
    for kl, loss in history(tmp_path / "kd1", "kl", "loss"):
        assert kl == pytest.approx(loss, abs=2e-3)


def test_killed_and_resumed_gives_the_losses_and_weights_of_an_uninterrupted_run(
    train, tmp_path, tiny_cache, tiny_model
):
    more = ("--gradient-accumulation-steps", 2, "--max-steps", 10, "--eval-steps", 3)
    train(tmp_path / "whole", *more)
    command = [sys.executable, "-c", INTERRUPTED, "train", "--from-cache", tiny_cache, "--student", tiny_model]
    command += ["--output-dir", tmp_path / "cut", *SMALL, *more]
    killed = subprocess.run([*map(str, command)], cwd=ROOT, env=os.environ | {"KILL_AFTER": "8"}, capture_output=True)
    assert killed.returncode == -9 and (tmp_path / "cut/checkpoint-6").is_dir(), killed.stderr.decode()
    done = train(tmp_path / "cut", *more)
    assert "checkpoint-6" in done.stderr
    assert history(tmp_path / "cut", "step", "loss") == history(tmp_path / "whole", "step", "loss")
    assert history(tmp_path / "cut", "step", "tokens") == history(tmp_path / "whole", "step", "tokens")
    seconds = [taken for (taken,) in history(tmp_path / "cut", "seconds")]
    assert seconds == sorted(seconds) and seconds[-1] > 0, "an interruption does not set the clock back"
    assert history(tmp_path / "cut", "step", "eval_kl") == history(tmp_path / "whole", "step", "eval_kl")
    assert history(tmp_path / "cut", "step", "epoch")[-1] == history(tmp_path / "whole", "step", "epoch")[-1]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_packed_samples_and_samples_alone_make_the_same_steps(train, tmp_path):
    train(tmp_path / "packed", "--per-device-train-batch-size", 8)
    train(tmp_path / "alone", "--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 8)
    packed = [x for (x,) in history(tmp_path / "packed", "loss")]
    assert [x for (x,) in history(tmp_path / "alone", "loss")] == pytest.approx(packed, rel=2e-4)


def test_divergences_are_trained_and_kl_is_measured(train, tmp_path):
    train(tmp_path / "run", "--divergence", "skewed_kl:0.2", "--alpha", 1)
    for divergence, loss in history(tmp_path / "run", "divergence", "loss"):
        assert divergence == pytest.approx(loss, abs=2e-3)
    assert history(tmp_path / "run", "eval_kl") and "skewed_kl:0.2" in (tmp_path / "run/README.md").read_text()


def test_a_divergence_that_a_threshold_cache_would_bias_is_refused(kd, tiny_model, rows_file, tmp_path):
    from helpers import capture_plan
    from kdcache.capture import run as capture

    capture.run(capture_plan(tiny_model, rows_file, tmp_path / "drawn", sparsify="threshold:0.1"))
    command = ("train", "--from-cache", tmp_path / "drawn", "--student", tiny_model, "--output-dir", tmp_path / "x")
    assert "linear in the teacher" in kd(*command, "--divergence", "jsd", code=2).stderr
    assert "unknown; known: forward_kl" in kd(*command, "--divergence", "kl", code=2).stderr
    kd(*command, "--dry-run")


def test_the_run_file_repeats_a_run_and_flags_win(train, kd, tmp_path):
    train(tmp_path / "first")
    again = ("train", "--config", tmp_path / "first/run.yaml", "--output-dir")
    kd(*again, tmp_path / "second")
    assert history(tmp_path / "second", "loss") == history(tmp_path / "first", "loss")
    facts = json.loads(kd(*again, tmp_path / "third", "--alpha", 0.25, "--max-steps", 3, "--dry-run", "--json").stdout)
    assert (facts["alpha"], facts["max_steps"], facts["samples_per_step"]) == (0.25, 3, 4)


@pytest.mark.parametrize(
    "text, says",
    [
        ("lern_rate: 1", "did you mean --learning-rate?"),
        ("alfa: 0.1", "did you mean --alpha?"),
        ("warmup_ratio: 0.1", "it is now --warmup-steps"),
        ("evaluation-strategy: steps", "it is now --eval-strategy"),
        ("- a list", "expected a mapping"),
        ("a: [", "not YAML"),
        ("alpha: much", "--alpha"),
    ],
)
def test_a_wrong_config_is_refused_with_the_name_that_was_meant(train, tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    assert says in train(tmp_path / "run", "--config", tmp_path / "bad.yaml", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_estimates_memory(train, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = json.loads(train(tmp_path / "x", "--dry-run", "--json").stdout)
    adapted = json.loads(train(tmp_path / "x", "--dry-run", "--json", "--lora-r", 4).stdout)
    parameters = AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()  # tied ones once
    assert whole["trained_parameters"] == whole["parameters"] == parameters > 100 * adapted["trained_parameters"]
    assert whole["memory_mb"]["optimizer"] == pytest.approx(whole["parameters"] * 8 / 1e6, abs=1)
    assert "optimizer" not in adapted["memory_mb"] or adapted["memory_mb"]["optimizer"] < 1
    assert whole["eta_at_least"].count(":") == 2


def test_an_interrupted_run_with_other_settings_and_a_finished_one_are_refused(train, tmp_path):
    train(tmp_path / "run")
    assert "finished run" in train(tmp_path / "run", code=1).stderr
    record = tmp_path / "run/kdcache.json"
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    refused = train(tmp_path / "run", "--alpha", 0.9, code=1).stderr
    assert "alpha: 0.5 -> 0.9" in refused and "--overwrite" in refused
    train(tmp_path / "run", "--alpha", 0.9, "--overwrite")


def test_overwrite_spares_a_folder_that_holds_no_run(train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "holds no run" in train(tmp_path / "mine", "--overwrite", code=1).stderr
    assert (tmp_path / "mine/notes.txt").exists()


def test_where_chooses_the_samples_and_dry_run_counts_them(train, tmp_path):
    everything = json.loads(train(tmp_path / "x", "--dry-run", "--json").stdout)
    given = json.loads(train(tmp_path / "x", "--dry-run", "--json", "--where", "origin = 'given'").stdout)
    assert given["train_samples"] * 2 == everything["train_samples"] and not (tmp_path / "x").exists()
    assert "no sample to train on" in train(tmp_path / "x", "--where", "false", code=1).stderr


def test_early_stopping_stops(train, tmp_path):
    out = tmp_path / "run"
    train(out, "--learning-rate", 0, "--max-steps", 40, "--eval-steps", 1, "--early-stopping-patience", 2)
    assert history(out, "step", "eval_kl")[-1][0] == 3


def test_a_student_with_another_tokenizer_is_refused_before_the_first_step(kd, tiny_cache, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), bos_token="<s>", eos_token="</s>"
    )
    sizes = {
        "vocab_size": 4,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    done = kd(
        "train", "--from-cache", tiny_cache, "--student", tmp_path / "other", "--output-dir", tmp_path / "x", code=1
    )
    assert "another tokenizer" in done.stderr and not (tmp_path / "x").exists()


BLOCKED = """
import sys, importlib, pkgutil
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vllm" or name.startswith("kdcache.teachers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import trainer
for module in pkgutil.walk_packages(trainer.__path__, "trainer."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_of_trainer_imports_without_vllm_and_without_the_teachers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"trainer.distill.trainer", "trainer.loss.reference", "trainer.data.stream", "trainer.evaluate.run"} <= set(
        done.stdout.split()
    )


def test_nothing_in_kdcache_imports_the_trainer():
    for path in (ROOT / "kdcache").rglob("*.py"):
        text = path.read_text()
        assert "import trainer" not in text and "from trainer" not in text, path


def test_report_to_none_writes_no_events_and_a_student_inside_the_run_is_not_deleted(train, kd, tiny_cache, tmp_path):
    train(tmp_path / "run", "--report-to", "none", "--max-steps", 2)
    assert not list((tmp_path / "run").rglob("events.out.tfevents.*"))
    common = ("train", "--from-cache", tiny_cache, "--student", tmp_path / "run", "--output-dir", tmp_path / "run")
    assert "which is read" in kd(*common, "--overwrite", code=2).stderr
    assert (tmp_path / "run/model.safetensors").exists()


def test_a_recipe_runs_its_steps_and_resumes_where_it_stopped(tiny_cache, tiny_model, tmp_path):
    from kdcache.commands import recipes as recipe
    from kdcache.errors import KDError

    path = tmp_path / "small.yaml"
    train = f"kd train --from-cache {tiny_cache} --student {{out}}/student --output-dir {{out}}/run --max-steps"
    steps = f"""
steps:
  - name: a student
    run: kd init-student --from {tiny_model} --keep-layers 1 --out {{out}}/student
    makes: "{{out}}/student/config.json"
  - name: training
    run: {train} NUMBER
end: look at {{out}}
"""
    path.write_text(steps.replace("NUMBER", "many"))
    notes: list[str] = []
    with pytest.raises(KDError, match=r"step 2 of 2 \(training\) failed with exit code 2"):
        recipe.run(str(path), tmp_path / "out", notes.append)
    path.write_text(steps.replace("NUMBER", "2"))
    recipe.run(str(path), tmp_path / "out", notes.append)
    assert "(done before)" in notes and notes[-1].startswith(f"\nlook at {tmp_path}/out")
    assert (tmp_path / "out/run/model.safetensors").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cache(tmp_path):
    script = ROOT / "benchmarks/memory.py"
    command = [sys.executable, script, "--gigabytes", "0.2", "0.4", "--steps", "400", "--results", tmp_path]
    subprocess.run([*map(str, command)], check=True, cwd=ROOT)
    assert json.loads((tmp_path / "memory.json").read_text())["difference_bytes"] < 50e6
