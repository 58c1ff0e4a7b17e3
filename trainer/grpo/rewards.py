"""Rewards for GRPO, made of verifiers.

    reward = correctness + FORMAT_WEIGHT * form;    0 for an answer that is empty or cut off

Correctness is 1 or 0, as ``kdcache.judge.verifiers`` says: it runs tests, and compares numbers and texts. Form is 1 for an
answer in the form that its prompt asks for, else 0. No answer gains as much by its form as by being right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.judge import answers, verifiers
from kdcache.judge.sandbox import Sandbox

FORMAT_WEIGHT = 0.1


@dataclass(frozen=True)
class Judged:
    """An answer's reward and what it is made of."""

    reward: float
    correctness: float
    form: float
    reason: str


def judge(
    completions: Sequence[str],
    judging: Sequence[tuple[Sequence[verifiers.Judge], bool]],
    finished: Sequence[bool],
    sandbox: Sandbox | None,
) -> list[Judged]:
    """Return the rewards of answers.

    Args:
        completions: the answers.
        judging: the judges of each answer's prompt, whose best verdict counts, and whether the prompt asks for reasoning.
        finished: whether each answer came to its end of turn.
        sandbox: where programs run; None if no judge needs it.
    """
    items = [(v, text, reference) for text, (judges, _) in zip(completions, judging) for v, reference in judges]
    verdicts = iter(verifiers.verify_many(items, sandbox))
    return [
        compose(
            verifiers.best([next(verdicts) for _ in judges]),
            any(has_form(text, verifier, reasoned) for verifier, _ in judges),
            is_finished,
        )
        for text, (judges, reasoned), is_finished in zip(completions, judging, finished)
    ]


def compose(verdict: verifiers.Verdict, form: bool, finished: bool) -> Judged:
    """Return one answer's reward. An answer that cannot be judged is not right."""
    correctness = float((verdict.reward or 0.0) >= 1)
    if not finished:
        return Judged(0.0, 0.0, 0.0, "cut off")
    return Judged(correctness + FORMAT_WEIGHT * form, correctness, float(form), verdict.reason)


def has_form(text: str, verifier: str | None, reasoned: bool) -> bool:
    """Return whether an answer has the form asked for: reasoning and answer in their tags, or an answer that can be found."""
    if reasoned and not answers.has_reasoned_form(text):
        return False
    return bool(answers.answer_in(text, verifier).strip())
