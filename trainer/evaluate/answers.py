"""answers.parquet: what was answered to each prompt, with the score of every metric and the verdict of its verifiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.prompts.thoughts import whole_turn
from trainer.data.prompts import Prompt
from trainer.evaluate import metrics
from trainer.evaluate.metrics import Attempt
from trainer.student.generate import Ask

ANSWERS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("prompt_id", "group_id")),
        pa.field("temperature", pa.float64()),
        pa.field("seed", pa.int32()),
        pa.field("answer", pa.string()),
        *(pa.field(name, pa.float64()) for name in metrics.ANSWER_METRICS),
        pa.field("reward", pa.float64()),
        pa.field("reason", pa.string()),  # of the reward
    ]
)


def asks_of(prompts: Sequence[Prompt], temperatures: Sequence[float], seeds: int) -> list[Ask]:
    """Return every answer that is wanted of a student: ``seeds`` per prompt and temperature, greedy ones once."""
    return [
        Ask(prompt.prompt_id, prompt.ids, temperature, seed)
        for prompt in prompts
        for temperature in temperatures
        for seed in range(seeds if temperature > 0 else 1)
    ]


def of_teacher(prompts: Sequence[Prompt], temperature: float, sandbox: Sandbox | None) -> pa.Table:
    """Return the rows of the answers that the teacher sampled, at the temperature that it sampled with."""
    pairs = [
        (Ask(prompt.prompt_id, [], temperature, number), text)
        for prompt in prompts
        for number, text in enumerate(prompt.answers)
    ]
    return judged(prompts, [ask for ask, _ in pairs], [text for _, text in pairs], sandbox, is_teacher=True)


def of_copying(prompts: Sequence[Prompt], asks: Sequence[Ask], sandbox: Sandbox | None) -> pa.Table:
    """Return the rows of a student that answers every prompt with its ``baseline``."""
    texts = {prompt.prompt_id: baseline(prompt) or "" for prompt in prompts}
    return judged(prompts, asks, [texts[ask.prompt_id] for ask in asks], sandbox)


def baseline(prompt: Prompt) -> str | None:
    """Return what a student would answer that only copies the problem, where the data set says what that is."""
    for verifier, _ in prompt.judges:
        try:
            content = json.loads(verifier or "{}")
        except ValueError:  # no verifier: its verdict will say so
            continue
        if isinstance(content, dict) and content.get("baseline") is not None:
            return content["baseline"]
    return None


def judged(
    prompts: Sequence[Prompt],
    asks: Sequence[Ask],
    texts: Sequence[str],
    sandbox: Sandbox | None,
    is_teacher: bool = False,
) -> pa.Table:
    """Return one row per answer with its scores, the best one where a prompt has several references or verifiers.

    A score is null where there is nothing to compare the answer with. ``texts`` answer ``asks``, in their order.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    attempts = []
    for ask, text in zip(asks, texts):
        prompt = by_id[ask.prompt_id]
        target = prompt.answers[0] if prompt.answers and not is_teacher else None
        attempts.append(Attempt(text, whole_turn(prompt.text, text), prompt.judges, target))
    # All programs of all answers run side by side; their verdicts come back in the same order.
    verdicts = iter(
        verifiers.verify_many(
            [(verifier, attempt.turn, reference) for attempt in attempts for verifier, reference in attempt.judges],
            sandbox,
        )
    )
    rows: list[dict[str, Any]] = []
    for ask, attempt in zip(asks, attempts):
        verdict = verifiers.best([next(verdicts) for _ in attempt.judges])
        rows.append(
            {
                "prompt_id": ask.prompt_id,
                "group_id": by_id[ask.prompt_id].group_id,
                "temperature": ask.temperature,
                "seed": ask.seed,
                "answer": attempt.text,
                "reward": verdict.reward,
                "reason": verdict.reason,
                **{name: score(attempt) for name, score in metrics.ANSWER_METRICS.items()},
            }
        )
    return pa.Table.from_pylist(rows, ANSWERS)
