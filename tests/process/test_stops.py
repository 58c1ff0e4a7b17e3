"""A base student trained from an instruct teacher's cache learns to end its turns, in every program that opens its folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import capture_plan
from kdcache.capture import run as capture
from trainer.distill import plan as run
from trainer.distill import trainer as distill
from trainer.distill.config import TrainConfig
from trainer.student.chat import Conversation

QUESTION, ANSWER = "Is it dry in Lima?", "Yes, it is."
END, BASE_END = 2, 0  # <|im_end|> of the teacher's template, <|endoftext|> of the base student


@pytest.fixture(scope="module")
def teacher(tiny_model, tmp_path_factory) -> str:
    """The tiny model with attention heads of 64 dimensions, for which vLLM has a CPU kernel."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        tiny_model, hidden_size=64, head_dim=64, num_attention_heads=1, num_key_value_heads=1
    )
    folder = str(tmp_path_factory.mktemp("models") / "teacher")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(teacher, tmp_path_factory) -> Path:
    """The teacher's base model: no chat template, and another end of turn."""
    folder = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("models") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=BASE_END).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": BASE_END}))
    return folder


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    rows = [{"id": str(i), "prompt": QUESTION, "completion": ANSWER} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratios, keep = (1.0, 0.0, 0.0), "keep"
    plan = capture_plan(
        teacher,
        folder / "rows.jsonl",
        folder / "cache",
        mode="score",
        split_ratios=ratios,
        near_duplicates=keep,
    )
    capture.run(plan)
    return folder / "cache"


def trained(base, cache, out, steps, lora_r=None) -> str:
    arguments = {"max_steps": steps, "learning_rate": 2e-2, "report_to": "none", "save_strategy": "no"}
    config = TrainConfig((cache,), str(base), out, method="sft", lora_r=lora_r, arguments=arguments)
    distill.train(run.prepare(config), lambda *_: None)
    return str(out)


@pytest.fixture(scope="module")
def student(base, cache, tmp_path_factory) -> str:
    """A student that was trained until it knows the single answer of the cache."""
    return trained(base, cache, tmp_path_factory.mktemp("runs") / "student", 60)


def question_ids(folder: str) -> tuple[AutoTokenizer, list[int]]:
    """Return the folder's tokenizer, and the ids of the question as its chat template renders it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]


def test_it_stops_by_itself_in_transformers(student):
    tokenizer, ids = question_ids(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    assert tokenizer.decode(answer) == f"{ANSWER}<|im_end|>"


def test_it_stops_by_itself_in_kd_chat_with_the_same_text(student):
    assert "".join(Conversation(student, None, 0.0, 40).answer(QUESTION)) == ANSWER


@pytest.mark.parametrize("lora_r", [None, 2], ids=["full", "LoRA"])
def test_its_folder_names_the_ends_of_turn_and_holds_the_template(lora_r, base, cache, tmp_path):
    folder = Path(trained(base, cache, tmp_path / "student", 1, lora_r))
    config, tokenizer = (
        json.loads((folder / "generation_config.json").read_text()),
        AutoTokenizer.from_pretrained(folder),
    )
    assert set(config["eos_token_id"]) == {END, BASE_END} and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template == json.loads((cache / "plan.json").read_text())["chat_template"] is not None


@pytest.mark.slow
@pytest.mark.integration
def test_it_stops_by_itself_in_vllm_with_the_same_text(student):
    from kdcache.teachers.vllm import CPU_ENVIRONMENT

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_ENVIRONMENT.items():
            patch.setenv(name, value)
        import vllm

        engine = vllm.LLM(student, dtype="float32", enforce_eager=True, max_model_len=256)
        question = [{"role": "user", "content": QUESTION}]
        [output] = engine.chat(question, vllm.SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    assert output.outputs[0].text == ANSWER and output.outputs[0].finish_reason == "stop"
