"""A student: from a checkpoint, or from the teacher's own layers; saved with its tokenizer as a Hugging Face folder.

kd init-student --from embedded --keep-layers 20 --out data/student
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__, models
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError
from kdcache.models import identity
from kdcache.prompts.vocabulary import ids_in
from kdcache.storage import atomic, folders


def init_student(base: str, out: Path, keep_layers: str | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Save a student made of ``base`` (all of it, or the layers named by ``keep_layers``) to ``out``."""
    with folders.held(out, folders.STUDENT):
        if overwrite:
            folders.check_deletable(out, folders.STUDENT, reads=[base])
        elif not folders.is_empty(out):
            raise KDError(f"--out {out} is not empty; use another, or --overwrite")
        model, tokenizer = load_student(base, "auto")
        depth = model.config.get_text_config().num_hidden_layers
        kept = list(range(depth))
        if keep_layers is not None:
            kept = parse_layers(keep_layers, depth)
            _keep(model, kept)
        with folders.whole(out, folders.STUDENT) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            made = {"kdcache": __version__, "from": base, "kept": kept, "of": depth}
            atomic.write_json(scratch / folders.STUDENT.marker, made)
    return {
        "student": str(out),
        "layers": f"{len(kept)} of {depth}",
        "kept": ",".join(map(str, kept)),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def parse_layers(spec: str, depth: int) -> list[int]:
    """``20``: that many, evenly spread, first and last kept. ``0-4,6,8-29``: just those, in order."""
    if spec.isdigit():
        count = int(spec)
        if not 1 <= count <= depth:
            raise UsageError(f"--keep-layers {spec}: the model has {depth} layers")
        return [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
    kept: set[int] = set()
    try:
        for part in spec.split(","):
            first, _, last = part.partition("-")
            kept.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise UsageError(f"--keep-layers {spec}: expected a number of layers, or layers like 0-4,6,8-29") from None
    if not kept or max(kept) >= depth:
        raise UsageError(f"--keep-layers {spec}: the model's layers are 0 to {depth - 1}")
    return sorted(kept)


def _keep(model: Any, kept: Sequence[int]) -> None:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise KDError(f"{type(model).__name__} keeps its layers in a place not known here; leave --keep-layers out")
    model.base_model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    for index, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def load_student(model: str, dtype: str, weights: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder, a Hub id or ``embedded``; KDError in a sentence if it cannot be had.

    ``weights``: nf4, fp4 or int8, quantized by bitsandbytes on this process's device, computing in ``dtype``; the head and
    the embeddings stay as they are. None: as they are in the folder, which may be quantized ones.
    """
    import transformers

    folder = identity.model_folder(model)
    tokenizer = models.tokenizer(folder)
    options: dict[str, Any] = {}
    if weights is not None:
        device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
        options["device_map"] = {"": device}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=weights != "int8",
            load_in_8bit=weights == "int8",
            bnb_4bit_quant_type="nf4" if weights == "int8" else weights,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif quantized_by(model) == "compressed-tensors":
        # It expands its weights at the first call anyway, but of the whole model only, and ours calls parts.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return models.causal_lm(folder, dtype=dtype, **options), tokenizer


def quantized_by(model: str) -> str | None:
    """The library that quantized a student's weights, as in bitsandbytes or compressed-tensors; None if they are not."""
    config = identity.read_json(identity.model_folder(model), "config.json").get("quantization_config")
    return config.get("quant_method") if isinstance(config, dict) else None


def stop_ids(student: Any, tokenizer: Any, of_cache: Sequence[int]) -> list[int]:
    """Every id that ends an answer, as in vLLM: the cache's, and what generation_config and tokenizer name."""
    return ids_in(list(of_cache), student.generation_config.eos_token_id, tokenizer.eos_token_id)


def cached_stop_ids(plan: dict[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer in a cache, its end-of-turn first; caches from before ``stop_ids`` name only that."""
    return tuple(plan.get("stop_ids") or [plan["end_of_turn"]])


def answer_as_cached(student: Any, tokenizer: Any, plan: dict[str, Any]) -> None:
    """Make a student answer as its cache was made: asked with that chat template, ended by those ids.

    Saved after this, its folder says so to transformers, vLLM and ``kd chat``, whatever it said before: a base model
    that is trained from an instruct teacher has no template, and another end.
    """
    ends = cached_stop_ids(plan)
    if plan.get("chat_template") is not None:
        tokenizer.chat_template = plan["chat_template"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    own = stop_ids(student, tokenizer, ends)
    student.generation_config.eos_token_id = own if len(own) > 1 else own[0]
    student.config.get_text_config().eos_token_id = ends[0]


def check_tokenizer(student: str, cache: Cache) -> None:
    """The student must read the very token ids that the cache holds. What ends an answer may differ: it is the cache's."""
    tokenizer = models.tokenizer(identity.model_folder(student))
    mine, theirs = identity.tokenizer_identity(tokenizer), cache.plan["tokenizer"]
    differing = [name for name in identity.SAME_IDS if mine[name] != theirs.get(name)]
    if differing:
        raise KDError(
            f"{student} has another tokenizer than the cache {cache.path} (teacher {cache.plan['fields']['teacher']}); what differs: "
            f"{', '.join(differing)}. Use a student of the teacher's family, or kd init-student from the teacher."
        )
