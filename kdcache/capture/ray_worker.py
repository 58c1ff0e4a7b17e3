"""The actors of a capture on Ray: workers that hold an engine each, and the queue that hands them shards.

``kdcache.capture.ray`` drives them. Nothing here writes the manifest: workers write shards and nothing else.
"""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kdcache.capture.plan import Plan, Shard
from kdcache.capture.run import Tally, fill
from kdcache.errors import KDError
from kdcache.judge.sandbox import Sandbox
from kdcache.models import identity
from kdcache.teachers import Teacher
from kdcache.teachers.device import runs_on_gpu
from kdcache.teachers.engine import load

REPORT_SECONDS = 0.5


class ShardQueue:
    """Knows which shards are left, and which worker has begun which. An actor; none of its methods blocks.

    A shard's number is its place in the list that the queue was made with.
    """

    def __init__(self, shards: Sequence[Any]):
        self._shards = shards  # Ray's references: a shard's examples travel only to the worker that draws it
        self._left = deque(range(len(shards)))
        self._begun: dict[int, list[int]] = {}  # shard numbers, by worker
        self._tallies: dict[int, Tally] = {}  # by worker
        self._closed = False

    def draw(self, worker: int) -> list[Any]:
        """Return the next shard's reference in a list (Ray would resolve a bare one); an empty list if none is left."""
        if self._closed or not self._left:
            return []
        number = self._left.popleft()
        self._begun.setdefault(worker, []).append(number)
        return [self._shards[number]]

    def report(self, worker: int, tally: Tally) -> None:
        """Record how far a worker has come."""
        self._tallies[worker] = tally

    def tallies(self) -> dict[int, Tally]:
        return self._tallies

    def begun(self, worker: int) -> list[int]:
        """Return the shards that a worker has drawn, written or not."""
        return self._begun.get(worker, [])

    def put_back(self, worker: int, missing: Sequence[int]) -> None:
        """Queue the shards that a lost worker had begun and not written; they are drawn before all others."""
        self._left.extendleft(reversed(missing))
        tally = self._tallies.setdefault(worker, Tally())
        tally.shards_written = len(self._begun.pop(worker, [])) - len(missing)

    def close(self) -> None:
        """Hand out no further shard."""
        self._closed = True


class Worker:
    """One engine. An actor; an error in one of its methods is raised where the driver reads the method's result."""

    def __init__(self, plan: Plan, number: int, shard_queue: Any, sandboxed: bool):
        self._plan, self._number, self._queue, self._sandboxed = plan, number, shard_queue, sandboxed
        self._sandbox: Sandbox | None = None
        self._teacher: Teacher | None = None

    def start(self, driver_has_gpu: bool) -> list[str]:
        """Start the engine, with the very teacher of the plan; return what the user should know about the engine."""
        import ray

        plan, config, node = self._plan, self._plan.config, platform.node()
        if self._sandboxed:
            self._sandbox = Sandbox(config.unsafe_exec)
            self._sandbox.check()
        if runs_on_gpu(config.engine) != driver_has_gpu and (config.dtype == "auto" or config.max_model_len is None):
            raise KDError(
                f"{node} {'has no' if driver_has_gpu else 'has a'} GPU, unlike the driver's machine: give --dtype and "
                "--max-model-len, whose defaults depend on the machine"
            )
        model = identity.model_folder(config.teacher, identity.revision(plan.model) or config.revision)
        if identity.weights_hash(model) != plan.fields["weights"]:
            raise KDError(f"{node}: the weights of {config.teacher} there are not those that the driver has")
        if identity.tokenizer_hash(model) != plan.fields["tokenizer"]:
            raise KDError(f"{node}: the tokenizer of {config.teacher} there is not the one that the driver has")
        self._ray = ray
        self._plan = replace(plan, model=model)
        sentences: list[str] = []
        self._teacher = load(config.engine, self._plan.engine_options(), sentences.append)
        return sentences

    def run(self) -> None:
        """Draw shards and fill them until none is left."""
        out = self._plan.config.out
        if not (out / "plan.json").is_file():
            raise KDError(f"{platform.node()} does not see {out}: --out must be a folder that all nodes share")
        assert self._teacher is not None
        tally, reported = Tally(), 0.0

        def report() -> None:
            nonlocal reported
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                self._queue.report.remote(self._number, tally)

        fill(self._plan, self._shards(), self._teacher, tally, report, sandbox=self._sandbox)
        self._ray.get(self._queue.report.remote(self._number, tally))

    def _shards(self) -> Iterator[Shard]:
        while drawn := self._ray.get(self._queue.draw.remote(self._number)):
            yield self._ray.get(drawn[0])
