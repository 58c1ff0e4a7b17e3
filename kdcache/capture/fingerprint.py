"""The fields of a cache's fingerprint: everything that decides a number in the cache, and nothing else.

Invariant: the names and values below are those of every cache that exists. A field that was added later is left out
where it has its default, so that the fingerprints of older caches stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from kdcache import hashing, models
from kdcache.cache import sparsify
from kdcache.cache.format import FORMAT_VERSION
from kdcache.capture.checks import SPEED_OPTIONS
from kdcache.capture.config import CaptureConfig
from kdcache.examples import near_duplicates
from kdcache.examples.templates import TEMPLATE_VERSION
from kdcache.examples.types import BadRow, Example
from kdcache.models import embedded, identity
from kdcache.prompts.tokenize import COMPLETION_POLICY_VERSION, Prompts

#: The fields that are hashed: of an example, of a row that cannot be used, of the sampling options, and of what a chat
#: template does. These names are part of every cache that exists: a field that is renamed keeps its old name here, and a
#: new field is hashed only where it is not at its default.
FINGERPRINTED_EXAMPLE = (
    *("source", "row_id", "messages", "completion", "answer", "tools", "group_id", "reference", "task", "language"),
    *("verifier", "prompt", "content"),
)
FINGERPRINTED_BAD_ROW = ("source", "row_id", "reason")
FINGERPRINTED_SAMPLING = ("temperature", "top_p", "max_tokens")
FINGERPRINTED_TEMPLATE = (
    *("chat_template", "writes_answers", "begins_with_bos", "generation_prompt", "before_answer", "opens_thought"),
    *("trims", "after_answer", "end_of_turn", "end_is_named", "stop_ids"),
)


def fingerprint_fields(
    config: CaptureConfig,
    model: str,
    dtype: str,
    max_model_len: int,
    template_date: date,
    prompts: Prompts,
    examples: Sequence[Example | BadRow],
) -> dict[str, Any]:
    """Return the fields that are hashed, by name. ``model`` is the teacher's folder."""
    sampled = config.mode != "score"
    engine_options = config.engine_extra | ({"trust_remote_code": True} if models.code_is_trusted() else {})
    policy = sparsify.parse(config.sparsify, config.capture_k)
    return {
        **({"bos": config.bos} if config.bos != "auto" else {}),
        "format_version": FORMAT_VERSION,
        "teacher": _teacher_name(config.teacher),
        "weights": identity.weights_hash(model),
        "tokenizer": identity.tokenizer_hash(model),
        "template_date": str(template_date) if prompts.tells_the_date else None,
        "engine": config.engine,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "engine_options": {k: v for k, v in sorted(engine_options.items()) if k not in SPEED_OPTIONS},
        "mode": config.mode,
        "seed": config.seed,
        "samples": config.samples if sampled else None,
        "sampling": _by_name(config.sampling, FINGERPRINTED_SAMPLING) if sampled else None,
        "sparsify": str(policy),
        "capture_k": policy.capture_k,
        "precision": config.precision,
        "completion_policy": COMPLETION_POLICY_VERSION,
        "template_facts": _by_name(prompts.facts, FINGERPRINTED_TEMPLATE) | {"stop_ids": list(prompts.facts.stop_ids)},
        "prompt_template": f"{config.prompt_format} {TEMPLATE_VERSION}",
        "reasoning": TEMPLATE_VERSION if config.reasoning else None,
        "examples": hashing.of_json_list(map(_hashed_row, examples)),
        "split_ratios": list(config.split_ratios),
        "near_duplicates": near_duplicates.parameters(config.near_duplicates),
        "rows_per_shard": config.rows_per_shard,
    }


def _hashed_row(row: Example | BadRow) -> dict[str, Any]:
    return _by_name(row, FINGERPRINTED_BAD_ROW if isinstance(row, BadRow) else FINGERPRINTED_EXAMPLE)


def _by_name(value: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _teacher_name(teacher: str) -> str:
    """Return a Hub id as it is, and the last name of a folder: moving a model does not change its fingerprint."""
    if teacher == "embedded":
        return embedded.NAME
    return Path(teacher).resolve().name if Path(teacher).is_dir() else teacher
