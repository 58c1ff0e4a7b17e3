"""What a model is: its folder, and hashes of its weights and tokenizer for the fingerprint.

Files are hashed once and remembered by path, size and time (``KDCACHE_HOME/hashes.json``); files of the Hub's cache
already carry their sha256 in the name that they link to.
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
    """``embedded``, a folder, or a Hub id (downloaded to the Hub's own cache) -> a local folder."""
    if model == "embedded":
        return str(embedded.prepare())
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise UsageError(f"{model}: the folder holds no config.json, so it is no Hugging Face model")
        return model
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model}: no such folder; expected `embedded`, a model folder, or a Hub id like org/name")
    if importlib.util.find_spec("transformers") is None:  # which has the Hub's client with it
        raise extras.missing("transformers")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            model,
            revision=revision,
            ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*", "*.pth"],
        )
    except Exception as error:
        raise KDError(
            f"{model}: no such folder here, and it could not be had from the Hub: {first_line(error)}"
        ) from None


def read_json(folder: str, name: str) -> dict[str, Any]:
    """The object in a model folder's file; an empty one if there is no such file. KDError if it holds something else."""
    try:
        found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise KDError(f"{folder}/{name} is damaged, it is not JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise KDError(f"{folder}/{name} is damaged: expected a JSON object, found {type(found).__name__}")
    return found


def revision(folder: str) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other folder."""
    name = Path(folder).name
    return name if Path(folder).parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name) else None


def weight_files(folder: str) -> list[Path]:
    files = sorted(f for pattern in _WEIGHTS for f in Path(folder).glob(pattern))
    if not files:
        raise KDError(f"{folder}: no weights (*.safetensors) in it")
    return files


def weights_hash(folder: str) -> str:
    """One hash over all weight files of a model folder."""
    return of_json([[f.name, _sha256(f)] for f in weight_files(folder)])


def tokenizer_hash(folder: str) -> str:
    """One hash over the tokenizer's files and the chat template."""
    files = [Path(folder) / name for name in _TOKENIZER]
    return of_json([[f.name, _sha256(f)] for f in files if f.is_file()])


PROBE = "The quick brown fox: ¿cómo estás? año 2026\n\tdef f(x): return x**2  # 三 🙂"


#: What two tokenizers must share so that ids of one can be read by the other. Which ids are special may differ: a base
#: model and the instruct model made from it name other ends.
SAME_IDS = ("vocabulary", "encoding of a probe")


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Token -> id map, special ids and encoding of a probe; ``SAME_IDS`` of them are equal for the same tokenizer.

    Chat templates and file layouts may differ: a student saved by another library version is still the same.
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
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = storage.sha256(target)
        with contextlib.suppress(OSError):  # only a memo is lost
            store.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(store, known)
    return known[key]
