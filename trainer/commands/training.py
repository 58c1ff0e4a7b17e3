"""What `kd train` and `kd grpo` print while a student is trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.commands.console import is_first_rank, note, note_device, this_command, time_left


class StepLine:
    """Prints a line per logged step: its metrics, and the time that is left at the speed so far."""

    def __init__(self, checkpoint: str | None):
        self._first = int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else 0
        self._begun = time.monotonic()

    def show(self, step: int, steps: int, metrics: str) -> None:
        seconds_per_step = (time.monotonic() - self._begun) / max(step - self._first, 1)
        note(f"step {step}/{steps}  {metrics}{time_left(seconds_per_step * (steps - step))}")


def introduce(facts: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print the device, every derived number of a run and what the user should know, before its first step."""
    note_device()
    note("  ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value is not None))
    for text in notes:
        note(text)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """After Ctrl-C, print the command that continues the run; at its end, leave the other processes."""
    from trainer.run import parallel

    try:
        yield
        parallel.leave()
    except KeyboardInterrupt:
        if is_first_rank():
            note(f"interrupted. To continue at the last checkpoint:\n  {this_command()}")
        raise
