"""Fingerprints never change: a cache, or half of one, stays usable after an update."""

import json
from dataclasses import fields

import pytest

from helpers import capture_plan
from kdcache.cache.format import fingerprint
from kdcache.capture import fingerprint as fingerprinted
from kdcache.examples.types import BadRow, Columns, Example
from kdcache.prompts.template import TemplateFacts
from kdcache.teachers import Sampling

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
EXACT = {"kind": "exact", "answer": "4"}
ROWS = [
    {"id": "sum", "prompt": "What is 2 + 2?", "completion": "4", "task": "sums", "verifier": json.dumps(EXACT)},
    {"id": "año", "prompt": "¿Qué año es?", "completion": "2026 🙂", "language": "es", "reference": "2026"},
    {"id": "empty", "prompt": None, "completion": "nothing"},
    {"id": "turns", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {
        "id": "tools",
        "messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No"}],
        "tools": [WEATHER],
        "group_id": "weather",
    },
]
CONFIGURATIONS = {
    "score": {"mode": "score", "sparsify": "threshold:0.02", "columns": Columns(system="Answer.")},
    "both": {
        "mode": "both",
        "samples": 2,
        "reasoning": True,
        "shuffle": True,
        "limit": 4,
        "sampling": Sampling(temperature=0.7, top_p=0.9, max_tokens=33),
        "engine_extra": {"quantization": "fp8", "max_num_seqs": 3},
    },
    "sample": {
        "mode": "sample",
        "prompt_format": "alpaca",
        "precision": "f32",
        "sparsify": "threshold:0.01",
        "capture_k": 64,
        "bos": "never",
        "seed": 7,
        "near_duplicates": "keep",
        "max_model_len": 99,
    },
}
FINGERPRINTS = {
    "score": "2a1e0231c7ca0a753d98695370c0b947",
    "both": "ea8f564b86b99f526faf131b58333613",
    "sample": "d173f9369d2de6f2bfb9b02147dc6d9f",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_has_the_fingerprint_that_it_always_had(tiny_model, tmp_path, name):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    plan = capture_plan(tiny_model, rows, tmp_path / "cache", **CONFIGURATIONS[name])
    of_this_machine = {"weights": "weights", "tokenizer": "tokenizer"}  # their files change with the library's version
    assert fingerprint(plan.fields | of_this_machine) == FINGERPRINTS[name]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Example, fingerprinted.FINGERPRINTED_EXAMPLE),
        (BadRow, fingerprinted.FINGERPRINTED_BAD_ROW),
        (Sampling, fingerprinted.FINGERPRINTED_SAMPLING),
        (TemplateFacts, fingerprinted.FINGERPRINTED_TEMPLATE),
    ],
)
def test_every_field_that_decides_a_number_is_in_the_fingerprint(kind, names):
    assert {field.name for field in fields(kind)} == set(names)
