"""Rewards for GRPO, made of verifiers; and the guards that stop a run which learns to please them instead of the task.

    reward = correctness + FORMAT_WEIGHT * format (+ teacher_weight * likeness),    0 for an answer that is empty or cut off

Correctness is 1 or 0 (``kdcache.judge.verifiers``: tests are run, numbers and texts compared). Format is 1 for an answer in the form
that was asked for, else 0. Likeness, off by default, is what the cached teacher thinks of the answer, as far as the cache
knows. The weights are such that no answer gains as much by form and likeness as by being right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kdcache.cache.reader import Sample
from kdcache.errors import KDError
from kdcache.judge import answers, verifiers
from kdcache.judge.sandbox import Sandbox

FORMAT_WEIGHT = 0.1
MOST_TEACHER_WEIGHT = 0.5


@dataclass(frozen=True)
class Judged:
    """An answer's reward and what it is made of."""

    reward: float
    correctness: float
    format: float
    reason: str


def judge(
    completions: Sequence[str],
    asked: Sequence[tuple[Sequence[verifiers.Judge], bool]],
    finished: Sequence[bool],
    sandbox: Sandbox | None,
) -> list[Judged]:
    """The rewards of answers. ``asked``: a prompt's judges, of whose verdicts the best counts, and whether reasoning was
    asked for; ``finished``: not cut off.
    """
    items = [(v, text, reference) for text, (judges, _) in zip(completions, asked) for v, reference in judges]
    verdicts = iter(verifiers.verify_many(items, sandbox))
    return [
        compose(
            verifiers.best([next(verdicts) for _ in judges]),
            any(has_form(text, verifier, reasoned) for verifier, _ in judges),
            done,
        )
        for text, (judges, reasoned), done in zip(completions, asked, finished)
    ]


def compose(verdict: verifiers.Verdict, form: bool, finished: bool) -> Judged:
    """One answer's reward. What cannot be judged is not right."""
    correctness = float((verdict.reward or 0.0) >= 1)
    if not finished:
        return Judged(0.0, 0.0, 0.0, "cut off")
    return Judged(correctness + FORMAT_WEIGHT * form, correctness, float(form), verdict.reason)


def has_form(text: str, verifier: str | None, reasoned: bool) -> bool:
    """Whether an answer has the form asked for: reasoning and answer in their tags, or simply an answer that can be found."""
    if reasoned and not answers.has_reasoned_form(text):
        return False
    return bool(answers.answer_in(text, verifier).strip())


def likeness(ids: Sequence[int], cached: Sequence[Sample]) -> float:
    """The teacher's probability of an answer's tokens, mean over the answer, 0 to 1: as far as an answer in the cache begins alike.

    Where one begins as this answer does, the teacher's distribution of the next token is known there; a token that is not among
    its candidates has 0, and so has all that follows. On a threshold cache the mean over many answers is right, not each one.
    """
    answer = np.asarray(ids)
    alike = max(cached, key=lambda sample: _common(answer, sample.completion_ids), default=None)
    if alike is None or not len(answer):
        return 0.0
    known = min(_common(answer, alike.completion_ids) + 1, len(answer), len(alike.candidates))
    total = 0.0
    for position in range(known):
        here = alike.candidates.at(position)
        total += float(np.exp(alike.candidates.logprobs[here][alike.candidates.ids[here] == answer[position]]).sum())
    return total / len(answer)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two answers share from the beginning."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


# --- guards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Means over what one step generated. ``varied``: share of groups whose rewards differ."""

    correctness: float
    format: float
    length_tokens: float
    entropy_nats: float
    varied: float


class Collapsed(KDError):
    """A run that goes on without learning the task: what happened, and what to try."""


TRY = (
    "Try prompts that the student sometimes gets right (--where), --guide prefix, a warm-up (kd train --where 'reward = 1'), a "
    "higher --beta or a lower --learning-rate; --no-guards goes on regardless"
)
SOLVED = 0.9  # of answers right
FELL_TO = 0.3  # of what length and entropy were at first


@dataclass
class Guards:
    """Looks at the last ``window`` steps, and raises ``Collapsed`` for what no run recovers from."""

    window: int = 20
    first: list[Step] = field(default_factory=list)  # the steps that later ones are compared with
    last: deque[Step] = field(default_factory=deque)

    def remember(self, step: Step) -> None:
        """See a step without judging it, as those of a run that is continued."""
        if len(self.first) < max(self.window // 4, 1):
            self.first.append(step)
        self.last.append(step)
        if len(self.last) > self.window:
            self.last.popleft()

    def __call__(self, step: Step) -> None:
        self.remember(step)
        if len(self.last) < self.window:
            return

        def mean(name: str, steps: Sequence[Step]) -> float:
            return float(np.mean([getattr(s, name) for s in steps]))

        steps = list(self.last)
        late = steps[len(steps) // 2 :]
        over = f"over {self.window} steps"
        right = mean("correctness", steps)
        if right == 0 and mean("varied", steps) == 0:
            raise Collapsed(f"no answer was right {over}, and all answers to a prompt were rewarded alike. {TRY}")
        early_form, late_form = mean("format", steps[: len(steps) // 2]), mean("format", late)
        if right == 0 and late_form > 0 and late_form >= early_form:
            raise Collapsed(
                f"format is rewarded ({early_form:.2f}, then {late_form:.2f}) while no answer was right {over}. {TRY}"
            )
        if mean("correctness", late) >= SOLVED:  # shorter, surer answers that agree are then what was wanted
            return
        gained = mean("correctness", late) > mean("correctness", self.first)
        for name, what in (("length_tokens", "answers shrank"), ("entropy_nats", "entropy fell")):
            before, now = mean(name, self.first), mean(name, late)
            if before > 0 and now < FELL_TO * before and not gained:
                raise Collapsed(f"{what} from {before:.3g} to {now:.3g}, and no more of them are right. {TRY}")
        if mean("varied", steps) == 0 and right < 1:
            raise Collapsed(
                f"all answers to a prompt were rewarded alike {over}: there is nothing to learn from. {TRY}"
            )
