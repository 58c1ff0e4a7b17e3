"""Given answers end in the mark that the template writes, whatever generation_config and tokenizer name; real SmolLM2."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdcache.cache import integrity, query
from kdcache.capture import fingerprint
from kdcache.capture import run as capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.resolve import resolve
from kdcache.prompts import template

pytestmark = pytest.mark.integration


def config(model: str, out: Path) -> CaptureConfig:
    return CaptureConfig(teacher=model, out=out, limit=6, engine="transformers", dtype="float32", sparsify="topk:4")


def captured(model: str, out: Path) -> dict[str, np.ndarray]:
    """Log-probabilities of the given answers' tokens, by sample."""
    capture.run(resolve(config(model, out)))
    _, rows = query.run(out, "SELECT sample_id, token_logprobs FROM samples")
    return {sample_id: np.array(logprobs) for sample_id, logprobs in rows}


@pytest.fixture(scope="module")
def right(smollm, tmp_path_factory):
    return captured(smollm, tmp_path_factory.mktemp("caches") / "right")


@pytest.fixture(scope="module")
def mended_cache(smollm, tmp_path_factory):
    """Of the same weights under a tokenizer and a generation_config that name <|endoftext|>, as after many fine-tunes."""
    folder = Path(shutil.copytree(smollm, tmp_path_factory.mktemp("models") / "fine-tuned"))
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": 0}))
    out = tmp_path_factory.mktemp("caches") / "mended"
    return out, captured(str(folder), out)


def test_the_cross_entropy_of_given_answers_is_that_under_the_right_tokenizer(right, mended_cache):
    _, mended = mended_cache
    mean = lambda by_sample: float(np.concatenate([by_sample[name] for name in sorted(by_sample)]).mean())  # noqa: E731
    assert mean(mended) == pytest.approx(mean(right), abs=0.01)


def test_the_teacher_expects_the_end_of_given_answers(mended_cache):
    _, mended = mended_cache
    assert np.median([logprobs[-1] for logprobs in mended.values()]) > -3


@pytest.mark.parametrize(
    "end, says", [(2, "nothing in it shows that this matters here"), (0, "hardly expects the end of given answers")]
)
def test_verify_says_of_an_old_cache_where_the_policy_matters(smollm, tmp_path, monkeypatch, end, says):
    probe = template.probe
    monkeypatch.setattr(fingerprint, "COMPLETION_POLICY_VERSION", 1)
    # 0: <|endoftext|>, as policy 1 took it from such a generation_config
    monkeypatch.setattr(template, "probe", lambda *arguments: replace(probe(*arguments), end_of_turn=end))
    capture.run(resolve(config(smollm, tmp_path / "old")))
    [note] = integrity.verify(tmp_path / "old").notes
    assert note.startswith("made under completion policy 1 (now 2)") and says in note
