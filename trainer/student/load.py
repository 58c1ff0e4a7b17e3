"""A student: from a checkpoint, or from the teacher's own layers; saved with its tokenizer as a Hugging Face folder.

kd init-student --from embedded --keep-layers 20 --out data/student
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from kdcache import models
from kdcache.cache.reader import Cache
from kdcache.errors import KDError
from kdcache.models import identity
from kdcache.prompts.tokenize import ids_in


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
