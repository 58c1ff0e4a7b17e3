"""The options of ``kd grpo``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.student.config import StudentConfig


@dataclass(frozen=True)
class GrpoConfig(StudentConfig):
    """What ``kd grpo`` was asked for; ``arguments`` are trl.GRPOConfig's."""

    guide: str | None = None
    guards: bool = True
    guard_window: int = 20
    unsafe_exec: bool = False

    places: ClassVar[tuple[str, ...]] = (*StudentConfig.places, "guards", "guard_window", "unsafe_exec")
