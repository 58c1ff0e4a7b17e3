"""What `kd grpo` can be told, with defaults and help texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kdcache.settings import UNSAFE_EXEC_HELP, option
from trainer.student.config import StudentConfig


@dataclass(frozen=True)
class GrpoConfig(StudentConfig):
    """The options of ``kd grpo``; ``arguments`` are those of trl.GRPOConfig."""

    where: str | None = option(
        None,
        "SQL condition on the view prompts [default: success > 0 AND success < 1, the prompts that the teacher's own answers "
        "got right sometimes].",
    )
    guide: str | None = option(
        None,
        "Begin a share of each group's answers with the first half of a right answer from the cache; the share shrinks as the "
        "student improves.",
        choices=("prefix",),
    )
    guards: bool = option(True, "Stop a run that has collapsed, and say how.")
    guard_window: int = option(20, "Steps that a guard looks at.", low=2)
    unsafe_exec: bool = option(False, UNSAFE_EXEC_HELP)

    places: ClassVar[tuple[str, ...]] = (*StudentConfig.places, "guards", "guard_window", "unsafe_exec")
