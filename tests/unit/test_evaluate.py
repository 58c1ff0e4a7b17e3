"""kd evaluate, kd init-student and kd chat through the real command."""

import json

import pytest
import torch

from trainer.evaluate import WordTokenizer, rouge_l
from trainer.student import parse_layers


def test_the_teachers_own_weights_have_no_kl_and_agree(kd, tiny_cache, tiny_model):
    teacher, student = json.loads(kd("evaluate", tiny_model, "--from-cache", tiny_cache, "--json").stdout)
    assert teacher["model"] == "teacher (cache)" and teacher["agreement"] == 1
    assert student["kl"] < 2e-3 and student["agreement"] > 0.97  # rounding of the codebook; ties
    assert student["ce"] == pytest.approx(teacher["ce"], abs=2e-3)
    assert student["perplexity"] == pytest.approx(teacher["perplexity"], rel=5e-3)
    assert student["samples"] == teacher["samples"] and student["generated"] * 2 == student["samples"]


def test_students_stand_side_by_side_in_the_order_given(kd, tiny_cache, tiny_model, tmp_path):
    kd("init-student", "--from", tiny_model, "--keep-layers", 1, "--out", tmp_path / "half")
    done = kd(
        "evaluate",
        tiny_model,
        tmp_path / "half",
        "--from-cache",
        tiny_cache,
        "--generate",
        2,
        "--out",
        tmp_path / "e.json",
    )
    lines = done.stdout.splitlines()
    assert lines[0].split()[:4] == ["model", "kl", "agreement", "ce"] and len(lines) == 5
    _, whole, half = json.loads((tmp_path / "e.json").read_text())
    assert half["model"].endswith("half") and half["kl"] > whole["kl"] and half["generated"] == 2


def test_a_student_from_the_teachers_layers_computes_with_those_layers(kd, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    facts = json.loads(
        kd("init-student", "--from", tiny_model, "--keep-layers", "1", "--out", tmp_path / "s", "--json").stdout
    )
    assert facts["kept"] == "0" and facts["layers"] == "1 of 2"
    whole, cut = AutoModelForCausalLM.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    whole.model.layers = whole.model.layers[:1]
    ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(cut(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    assert "not empty" in kd("init-student", "--from", tiny_model, "--out", tmp_path / "s", code=1).stderr


def test_parse_layers():
    assert parse_layers("3", 30) == [0, 14, 29] and parse_layers("30", 30) == list(range(30))
    assert parse_layers("0-2,5,7-8", 9) == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("spec", ["0", "31", "3-40", "a", "5-2"])
def test_wrong_layers_are_a_usage_error(kd, smollm, tmp_path, spec):
    if spec != "a":  # one through the command is enough
        from kdcache.errors import UsageError

        with pytest.raises(UsageError):
            parse_layers(spec, 30)
    else:
        assert (
            "--keep-layers a"
            in kd("init-student", "--from", smollm, "--keep-layers", "a", "--out", tmp_path / "s", code=2).stderr
        )


def test_rouge_counts_accents_as_letters():
    assert WordTokenizer().tokenize("¿Dónde está el niño?") == ["dónde", "está", "el", "niño"]
    assert rouge_l(["el niño come"], ["el niño come"]) == 1
    assert rouge_l(["el nino come"], ["el niño come"]) == pytest.approx(2 / 3)
    assert rouge_l([None], ["x"]) is None


def test_chat_answers_a_line(kd, tiny_model):
    done = kd("chat", tiny_model, "--max-new-tokens", 5, input="Hello\n")
    assert done.stdout.endswith("\n")
