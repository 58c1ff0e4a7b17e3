"""Read batches ahead: the next ones are made in a thread while the student trains on the ones before."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

from trainer.data.pack import Batch

_END = object()


def read_ahead(batches: Iterator[Batch], depth: int = 4) -> Generator[Batch]:
    """Yield the same batches, but make up to ``depth`` of them ahead in a thread.

    An error in the thread is raised where its batch would have been yielded. Closing this iterator ends the thread.
    """
    ready: queue.Queue[Any] = queue.Queue(depth)  # batches, then _END or an error
    closed = threading.Event()

    def make() -> None:
        item: Any = _END
        try:
            for batch in batches:
                if not put(batch):
                    return
        except BaseException as error:  # raised by the consumer, below
            item = error
        put(item)

    def put(item: Any) -> bool:
        """Wait for room in the queue; return False if the consumer has closed instead."""
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    thread = threading.Thread(target=make, name="kd-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
