"""What a program in the sandbox may use, and what came of running it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The most that one run may use; whatever exceeds a limit ends the program and all its children."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10  # per process
    memory_mb: int = 512  # all processes and /tmp together
    processes: int = 16  # processes and their threads
    output_bytes: int = 1 << 20  # stdout
    file_bytes: int = 64 << 20  # one file, and all of /tmp
    stack_mb: int = 8  # the first thread's stack, and what every other thread reserves


DEFAULT_LIMITS = Limits()
#: g++ -O2 with <bits/stdc++.h> takes seconds on a busy machine; the executable comes back through stdout.
COMPILER_LIMITS = Limits(wall_seconds=60.0, cpu_seconds=30, memory_mb=1024, output_bytes=64 << 20)


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what the program wrote.

    ``status`` is "ok", "error" (the exit code is not 0), "timeout", "memory" (or too many processes or files),
    "output" or "compile" (the program does not compile).
    """

    status: str
    stdout: str
    stderr: str  # only the end of it, if it is long
    exit_code: int | None  # 128 + n if signal n ended the program; None if a limit did
    seconds: float
