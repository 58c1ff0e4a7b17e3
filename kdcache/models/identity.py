"""Identify a model: find its folder, and compute hashes of its weights and tokenizer for the fingerprint.

A file is hashed once; the hash is remembered by path, size and time of change (``KDCACHE_HOME/hashes.json``). Files in
the Hub's cache are links to files whose name is their sha256, and are not read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from kdcache import extras, storage
from kdcache.errors import KDError, UsageError, first_line
from kdcache.hashing import of_json
from kdcache.models import embedded
from kdcache.paths import home
from kdcache.storage import atomic

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "added_tokens.json"),
)


def model_folder(model: str, revision: str | None = None) -> str:
    """Return the local folder of ``embedded``, of a folder, or of a Hub id, which is downloaded to the Hub's cache."""
    if model == "embedded":
        return str(embedded.prepare())
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UsageError(f"{model}: the folder holds no config.json, so it is no Hugging Face model")
        return model
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model}: no such folder; expected `embedded`, a model folder, or a Hub id like org/name")
    if importlib.util.find_spec("transformers") is None:  # it installs the Hub's client
        raise extras.missing("transformers")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            model,
            revision=revision,
            ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*", "*.pth"],
        )
    except Exception as error:
        raise KDError(f"{model}: no such folder, and downloading it from the Hub failed: {first_line(error)}") from None


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder, {} if there is no such file. KDError if it is damaged."""
    try:
        content = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise KDError(f"{folder}/{name} is damaged, it is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise KDError(f"{folder}/{name} is damaged: expected a JSON object, found {type(content).__name__}")
    return content


def revision(folder: str) -> str | None:
    """Return the commit of a folder in the Hub's cache; None for any other folder."""
    name = Path(folder).name
    return name if Path(folder).parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name) else None


def weight_files(folder: str) -> list[Path]:
    """Return the files of a model's weights, sorted. KDError if there are none."""
    files = sorted(f for pattern in _WEIGHTS for f in Path(folder).glob(pattern))
    if not files:
        raise KDError(f"{folder}: no weights (*.safetensors) in it")
    return files


def weights_hash(folder: str) -> str:
    """Return one hash of all weight files of a model folder."""
    return of_json([[f.name, _sha256(f)] for f in weight_files(folder)])


def tokenizer_hash(folder: str) -> str:
    """Return one hash of the tokenizer's files and the chat template."""
    files = [Path(folder) / name for name in _TOKENIZER]
    return of_json([[f.name, _sha256(f)] for f in files if f.is_file()])


PROBE = "The quick brown fox: ¿cómo estás? año 2026\n\tdef f(x): return x**2  # 三 🙂"


#: The entries of ``tokenizer_identity`` that must be equal so that one tokenizer can read the other's ids. The special
#: ids may differ: a base model and an instruct model trained from it often end a text with different tokens.
SAME_IDS = ("vocabulary", "encoding of a probe")


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return hashes of a tokenizer's vocabulary and of its encoding of a probe, and its special ids.

    Chat templates and file layouts do not count: a student that another library version saved has the same tokenizer.
    """
    return {
        "vocabulary": of_json(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
        "special ids": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
        "encoding of a probe": of_json(tokenizer(PROBE, add_special_tokens=False)["input_ids"]),
    }


def _sha256(file: Path) -> str:
    target = file.resolve()
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    status = target.stat()
    key = f"{target}:{status.st_size}:{status.st_mtime_ns}"
    store = home() / "hashes.json"
    try:
        hashes = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        hashes = {}
    if key not in hashes:
        hashes[key] = storage.sha256(target)
        with contextlib.suppress(OSError):  # the file is then hashed again the next time
            store.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(store, hashes)
    return hashes[key]
