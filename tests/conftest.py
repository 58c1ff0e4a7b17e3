"""A real tokenizer, a tiny real model, and a small real cache of it. Nothing is mocked."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest

from helpers import Kd, capture_plan, run_kd
from kdcache.capture import run as capture
from kdcache.judge.sandbox import Sandbox
from kdcache.models import embedded

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait waste a shared machine
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes side by side
    os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell ignores it for background jobs, and every `kd` would inherit that


@pytest.fixture(scope="session")
def smollm() -> str:
    """SmolLM2-135M-Instruct, prepared once."""
    return str(embedded.prepare())


@pytest.fixture(scope="session")
def tiny_model(smollm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama with SmolLM2's tokenizer: real code paths in milliseconds."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.6,
        },
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 short rows in four tasks, one of them without a prompt."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(40):
            row = {
                "id": f"r{i}",
                "prompt": f"Say the number {i} twice.",
                "completion": f"{i}, {i} 🙂 ¡año!",
                "task": f"t{i % 4}",
            }
            if i == 17:
                row["prompt"] = None
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_cache(tiny_model: str, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache: 39 given and 39 sampled completions, and one rejected row. Tests must not change it."""
    out = tmp_path_factory.mktemp("caches") / "tiny"
    capture.run(capture_plan(tiny_model, rows_file, out))
    return out


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    """The sandbox. Without bubblewrap, each test that uses it fails and says why."""
    checked = Sandbox()
    checked.check()
    return checked


@pytest.fixture
def kd(tmp_path: Path) -> Kd:
    """``run_kd`` in an empty folder."""
    return functools.partial(run_kd, tmp_path)
