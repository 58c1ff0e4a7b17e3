"""What an evaluation measures, before any model is loaded: its settings, samples, prompts and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kdcache import hashing
from kdcache.bounds import MOST_SAMPLES, check_sampling, check_whole
from kdcache.cache import query
from kdcache.cache.format import SPLITS
from kdcache.cache.reader import Cache
from kdcache.errors import KDError, UsageError
from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from trainer.data.prompts import Prompt, answered
from trainer.data.select import Selection, open_caches, select
from trainer.evaluate.answers import asks_of
from trainer.evaluate.config import EvaluateConfig
from trainer.evaluate.metrics import MEASURES_VERSION
from trainer.student import generate
from trainer.student.generate import Ask, Decoding
from trainer.student.load import cached_stop_ids, check_tokenizer


@dataclass(frozen=True)
class Setup:
    """What is the same for all models of an evaluation."""

    config: EvaluateConfig
    cache: Cache  # the first: all were written with one sparsifier and one sampling
    units: Selection
    group_of: dict[str, str] = field(repr=False)  # sample_id -> group_id
    prompts: list[Prompt] = field(repr=False)
    asks: list[Ask] = field(repr=False)
    decoding: Decoding
    engine: str | None  # that generates; None: nothing is generated
    sandbox: Sandbox | None
    settings: dict[str, Any]  # as evaluation.json has them: equal settings give equal measurements


def check(config: EvaluateConfig) -> None:
    """UsageError for values that nothing could be measured with."""
    for label, model in config.models:
        if not label or not model:
            raise UsageError(f"{label}={model}: expected a model, or LABEL=MODEL")
    for temperature in config.temperatures or (0.0,):
        check_sampling(temperature, config.top_p)
    check_whole("--max-length", config.max_length, 1)
    check_whole("--batch-size", config.batch_size, 1)
    check_whole("--generate", config.generate, 0)
    check_whole("--seeds", config.seeds, 1, MOST_SAMPLES)
    check_whole("--max-new-tokens", config.max_new_tokens, 1)


def prepare(config: EvaluateConfig) -> Setup:
    """Open the caches and choose samples and prompts. KDError for what could not be measured or compared."""
    if config.split not in SPLITS:
        raise UsageError(f"--split {config.split}: expected one of {', '.join(SPLITS)}")
    caches = open_caches(config.from_cache)
    for _, model in config.models:
        check_tokenizer(model, caches[0])
    units = select(caches, config.split, config.where, config.max_length)
    if not len(units):
        raise KDError(f"the {config.split} split has no sample to evaluate on (--where, --max-length, --split-ratios?)")
    decoding, temperatures, seeds = decoding_of(config, caches[0])
    prompts = prompts_of(config)
    sandbox = verifiers.sandbox_for((verifier for p in prompts for verifier, _ in p.judges), config.unsafe_exec)
    engine = generate.resolve(config.engine, [model for _, model in config.models], config.dtype) if prompts else None
    settings = {
        "measures": MEASURES_VERSION,
        "caches": [cache.fingerprint for cache in caches],
        "split": config.split,
        "where": config.where,
        "max_length": config.max_length,
        "samples": len(units),
        "prompts": len(prompts),
        "prompts_hash": hashing.of_json([prompt.prompt_id for prompt in prompts]),
        "engine": engine,
        "temperatures": list(temperatures),
        "seeds": seeds,
        **asdict(decoding),
    }
    return Setup(
        config=config,
        cache=caches[0],
        units=units,
        group_of=groups_of(config, caches),
        prompts=prompts,
        asks=asks_of(prompts, temperatures, seeds),
        decoding=decoding,
        engine=engine,
        sandbox=sandbox,
        settings=settings,
    )


def prompts_of(config: EvaluateConfig) -> list[Prompt]:
    """Return the first ``generate`` prompts of the split; where the teacher answered some, only of those."""
    if config.generate == 0:
        return []
    # A prompt is asked however long the teacher's answers to it are, so that its own length alone counts.
    prompts = answered(config.from_cache, config.split, config.where, config.max_length)
    if any(prompt.answers for prompt in prompts):
        prompts = [prompt for prompt in prompts if prompt.answers]
    return prompts[: config.generate]


def groups_of(config: EvaluateConfig, caches: Sequence[Cache]) -> dict[str, str]:
    """Return sample_id -> group_id, the problem of each sample. KDError for caches that cannot stand in one table."""
    rest = f"AND prompt_tokens + completion_tokens <= {config.max_length:d}"
    tables = [query.select(path, "sample_id, group_id", config.where, config.split, rest) for path in config.from_cache]
    pairs = [(row["sample_id"], row["group_id"]) for table in tables for row in table.to_pylist()]
    group_of = dict(pairs)
    if len(group_of) < len(pairs):
        raise KDError("the caches share samples, which would count twice; evaluate on each by itself")
    for name in ("sampling", "sparsify", "capture_k", "samples"):
        if len({str(cache.plan["fields"][name]) for cache in caches}) > 1:
            raise KDError(f"the caches differ in {name}; evaluate on each by itself")
    return group_of


def teacher_temperature(cache: Cache) -> float:
    """Return the temperature at which the teacher's answers were sampled; 0 where there are none."""
    return float((cache.plan["fields"]["sampling"] or {}).get("temperature", 0.0))


def decoding_of(config: EvaluateConfig, cache: Cache) -> tuple[Decoding, tuple[float, ...], int]:
    """Return how students answer, at which temperatures and how often.

    Unless the configuration says otherwise, they answer as the teacher did; without answers of it, greedily, 128 tokens.
    """
    fields = cache.plan["fields"]
    sampling = fields["sampling"] or {}
    top_p = config.top_p if config.top_p is not None else sampling.get("top_p", 1.0)
    max_new_tokens = config.max_new_tokens or sampling.get("max_tokens", 128)
    temperatures = config.temperatures or (teacher_temperature(cache),)
    seeds = config.seeds or fields["samples"] or 1
    decoding = Decoding(top_p, max_new_tokens, cached_stop_ids(cache.plan), config.batch_size, config.dtype)
    return decoding, temperatures, seeds
