"""Stop a GRPO run that no longer learns the task, with what happened and what to try.

A run collapses when the policy finds something easier than the task: the form alone, an empty answer, one answer to
everything. No such run recovers, so it is stopped instead of using up its steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kdcache.errors import KDError


@dataclass(frozen=True)
class StepMeans:
    """Means over the answers of one step. ``varied``: the share of groups whose rewards differ."""

    correctness: float
    form: float
    length_tokens: float
    entropy_nats: float
    varied: float


class Collapsed(KDError):
    """A run that goes on without learning the task: what happened, and what to try."""


TRY = (
    "Try prompts that the student sometimes gets right (--where), --guide prefix, a warm-up (kd train --where 'reward = 1'), a "
    "higher --beta or a lower --learning-rate; --no-guards goes on regardless"
)
SOLVED = 0.9  # share of right answers above which shorter and surer answers are what was wanted
FELL_TO = 0.3  # share of their first value below which length and entropy count as fallen


@dataclass
class Guards:
    """Looks at the last ``window`` steps.

    first  the first quarter of a window: what length, entropy and correctness were at the start of the run
    last   the last window; its second half is "late"
    """

    window: int = 20
    first: list[StepMeans] = field(default_factory=list)
    last: deque[StepMeans] = field(default_factory=deque)

    def remember(self, step: StepMeans) -> None:
        """Take a step into account without judging it, as those of a run that is resumed."""
        if len(self.first) < max(self.window // 4, 1):
            self.first.append(step)
        self.last.append(step)
        if len(self.last) > self.window:
            self.last.popleft()

    def check(self, step: StepMeans) -> None:
        """Take a step into account. ``Collapsed`` if the last window is one that no run recovers from."""
        self.remember(step)
        if len(self.last) < self.window:
            return
        steps = list(self.last)
        early, late = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        over = f"over {self.window} steps"
        right = _mean("correctness", steps)
        all_alike = _mean("varied", steps) == 0
        if right == 0 and all_alike:
            raise Collapsed(f"no answer was right {over}, and all answers to a prompt were rewarded alike. {TRY}")
        early_form, late_form = _mean("form", early), _mean("form", late)
        if right == 0 and late_form > 0 and late_form >= early_form:
            raise Collapsed(
                f"format is rewarded ({early_form:.2f}, then {late_form:.2f}) while no answer was right {over}. {TRY}"
            )
        if _mean("correctness", late) >= SOLVED:
            return
        gained = _mean("correctness", late) > _mean("correctness", self.first)
        for name, what in (("length_tokens", "answers shrank"), ("entropy_nats", "entropy fell")):
            at_first, lately = _mean(name, self.first), _mean(name, late)
            if at_first > 0 and lately < FELL_TO * at_first and not gained:
                raise Collapsed(f"{what} from {at_first:.3g} to {lately:.3g}, and no more of them are right. {TRY}")
        if all_alike and right < 1:
            raise Collapsed(
                f"all answers to a prompt were rewarded alike {over}: there is nothing to learn from. {TRY}"
            )


def _mean(name: str, steps: Sequence[StepMeans]) -> float:
    return float(np.mean([getattr(step, name) for step in steps]))
