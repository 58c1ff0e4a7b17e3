"""The threads that run programs in the sandbox, several at a time, and that end them at once after an error."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kdcache.progress import Progress, ShowProgress, silent

T = TypeVar("T")
R = TypeVar("R")

_thread = threading.local()  # .stop is the event of the JudgePool that this thread belongs to
_NEVER = threading.Event()


class Stopped(Exception):
    """A program was ended because nobody waits for its outcome any more. That is no verdict on it."""


class JudgePool(ThreadPoolExecutor):
    """Threads that run programs. They end their programs when an error or Ctrl-C leaves ``stopped_by_errors``."""

    def __init__(self, count: int | None = None):
        self._stop = threading.Event()
        super().__init__(count, initializer=self._join_pool)

    def _join_pool(self) -> None:
        _thread.stop = self._stop

    @contextlib.contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """End all programs, and drop what has not started, if the block raises anything."""
        try:
            yield
        except BaseException:
            self._stop.set()
            self.shutdown(wait=False, cancel_futures=True)
            raise


def is_stopped() -> bool:
    """Return whether the pool of this thread was stopped; False in a thread of no pool."""
    return getattr(_thread, "stop", _NEVER).is_set()


def side_by_side(
    function: Callable[[T], R],
    items: Sequence[T],
    workers: int | None = None,
    show: ShowProgress = silent,
    unit: str = "programs",
) -> list[R]:
    """Return ``function``, which runs programs, of each item, in order; ``workers`` (default: the CPUs) at a time."""
    with JudgePool(workers or os.cpu_count() or 1) as pool, pool.stopped_by_errors():
        results = []
        for result in pool.map(function, items):
            results.append(result)
            show(Progress(len(results), len(items), unit))
        return results
