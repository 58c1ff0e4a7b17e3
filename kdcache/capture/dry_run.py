"""What a capture would do, without a teacher: counts, a prediction of its size, and the first prompt.

kd cache-teacher --teacher embedded --examples builtin --limit 50 --out data/first --dry-run
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from kdcache import machine, storage
from kdcache.cache.format import SPLITS
from kdcache.capture import folder
from kdcache.capture.plan import Plan
from kdcache.capture.requests import questions_of
from kdcache.capture.space import bytes_per_token
from kdcache.examples.types import BadRow
from kdcache.teachers.device import runs_on_gpu


def dry_run(plan: Plan) -> dict[str, Any]:
    """Return the facts of a run that would start now. Nothing is written."""
    config = plan.config
    folder.check(plan)
    todo = plan.todo()
    prompts = plan.open_prompts()
    samples = prompt_tokens = given_tokens = sampled_tokens = rejected = 0
    differs: Counter[str] = Counter()
    for question in (
        question
        for shard in todo
        for example in shard.examples
        for question in questions_of(plan, prompts, shard, example)
    ):
        if isinstance(question, BadRow):
            rejected += 1
            continue
        samples += 1
        differs.update([question.differs] if question.differs else [])
        prompt_tokens += len(question.request.prompt_ids)
        if question.request.completion_ids is None:
            sampled_tokens += config.sampling.max_tokens
        else:
            given_tokens += len(question.request.completion_ids)
    return {
        "out": str(config.out),
        "fingerprint": plan.fingerprint,
        "teacher": plan.fields["teacher"],
        "engine": config.engine,
        "dtype": plan.dtype,
        "max_model_len": plan.max_model_len,
        "device": machine.device_in_words(runs_on_gpu(config.engine)),
        "examples": plan.example_count,
        "samples_to_do": samples,
        "rejected": rejected,
        "template": plan.introduction.template,
        "differs_from_template": dict(differs) or None,
        "asks_first": plan.introduction.first_prompt,
        "near_duplicates_dropped": plan.near_duplicates,
        "prompt_tokens": prompt_tokens,
        "given_completion_tokens": given_tokens,
        "sampled_completion_tokens_at_most": sampled_tokens,
        "predicted_bytes_at_most": int((given_tokens + sampled_tokens) * bytes_per_token(plan)),
        "free_disk_bytes": storage.free_bytes(config.out),
        "shards": len(plan.shards),
        "shards_to_do": len(todo),
        "shards_by_split": {split: sum(shard.split == split for shard in plan.shards) for split in SPLITS},
    }
