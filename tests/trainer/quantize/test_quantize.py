"""kd quantize on a small real model: what is saved loads anywhere, is as small as estimated, and is measured as it is."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from kdcache.errors import KDError
from kdcache.storage import folders
from trainer.distill import plan as run
from trainer.distill.config import TrainConfig
from trainer.evaluate import compare
from trainer.evaluate.bootstrap import Estimate
from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.run import evaluate
from trainer.quantize import footprint, measure, quantize
from trainer.quantize.config import QuantizeConfig
from trainer.quantize.measure import Change
from trainer.student import chat, generate
from trainer.student.load import quantized_by


@pytest.fixture(scope="module")
def student(smollm, tmp_path_factory) -> str:
    """Random, and wide enough that its linear layers weigh something beside its embeddings."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 49152, "hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("wide") / "student"
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **ids)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder)
    (folder / "README.md").write_text("# A student's card\n")
    return str(folder)


def made(student, out, **options) -> None:
    quantize.quantize(quantize.prepare(QuantizeConfig(student, out, **options)))


@pytest.fixture(scope="module")
def nf4(student, tmp_path_factory):
    """Quantized, and not measured."""
    out = tmp_path_factory.mktemp("quantized") / "nf4"
    made(student, out, measure=False)
    return out


def assert_loads_and_speaks(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Say it twice.", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    return model


def assert_evaluates(folder, cache, out):
    """Teacher-forced and answering, as kd evaluate does."""
    evaluate(EvaluateConfig((("m", str(folder)),), (cache,), out, generate=1, max_new_tokens=2))
    values = {row.metric: row.value.value for row in compare.rows([out]) if row.label == "m"}
    assert values["kl"] > 0 and "rougeL" in values


@pytest.mark.parametrize("name", list(quantize.FORMATS))
def test_a_quantized_student_loads_as_it_is_and_is_as_small_as_estimated(student, tiny_cache, tmp_path, name):
    out = tmp_path / name
    quantization = quantize.prepare(QuantizeConfig(student, out, name, (tiny_cache,), measure=False))
    quantize.quantize(quantization)
    size = (out / "model.safetensors").stat().st_size
    assert size == pytest.approx(quantization.sizes["weights_bytes_quantized"], rel=0.02)
    assert size < 0.9 * quantization.sizes["weights_bytes"]
    assert_evaluates(out, tiny_cache, tmp_path / "evaluation")
    assert assert_loads_and_speaks(out).get_input_embeddings().weight.dtype == torch.float32
    card = (out / "README.md").read_text()
    assert card.startswith("# A student's card") and quantize.FORMATS[name] in card
    assert folders.foreign(out, folders.QUANTIZED) is None, "--overwrite must be able to delete every file"


def test_the_command_measures_both_and_says_what_it_costs(kd, student, nf4, tiny_cache):
    command = ("quantize", student, "--out", nf4, "--from-cache", tiny_cache, "--rounds", 1)
    saved = (nf4 / "model.safetensors").stat().st_mtime_ns
    done = kd(*command, "--json")
    assert (nf4 / "model.safetensors").stat().st_mtime_ns == saved  # saved before, and only measured now
    record = json.loads(done.stdout)
    assert json.loads((nf4 / "quantization.json").read_text()) == record
    rows = {row["metric"]: row for row in record["measured"]["rows"]}
    assert rows["disk"]["ratio"] == pytest.approx(
        (nf4 / "model.safetensors").stat().st_size / 1e6 / rows["disk"]["before"]
    )
    assert rows["weights in memory"]["ratio"] == pytest.approx(rows["disk"]["ratio"], rel=0.02)
    assert all(rows[name][side] > 0 for name in footprint.UNITS for side in ("before", "after"))
    low, high = rows["kl"]["interval"]
    difference = rows["kl"]["after"] - rows["kl"]["before"]
    assert low <= difference <= high and rows["kl"]["difference"] == pytest.approx(difference)
    assert {"agreement", "ce", "rougeL"} <= set(rows)
    verdict = record["measured"]["verdict"]
    assert "times smaller)" in verdict and "KL to the teacher goes from" in verdict
    lines = list(csv.DictReader((nf4 / "quantization.csv").read_text().splitlines()))
    assert [line["metric"] for line in lines] == list(rows)
    assert json.loads((nf4 / "evaluation" / "evaluation.json").read_text())["settings"]["engine"] == "transformers"
    assert compare.rows([nf4 / "evaluation"], against="before")  # kd compare's
    assert folders.foreign(nf4, folders.QUANTIZED) is None
    with pytest.raises(KDError, match="not empty"):
        made(student, nf4)


def test_without_a_cache_the_verdict_says_that_quality_was_not_measured():
    footprints = [Change(name, "", 2.0, 1.0, ratio=Estimate(0.5)) for name in footprint.UNITS]
    verdict = measure.verdict(footprints, "a machine")
    assert "2 to 1 MB (2.00 times smaller)" in verdict
    assert "answers at 0.5 times the speed" in verdict and "needs --from-cache" in verdict
    worse, unsure = (
        Change("kl", "", 1.0, 1.1, difference=Estimate(0.1, interval)) for interval in ((0.05, 0.2), (-0.1, 0.2))
    )
    assert measure.verdict([*footprints, worse], "").endswith("a difference of 0.1 (0.05 to 0.2).")
    assert "cannot tell" in measure.verdict([*footprints, unsure], "")


def test_a_quantized_student_is_measured_and_talked_to_like_any_other_but_not_trained(
    nf4, student, tiny_cache, tmp_path
):
    assert quantized_by(str(nf4)) == "bitsandbytes" and quantized_by(student) is None
    assert generate.resolve("auto", [student, str(nf4)]) == "transformers"
    with pytest.raises(KDError, match="vLLM does not read; use transformers"):
        generate.resolve("vllm", [str(nf4)])
    assert isinstance("".join(chat.Conversation(str(nf4), None, 0.0, 3).answer("Hello")), str)
    with pytest.raises(KDError, match="is quantized, and such weights cannot be trained"):
        run.prepare(TrainConfig((tiny_cache,), str(nf4), tmp_path / "run"))


def test_wrong_use_is_one_clear_sentence(student, nf4, tmp_path):
    inside = f"{student}/nf4"
    for out, options, message in (
        (tmp_path / "o", {"format": "q4"}, "expected one of nf4, int8, w4a16"),
        (tmp_path / "o", {"format": "w4a16"}, "name a cache with --from-cache"),
        (student, {"overwrite": True}, "separate folders"),
        (os.path.dirname(student), {"overwrite": True}, "separate folders"),
        (inside, {}, "separate folders"),
        (nf4, {"format": "int8"}, "not empty"),
        (ROOT / "docs", {"overwrite": True}, "holds no quantized student"),
    ):
        with pytest.raises(KDError, match=message):
            made(student, type(tmp_path)(out), **options)
    with pytest.raises(KDError, match="quantized already"):
        made(str(nf4), tmp_path / "again")
    assert not (tmp_path / "o").exists() and not (tmp_path / "again").exists()


def test_killed_while_it_saves_it_leaves_nothing_that_loads_and_no_obstacle(student, tmp_path):
    killed = f"""
import os
from pathlib import Path
from trainer.quantize import quantize
from trainer.quantize.config import QuantizeConfig
quantize._card = lambda quantization: os.kill(os.getpid(), 9)
quantize.quantize(quantize.prepare(QuantizeConfig({student!r}, Path("out"), measure=False)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == -9 and not list((tmp_path / "out").glob("[!.]*"))
    assert any((tmp_path / "out").glob(".kdcache/new/model.safetensors"))  # it was killed while it saved
    made(student, tmp_path / "out", measure=False)
    assert (tmp_path / "out/config.json").is_file() and not list((tmp_path / "out").glob(".*"))
