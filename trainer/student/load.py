"""Load a student with its tokenizer, and let it stop and be asked as its cache was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdcache import machine, models
from kdcache.cache.reader import Cache
from kdcache.errors import KDError
from kdcache.models import identity
from kdcache.prompts.vocabulary import ids_in


def load_student(model: str, dtype: str, weights: str | None = None) -> tuple[Any, Any]:
    """Return a model and its tokenizer.

    Args:
        model: a folder, a Hub id or ``embedded``.
        dtype: of the weights, or of the computation with quantized weights; ``auto`` is the checkpoint's own.
        weights: ``nf4`` or ``int8`` to have bitsandbytes quantize them on this process's device, all but the head and
            the embeddings. None leaves them as they are in the folder, where they may be quantized too.

    Raises:
        KDError: the model cannot be loaded.
    """
    import transformers

    folder = identity.model_folder(model)
    tokenizer = models.tokenizer(folder)
    options: dict[str, Any] = {}
    if weights is not None:
        options["device_map"] = {"": machine.torch_device()}
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=weights != "int8",
            load_in_8bit=weights == "int8",
            bnb_4bit_quant_type="nf4" if weights == "int8" else weights,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif quantized_by(model) == "compressed-tensors":
        # The library expands the weights at the first call anyway, but only at a call of the whole model, and the loss
        # calls the layers and the head apart.
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    student = models.causal_lm(folder, dtype=dtype, **options)
    if (
        weights is not None
    ):  # of a folder that is quantized already, nothing is trained, and repacked weights are faster
        _keep_trainable(student)
    return student, tokenizer


def _keep_trainable(student: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights when the student runs without gradients, before or between steps.

    On a CPU with bfloat16 instructions, it repacks them for inference. No gradient passes through repacked weights, so
    all layers below them would stop learning, without an error.
    """
    for module in student.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_by(model: str) -> str | None:
    """Return the library that quantized a student's weights (bitsandbytes, compressed-tensors); None if none did."""
    config = identity.read_json(identity.model_folder(model), "config.json").get("quantization_config")
    return config.get("quant_method") if isinstance(config, dict) else None


def stop_ids(student: Any, tokenizer: Any, of_cache: Sequence[int]) -> list[int]:
    """Return all ids that end an answer, as in vLLM: the cache's, and those that generation_config and tokenizer name."""
    return ids_in(list(of_cache), student.generation_config.eos_token_id, tokenizer.eos_token_id)


def cached_stop_ids(plan: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end an answer in a cache, from its plan, the end-of-turn first.

    The plans of older caches have no ``stop_ids`` and name the end-of-turn alone.
    """
    return tuple(plan.get("stop_ids") or [plan["end_of_turn"]])


def answer_as_cached(student: Any, tokenizer: Any, plan: dict[str, Any]) -> None:
    """Give a student the chat template of its cache and the ids that end an answer there.

    A student that is saved after this answers as it was trained, in transformers, vLLM and ``kd chat``. That matters for
    a base model that learns from an instruct teacher: it has no chat template, and ends its text with another id.
    """
    ends = cached_stop_ids(plan)
    if plan.get("chat_template") is not None:
        tokenizer.chat_template = plan["chat_template"]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    all_ends = stop_ids(student, tokenizer, ends)
    student.generation_config.eos_token_id = all_ends if len(all_ends) > 1 else all_ends[0]
    student.config.get_text_config().eos_token_id = ends[0]


def check_tokenizer(student: str, cache: Cache) -> None:
    """Raise KDError unless the student reads the token ids of the cache as the same text.

    The ids that end an answer may differ, because training takes the cache's.
    """
    tokenizer = models.tokenizer(identity.model_folder(student))
    of_student, of_cache = identity.tokenizer_identity(tokenizer), cache.plan["tokenizer"]
    differing = [name for name in identity.SAME_IDS if of_student[name] != of_cache.get(name)]
    if differing:
        raise KDError(
            f"{student} has another tokenizer than the cache {cache.path} (teacher {cache.plan['fields']['teacher']}); what differs: "
            f"{', '.join(differing)}. Use a student of the teacher's family, or kd init-student from the teacher."
        )
