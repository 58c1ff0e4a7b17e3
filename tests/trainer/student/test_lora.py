"""QLoRA: what is measured between two steps changes nothing about the next."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer.loss.head import head_of
from trainer.student import lora as adapters
from trainer.student.attention import layers_of
from trainer.student.config import StudentConfig
from trainer.student.load import load_student

IDS = torch.arange(5, 37)[None]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> str:
    """The tiny model with matrices of 128 x 128: bitsandbytes quantizes blocks of 64 numbers."""
    shape = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64}
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("models") / "wide")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def gradients(model: str, measured_before: bool) -> dict[str, torch.Tensor]:
    config = StudentConfig((), model, Path("unused"), lora_r=4, load_in_4bit=True, dtype="bfloat16")
    torch.manual_seed(0)
    student, _ = load_student(model, "bfloat16", "nf4")
    if measured_before:  # as attach_loss does, before there is LoRA
        head_of(student), layers_of(student)
    student = adapters.add(student, config)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if measured_before:
        student.eval()
        with torch.no_grad():
            student(IDS)
    student.train()
    student(IDS, labels=IDS).loss.backward()
    return {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}


def test_a_measurement_between_two_steps_leaves_the_gradients_of_4_bit_layers(model):
    before, after = gradients(model, False), gradients(model, True)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
