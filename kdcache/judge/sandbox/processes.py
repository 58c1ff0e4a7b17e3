"""What a program's processes use, read from /proc, and how all of them are ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

from kdcache.judge.sandbox.limits import Limits

MAX_FILES = 10_000  # in /tmp; each costs the kernel a kilobyte
#: bubblewrap's own processes, which count as the program's in every look.
BUBBLEWRAP_PROCESSES = 2

_MEMORY = re.compile(rb"^(VmRSS|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def children_of(process: int) -> tuple[int, list[int]]:
    """Return how many threads a process has, and the ids of its children; OSError if it has just ended."""
    tasks = os.listdir(f"/proc/{process}/task")
    return len(tasks), [
        int(child) for task in tasks for child in Path(f"/proc/{process}/task/{task}/children").read_text().split()
    ]


def exceeded_limit(process: int, limits: Limits) -> str | None:
    """Return "memory" if a process and its descendants are too many, or use too much memory or too many files."""
    count, used_bytes, files = 0, 0, 0
    unseen = [process]
    while unseen and count <= limits.processes + BUBBLEWRAP_PROCESSES:
        current = unseen.pop()
        with contextlib.suppress(OSError):  # the process has just ended
            for _, kilobytes in _MEMORY.findall(Path(f"/proc/{current}/status").read_bytes()):
                used_bytes += int(kilobytes) << 10
            threads, children = children_of(current)
            count += threads
            unseen += children
            if current == process and children:
                # The first child is bubblewrap's init. Until it has entered its own file system, its /tmp is ours.
                tmp = f"/proc/{children[0]}/root/tmp"
                if os.stat(tmp).st_dev != os.stat("/tmp").st_dev:
                    file_system = os.statvfs(tmp)
                    used_bytes += (file_system.f_blocks - file_system.f_bfree) * file_system.f_frsize
                    files = file_system.f_files - file_system.f_ffree
    exceeded = (
        count > limits.processes + BUBBLEWRAP_PROCESSES or used_bytes > limits.memory_mb << 20 or files > MAX_FILES
    )
    return "memory" if exceeded else None


def kill(process: subprocess.Popen[bytes]) -> None:
    """End bubblewrap's init, with which the kernel ends its whole pid namespace; then bubblewrap itself."""
    if process.returncode is None:
        with contextlib.suppress(OSError):
            for child in children_of(process.pid)[1]:
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
