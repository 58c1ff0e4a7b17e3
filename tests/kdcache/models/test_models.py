"""A model's own code runs only with --trust-remote-code, in every command and whatever stdin answers."""

import ast
import contextlib
import io
import json
import shutil

import pytest
from transformers import AutoConfig

from helpers import ROOT, capture_plan
from kdcache import models
from kdcache.errors import KDError
from kdcache.teachers import EngineOptions
from kdcache.teachers.vllm import _arguments
from trainer.quantize import quantize
from trainer.quantize.config import QuantizeConfig
from trainer.student import make
from trainer.student.chat import Conversation

#: The code in a model's folder: it creates a file, and otherwise equals the class that it derives from.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({ran!r}).touch()
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(params=["of its own kind", "of a kind that transformers has"])
def with_code(request, tiny_model, tmp_path, monkeypatch):
    """A student with code of its own, and the file that this code creates. Every question on stdin is answered with "y"."""
    folder, ran = tmp_path / "student", tmp_path / "ran"
    shutil.copytree(tiny_model, folder)
    kind = "llama" if request.param.endswith("has") else "stranger"
    (folder / "code.py").write_text(CODE.format(ran=str(ran), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": auto_map}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    classes = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | classes))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv(models.TRUST, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    return folder, ran


def load_all(folder):
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=models.code_is_trusted())
    models.config(folder), models.tokenizer(folder), models.causal_lm(folder), models.untrained(shape)


USES = {
    "load": load_all,
    "chat": lambda folder: Conversation(str(folder), None, 0.0, 4),
    "init-student": lambda folder: make.init_student(str(folder), folder.parent / "out"),
    "quantize": lambda folder: quantize.prepare(QuantizeConfig(str(folder), folder.parent / "nf4")),
}


@pytest.mark.parametrize("use", USES)
def test_a_models_code_does_not_run_by_default(with_code, use):
    folder, ran = with_code
    with contextlib.suppress(KDError, ValueError):  # a model that needs its code is refused
        USES[use](folder)
    assert not ran.exists()


def test_a_capture_does_not_run_the_teachers_code(with_code, rows_file, tmp_path):
    folder, ran = with_code
    with contextlib.suppress(KDError):
        capture_plan(str(folder), rows_file, tmp_path / "out")
    assert not ran.exists()


@pytest.mark.parametrize("with_code", ["of its own kind"], indirect=True)
@pytest.mark.parametrize("load", [models.config, models.tokenizer, models.causal_lm])
def test_the_refusal_names_the_option(with_code, load):
    with pytest.raises(KDError, match=r"comes with Python code of its own.*--trust-remote-code"):
        load(with_code[0])


@pytest.mark.parametrize("use", ["load", "init-student"])
def test_a_models_code_runs_if_it_is_trusted(with_code, use, monkeypatch):
    folder, ran = with_code
    monkeypatch.setenv(models.TRUST, "1")
    USES[use](folder)
    assert ran.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_vllm_receives_whether_code_is_trusted(trusted, monkeypatch):
    monkeypatch.setenv(models.TRUST, "1" if trusted else "")
    assert _arguments(EngineOptions("m", 8, 512, "float32"), on_cpu=True)["trust_remote_code"] is trusted


def test_a_config_file_cannot_set_trust_remote_code(kd, tmp_path, tiny_cache, tiny_model):
    (tmp_path / "run.yaml").write_text("trust_remote_code: true\n")
    options = ("--from-cache", tiny_cache, "--student", tiny_model, "--output-dir", "out", "--dry-run")
    process = kd("train", "--config", "run.yaml", *options, code=2)
    assert "trust_remote_code must be given on the command line" in process.stderr


LOADERS = {"from_pretrained", "from_config"}


def test_only_kdcache_models_loads_models():
    elsewhere = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [ROOT / "cli.py", *(ROOT / "kdcache").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]
        if path != ROOT / "kdcache/models/__init__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in LOADERS
    ]
    assert elsewhere == []
