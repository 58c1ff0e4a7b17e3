"""A packed sample is computed as it is alone, whatever its student's layers are made of."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kdcache.cache.candidates import Candidates
from kdcache.cache.reader import Sample
from trainer.data.pack import pack
from trainer.distill.trainer import attach_loss, losses_of
from trainer.evaluate.forced import at_positions
from trainer.loss.head import head_of
from trainer.student import attention
from trainer.student.attention import ONE_BY_ONE, PADDED, PER_SAMPLE, Layers, layers_of

VOCABULARY = 97
WINDOW = 6
LENGTHS = (25, 3, 40, 11)  # most are longer than the window

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
#: The settings of each family, and how its samples are kept apart.
FAMILIES = {
    "llama": ({}, PER_SAMPLE),
    "qwen2": ({"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, PER_SAMPLE),
    "qwen3": ({}, PER_SAMPLE),
    "mistral": ({"sliding_window": WINDOW}, PER_SAMPLE),
    "gemma2": ({**SLIDING, "attn_logit_softcapping": 2.0}, PER_SAMPLE),
    "gemma3_text": (SLIDING, PER_SAMPLE),
    "gpt_oss": ({**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}, PER_SAMPLE),
    "qwen3_next": (LINEAR | EXPERTS, PADDED),
    "qwen3_5_text": (LINEAR, PADDED),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, PADDED),
    "mamba": ({"state_size": 8}, PADDED),
    "bloom": ({"n_head": 4, "n_layer": 3}, PADDED),
}


def student_of(family, **settings):
    """Return a tiny random float32 student, with weights so large that a neighbour would be noticed."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | FAMILIES[family][0] | settings))
    for parameter in student.float().parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return student.eval()


@pytest.fixture(scope="module")
def samples():
    """Return samples of LENGTHS with two candidates at each position of their completions."""
    generator, made = np.random.default_rng(0), []
    for number, length in enumerate(LENGTHS):
        ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        positions = length - length // 3
        logprobs = np.log(np.tile([0.6, 0.3], positions)).astype(np.float32)
        tails = np.full(positions, np.log(0.1), np.float32)
        candidates = np.stack([generator.permutation(VOCABULARY)[:2] for _ in range(positions)]).ravel()
        stored = Candidates(candidates.astype(np.int32), logprobs, np.full(positions, 2, np.int32), tails)
        made.append(Sample(str(number), ids[:-positions], ids[-positions:], np.ones(positions, bool), stored))
    return made


def losses_and_gradients(student, samples):
    """Return the losses of the supervised tokens of samples in one row, and the gradients of all weights."""
    layers, head = layers_of(student), head_of(student)
    student.zero_grad()
    losses = losses_of(layers, head, pack(samples, VOCABULARY), 0.5, "forward_kl")
    losses.loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return torch.stack([losses.ce, losses.divergence]), gradients


def as_alone(student, samples):
    """Return the same of each sample by itself, with the student's own attention: losses in order, gradients summed."""
    student = copy.deepcopy(student)
    student.set_attn_implementation("eager" if student._can_set_attn_implementation() else None)
    head, losses = head_of(student), []
    student.zero_grad()
    for sample in samples:
        own = losses_of(Layers(student, ONE_BY_ONE), head, pack([sample], VOCABULARY), 0.5, "forward_kl")
        own.loss.backward()
        losses.append(torch.stack([own.ce, own.divergence]))
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return torch.cat(losses, dim=1), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_sample_is_trained_as_alone(family, samples):
    student = student_of(family)
    expected, expected_gradients = as_alone(student, samples)
    losses, gradients = losses_and_gradients(student, samples)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_sample_is_evaluated_as_alone_in_the_fastest_way(family, samples):
    student = student_of(family)
    layers, head = layers_of(student), head_of(student)
    assert layers.way == FAMILIES[family][1]
    together = at_positions(layers, head, samples, None)
    alone = [at_positions(layers, head, [sample], None) for sample in samples]
    for name in ("kl", "logprobs", "cells", "confidence"):
        expected = np.concatenate([getattr(readings, name) for readings in alone])
        np.testing.assert_allclose(getattr(together, name), expected, rtol=0, atol=1e-4)


def test_under_gradient_checkpointing_a_packed_sample_is_trained_as_alone(samples):
    student = student_of("llama").train()
    expected, expected_gradients = as_alone(student, samples)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    losses, gradients = losses_and_gradients(student, samples)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-3)


def test_layers_that_are_compiled_train_a_packed_sample_as_alone(samples):
    student = student_of("mistral")
    expected, expected_gradients = as_alone(student, samples)
    student.base_model.compile(dynamic=True, backend="aot_eager")
    losses, gradients = losses_and_gradients(student, samples)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", attention.WAYS)
def test_each_way_gives_the_same_hidden_states(way, monkeypatch):
    student = student_of("mistral")
    row, offsets = attention._probe(student)
    expected = Layers(student, ONE_BY_ONE)(row, offsets)
    if way == PER_SAMPLE:
        student.set_attn_implementation(attention.IMPLEMENTATION)
    torch.testing.assert_close(Layers(student, way)(row, offsets), expected, rtol=0, atol=1e-4)


def test_the_probe_notices_a_sample_that_sees_its_neighbour():
    student = student_of("lfm2")
    expected = attention._alone(student, student.config._attn_implementation)
    assert [attention._is_apart(Layers(student, way), expected) for way in attention.WAYS] == [False, False, True, True]


def test_a_row_without_samples_has_hidden_states_in_every_way():
    batch = pack([], VOCABULARY)
    for family in ("llama", "lfm2"):
        assert layers_of(student_of(family))(batch["input_ids"], batch["offsets"]).shape == (1, SHAPE["hidden_size"])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_a_student_generates_and_reads_padded_batches_as_before(family):
    student = student_of(family)
    student.set_attn_implementation("eager")
    ids = torch.randint(3, VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0  # padding before the prompt, as for generation

    def computed():
        answers = student.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        with torch.no_grad():
            return answers, student(ids, attention_mask=mask).logits[mask.bool()], student(ids).logits

    expected = computed()
    assert layers_of(student).way == PER_SAMPLE
    answers, *logits = computed()
    assert torch.equal(answers, expected[0])
    torch.testing.assert_close(logits, list(expected[1:]), rtol=0, atol=1e-4)


def test_chunks_of_attention_are_left_to_a_mask():
    config = CONFIG_MAPPING["llama"](**SHAPE)
    config._attn_implementation, config.attention_chunk_size = attention.IMPLEMENTATION, WINDOW
    from transformers.masking_utils import create_chunked_causal_mask

    mask = create_chunked_causal_mask(config, torch.zeros(1, 14, 32), None, None, torch.arange(14)[None])
    visible = [
        (query >= key) and query // WINDOW == key // WINDOW for query, key in itertools.product(range(14), repeat=2)
    ]
    assert mask.flatten().tolist() == visible


def test_a_saved_student_does_not_name_this_attention(tmp_path, tiny_model):
    student = AutoModelForCausalLM.from_pretrained(tiny_model)
    attach_loss(student, 0.5)
    student.save_pretrained(tmp_path)
    assert attention.IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    prompt = AutoTokenizer.from_pretrained(tiny_model)("Say the number", return_tensors="pt")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config._attn_implementation == "sdpa"
    assert saved.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]


@pytest.fixture(scope="module")
def convolutional(tiny_model, tmp_path_factory):
    """Make a student whose convolutions would see the sample before."""
    settings = FAMILIES["lfm2"][0] | {"vocab_size": 49152, "max_position_embeddings": 512}
    folder = tmp_path_factory.mktemp("models") / "lfm2"
    student_of("lfm2", **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def test_a_run_says_and_records_how_samples_are_kept_apart(kd, tiny_cache, tiny_model, convolutional, tmp_path):
    for student, way in ((tiny_model, PER_SAMPLE), (convolutional, PADDED)):
        out = tmp_path / way
        run = kd(
            *("train", "--from-cache", tiny_cache, "--student", student, "--output-dir", out),
            *("--max-steps", 1, "--report-to", "none"),
        )
        assert run.stderr.count(f"packing: {attention.NOTES[way]}") == 1
        assert json.loads((out / "kdcache.json").read_text())["packing"] == way


def test_an_evaluation_is_the_same_for_any_batch_size(kd, tiny_cache, tiny_model, convolutional, tmp_path):
    figures = []
    for size in (1, 7):
        run = kd(
            *(
                "evaluate",
                f"llama={tiny_model}",
                f"lfm2={convolutional}",
                "--from-cache",
                tiny_cache,
                "--split",
                "train",
            ),
            *("--generate", 0, "--batch-size", size, "--out", tmp_path / str(size), "--json"),
        )
        assert run.stderr.count("packing: ") == 1 and f"lfm2: packing: {attention.NOTES[PADDED]}" in run.stderr
        figures.append({(row["label"], row["metric"]): row["value"] for row in json.loads(run.stdout)})
    assert figures[0] == pytest.approx(figures[1], rel=0, abs=1e-4)
