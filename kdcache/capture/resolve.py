"""Resolve a configuration into a plan: find the teacher, load the examples, and cut them into shards.

Nothing is written and no weights are loaded, so everything that can be refused early is refused here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from kdcache import models
from kdcache.cache import documents, manifest, sparsify
from kdcache.cache.format import SPLITS, fingerprint, split_of
from kdcache.capture.checks import CPU_MAX_MODEL_LEN, check
from kdcache.capture.config import CaptureConfig
from kdcache.capture.fingerprint import fingerprint_fields
from kdcache.capture.plan import Introduction, Plan, Shard, open_tokenizer, samples_per_example
from kdcache.capture.requests import ask_about, beyond_vocabulary, group_of
from kdcache.errors import KDError, UsageError
from kdcache.examples import load
from kdcache.examples.near_duplicates import drop_near_duplicates
from kdcache.examples.types import BadRow, Example
from kdcache.hashing import stable_hash
from kdcache.judge import kinds
from kdcache.models import identity
from kdcache.prompts.tokenize import Prompts
from kdcache.storage import Location
from kdcache.teachers.device import runs_on_gpu
from kdcache.teachers.engine import resolve_dtype

Rows = list[Example | BadRow]


def resolve(config: CaptureConfig) -> Plan:
    """Return the plan of a configuration. UsageError or KDError for whatever could not be captured with it."""
    check(config)
    model = identity.model_folder(config.teacher, config.revision)
    head = _head_facts(model)
    _check_candidates(config, head.vocab_size)
    dtype = resolve_dtype(config.dtype, head.dtype, config.engine)
    max_model_len = _max_model_len(config, head.max_positions)
    template_date = _template_date(config.out)
    prompts = Prompts(model, open_tokenizer(model), template_date, config.bos)
    if prompts.end_of_turn >= head.vocab_size:
        raise KDError(f"{config.teacher}: its end of turn, {beyond_vocabulary(prompts.end_of_turn, head.vocab_size)}")
    examples = _load(config)
    fields = fingerprint_fields(config, model, dtype, max_model_len, template_date, prompts, examples)
    shards, near_duplicates = _cut(config, examples)
    return Plan(
        config=config,
        model=model,
        vocab_size=head.vocab_size,
        dtype=dtype,
        max_model_len=max_model_len,
        template_date=template_date,
        facts=prompts.facts,
        fields=fields,
        fingerprint=fingerprint(fields),
        shards=shards,
        example_count=len(examples),
        near_duplicates=near_duplicates,
        introduction=Introduction(
            prompts.facts.describe(prompts.tokenizer), describe_first_prompt(config, prompts, examples)
        ),
        notes=tuple(_notes(config, prompts, examples, near_duplicates)),
    )


# --- the teacher ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadFacts:
    """What a model's config.json says about its head and its positions."""

    vocab_size: int
    max_positions: int | None  # None: the model names no limit
    dtype: str | None  # of the checkpoint


def _head_facts(model: str) -> HeadFacts:
    identity.read_json(model, "config.json")
    config = models.config(model).get_text_config()
    sizes = {name: getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings")}
    for name, value in sizes.items():
        if not (isinstance(value, int) and value > 0) and (value is not None or name == "vocab_size"):
            raise KDError(f"{model}/config.json is damaged: {name} is {value!r}, expected a whole number above 0")
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    return HeadFacts(config.vocab_size, sizes["max_position_embeddings"], dtype)


def _check_candidates(config: CaptureConfig, vocab_size: int) -> None:
    capture_k = sparsify.parse(config.sparsify, config.capture_k).capture_k
    if capture_k > vocab_size:
        raise UsageError(
            f"{capture_k} candidates per position were asked for, but {config.teacher} has a vocabulary of {vocab_size}"
            "; lower --sparsify or --capture-k"
        )


def _max_model_len(config: CaptureConfig, max_positions: int | None) -> int:
    if config.max_model_len is not None:
        if max_positions is not None and config.max_model_len > max_positions:
            raise UsageError(f"--max-model-len {config.max_model_len}: the model's positions end at {max_positions}")
        return config.max_model_len
    if runs_on_gpu(config.engine):
        return max_positions or 4096
    return min(max_positions or CPU_MAX_MODEL_LEN, CPU_MAX_MODEL_LEN)


def _template_date(cache: Location) -> date:
    """Return the day that chat templates are told: that of an existing plan, else today.

    A capture that is resumed on another day must render the same prompts. Where plan.json was damaged and set aside,
    the day stands in the shards.
    """
    for read in (lambda: documents.read_plan(cache), lambda: next(manifest.shards_metadata(cache))):
        with contextlib.suppress(KDError, OSError, StopIteration, ValueError, KeyError, TypeError):
            return date.fromisoformat(read()["date"])
    return date.today()


# --- the examples -----------------------------------------------------------------------------------------------------


def _load(config: CaptureConfig) -> Rows:
    """Return the first --limit examples in the data set's order or, with --shuffle, in that of a hash of their ids."""
    limit = None if config.shuffle else config.limit
    rows = load.load(config.examples, config.columns, limit, config.data_path, config.prompt_format)
    if config.shuffle:
        rows.sort(key=lambda row: stable_hash(config.seed, row.source, row.row_id))
    rows = rows[: config.limit]
    bad_rows = [row for row in rows if isinstance(row, BadRow)]
    if len(bad_rows) == len(rows):
        raise KDError(f"--examples {config.examples}: no row can be used. {rows[0].reason}")  # type: ignore[union-attr]
    return rows


def _cut(config: CaptureConfig, examples: Sequence[Example | BadRow]) -> tuple[tuple[Shard, ...], int]:
    """Return the shards, and how many examples were dropped because they nearly repeat one of another split."""
    by_split: dict[str, Rows] = {split: [] for split in SPLITS}
    ids: set[tuple[str, str]] = set()
    for example in examples:
        if (example.source, example.row_id) in ids:
            raise KDError(f"--examples {config.examples}: two rows have the id {example.row_id!r}; ids must be unique")
        ids.add((example.source, example.row_id))
        group = f"bad row {example.row_id}" if isinstance(example, BadRow) else group_of(example)
        by_split[split_of(group, config.split_ratios, config.seed)].append(example)
    dropped = 0
    if config.near_duplicates == "drop":
        by_split, dropped = drop_near_duplicates(by_split)
    size = max(1, config.rows_per_shard // samples_per_example(config))
    shards = (
        Shard(split, number, tuple(rows[start : start + size]))
        for split, rows in by_split.items()
        for number, start in enumerate(range(0, len(rows), size))
    )
    return tuple(shards), dropped


# --- for the user -----------------------------------------------------------------------------------------------------


def describe_first_prompt(
    config: CaptureConfig, prompts: Prompts, examples: Sequence[Example | BadRow], most: int = 400
) -> str | None:
    """Return the first example as the teacher will see it, in at most about ``most`` characters.

    That is the prompt and, after an arrow, the answer given to it. None: no example can be used.
    """
    example = next((row for row in examples if isinstance(row, Example)), None)
    if example is None:
        return None
    try:
        ids = ask_about(config, prompts, example, with_answer=config.mode != "sample")
    except ValueError as error:
        return str(error)
    decode = prompts.tokenizer.decode
    text = repr(decode(ids.prompt_ids))
    if ids.completion_ids:
        text += f" -> {decode(ids.completion_ids)!r}"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _notes(
    config: CaptureConfig, prompts: Prompts, examples: Sequence[Example | BadRow], near_duplicates: int
) -> list[str]:
    """Return what the user should know before the teacher runs, each a sentence or two."""
    notes = []
    if near_duplicates:
        notes.append(f"{near_duplicates} rows nearly repeat a row of another split, and are dropped")
    if prompts.lacks_bos:
        notes.append(f"warning: {config.teacher} {prompts.without_bos}")
    problems = [(row, reason) for row in examples if isinstance(row, Example) and (reason := _verifier_problem(row))]
    if problems:
        row, reason = problems[0]
        notes.append(
            f"warning: the verifiers of {len(problems)} of {len(examples)} rows are not understood, so that their "
            f"answers will not be judged; the first: {row.source}:{row.row_id}: {reason}"
        )
    return notes


def _verifier_problem(example: Example) -> str | None:
    """Return why an answer to this example cannot be judged although the row has a verifier; None where it can."""
    try:
        kinds.parse(example.verifier)
    except KDError as error:
        return str(error)
    return None
