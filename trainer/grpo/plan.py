"""Resolve a run of ``kd grpo`` before its first step: choose its prompts, and check all that can be checked without weights.

    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100 --dry-run

By default a run learns from the prompts that the teacher's own answers got right sometimes, and not always: where all or
none of a group's answers are right, they are rewarded alike, and there is nothing to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.cache import query
from kdcache.errors import KDError, UsageError
from kdcache.storage import Location
from trainer.data.prompts import Prompt, merged, verifiable
from trainer.grpo.arguments import check_options, grpo_arguments
from trainer.grpo.config import GrpoConfig
from trainer.run import parallel
from trainer.run.folder import Start, find_start
from trainer.run.inputs import check_lora, open_checked
from trainer.run.record import fingerprints, new_record
from trainer.student.load import cached_stop_ids

SOMETIMES = "success > 0 AND success < 1"
GUIDES = ("prefix",)


@dataclass(frozen=True)
class GrpoRun:
    """A run of ``kd grpo``, resolved: what it learns from, before the first step."""

    config: GrpoConfig
    prompts: list[Prompt]
    where: str | None
    parallel: str | None  # DDP or FSDP2, with the number of processes; None for one process
    arguments: dict[str, Any]  # as given, for trl.GRPOConfig
    plan: dict[str, Any] = field(repr=False)  # of the first cache: how prompts are rendered and answers end
    record: dict[str, Any]
    start: Start

    def facts(self) -> dict[str, Any]:
        """Return what the user should see before the first step."""
        return {
            "output_dir": str(self.config.output_dir),
            "parallel": self.parallel,
            "prompts": len(self.prompts),
            "where": self.where,
            "prompts_with_a_trace": sum(bool(prompt.traces) for prompt in self.prompts),
            "guide": self.config.guide,
            "continues_at": None if self.start.checkpoint is None else Path(self.start.checkpoint).name,
        }


def prepare(config: GrpoConfig) -> GrpoRun:
    """Return the resolved run. UsageError or KDError for anything that would end it before or during training."""
    if config.guide is not None and config.guide not in GUIDES:
        raise UsageError(f"--guide {config.guide}: expected {' or '.join(GUIDES)}")
    if config.guide is not None and config.arguments.get("use_vllm"):
        raise UsageError(
            "--guide needs each answer of a group to begin differently, which --use-vllm cannot; use one of them"
        )
    arguments = check_options(config.arguments)
    caches = open_checked(config)
    where = config.where if config.where is not None else _default_where(config)
    prompts = merged(prompt for cache in caches for prompt in _choose(cache.path, cache.plan, where))
    if not prompts:
        verifiable = sum(len(_choose(cache.path, cache.plan, None)) for cache in caches)
        if not verifiable:
            raise KDError(
                "no training row of this cache says how an answer is judged, so there is nothing to reward; cache examples with a "
                "verifier (arithmetic, codeforces, a table with the columns verifier and reference)"
            )
        raise KDError(
            f"{verifiable} prompts of the train split have a verifier, and none fulfils {where}; success comes from the teacher's "
            "own answers (kd cache-teacher --mode sample, kd verify-answers)"
        )
    if config.guide is not None and not any(prompt.traces for prompt in prompts):
        raise KDError("--guide prefix needs right answers (reward = 1) to the chosen prompts, and the cache has none")
    check_lora(config)
    grpo_arguments(config, arguments, len(prompts))  # once now, for its errors
    record = new_record(config, caches, method="grpo", prompts=len(prompts))
    return GrpoRun(
        config=config,
        prompts=prompts,
        where=where,
        parallel=parallel.mode(config.arguments),
        arguments=arguments,
        plan=caches[0].plan,
        record=record,
        start=find_start(config, record, _settings, "kd grpo"),
    )


def _default_where(config: GrpoConfig) -> str | None:
    """Return the condition for prompts that the teacher got right sometimes, if its own answers were judged."""
    judged = any(
        query.select(path, "sum(judged) AS n", None, "train", view="prompts")["n"][0].as_py()
        for path in config.from_cache
    )
    return SOMETIMES if judged else None


def _choose(cache: Location, plan: dict[str, Any], where: str | None) -> list[Prompt]:
    """Return the prompts of one cache that can be rewarded, with its right answers as traces."""
    return verifiable(cache, where, cached_stop_ids(plan), plan["fields"].get("reasoning") is not None)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a run to resume."""
    # Records of earlier versions name --teacher-weight, an option whose default was 0. It is gone.
    config = {name: value for name, value in record["config"].items() if name != "teacher_weight" or value}
    return {
        "method": record.get("method"),
        "config": config,
        "prompts": record.get("prompts"),
        "caches": fingerprints(record),
    }
