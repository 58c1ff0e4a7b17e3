"""Phase one on Ray: several engines fill one cache, and a worker that dies costs the shards it had begun.

    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples rows.jsonl --out /shared/qwen --ray auto --workers 8

The plan is the very one that one process follows. A *worker* is a Ray actor that holds one engine and feeds it with
``capture.fill``, drawing the next shard from the *desk* whenever the engine has room; the desk is an actor that knows
which worker has which shard. The driver starts workers, shows what they report, puts the shards of a lost one back on the
desk and a new worker in its place, and sums the manifest at the end: workers write shards and nothing else. All of them
need the folder of the cache under one path.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache import extras, models
from kdcache.capture import run as capture
from kdcache.capture.plan import Plan, Shard
from kdcache.capture.run import Progress
from kdcache.errors import KDError, UsageError, first_line
from kdcache.judge.sandbox import Sandbox
from kdcache.models import identity
from kdcache.storage import folders
from kdcache.teachers import Say, Teacher, load, runs_on_gpu

LOCAL = "local"
#: So many workers may die one after the other without a shard written between; then it is not bad luck.
MAX_LOSSES = 3
REPORT_SECONDS = 0.5
#: What a node's workers are told of the driver's environment; never a token or a key.
PASSED_ON = ("VLLM_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "TORCH_", "HF_HUB_DISABLE_", models.TRUST)


@dataclass(frozen=True)
class Workers:
    """Where and how many: ``address`` is LOCAL (this machine), ``auto`` (the cluster it is part of) or HOST:PORT."""

    address: str | None = LOCAL
    count: int | None = None  # None: as many as there are GPUs for, else one
    gpus: float | None = None  # of each worker; None: as many as its engine's parallelism asks for

    def gpus_each(self, plan: Plan) -> float:
        extra = plan.config.engine_extra
        engine = int(extra.get("tensor_parallel_size", 1)) * int(extra.get("pipeline_parallel_size", 1))
        if self.gpus is None:
            return engine if engine > 1 or runs_on_gpu(plan.config.engine) else 0
        if engine > 1 and self.gpus < engine:
            raise UsageError(f"--gpus-per-worker {self.gpus:g}: the engine's parallelism asks for {engine}")
        return self.gpus


@dataclass
class Report:
    """What one worker has done."""

    shards: int = 0
    samples: int = 0
    tokens: int = 0
    more_samples: int = 0  # than the plan counted: some examples have one sample more or less


class Desk:
    """Which shards are left, and who has which. Runs as an actor; nothing in it blocks."""

    def __init__(self, shards: Sequence[Any]):
        self._shards = shards  # Ray's references: a shard's examples travel to the worker that takes it
        self._left = deque(range(len(shards)))
        self._begun: dict[int, list[int]] = {}  # by worker
        self._reports: dict[int, Report] = {}
        self._closed = False

    def draw(self, worker: int) -> list[Any]:
        """The next shard's reference, in a list (Ray would resolve a bare one); an empty one if there is none."""
        if self._closed or not self._left:
            return []
        number = self._left.popleft()
        self._begun.setdefault(worker, []).append(number)
        return [self._shards[number]]

    def report(self, worker: int, report: Report) -> None:
        self._reports[worker] = report

    def reports(self) -> dict[int, Report]:
        return self._reports

    def begun(self, worker: int) -> list[int]:
        return self._begun.get(worker, [])

    def put_back(self, worker: int, missing: Sequence[int]) -> None:
        """A lost worker's shards that were not written are the next to be drawn."""
        self._left.extendleft(reversed(missing))
        report = self._reports.setdefault(worker, Report())
        report.shards = len(self._begun.pop(worker, [])) - len(missing)

    def close(self) -> None:
        self._closed = True


class Worker:
    """One engine. Runs as an actor; what goes wrong is raised from its methods, and Ray carries it to the driver."""

    def __init__(self, plan: Plan, number: int, desk: Any, sandboxed: bool):
        self._plan, self._number, self._desk, self._sandboxed = plan, number, desk, sandboxed
        self._teacher: Teacher | None = None

    def start(self, driver_has_gpu: bool) -> list[str]:
        """Start the engine, of the very teacher that the plan names; returns what the user should know of it."""
        import ray

        plan, config = self._plan, self._plan.config
        if self._sandboxed:
            self._sandbox: Sandbox | None = Sandbox(config.unsafe_exec)
            self._sandbox.check()
        else:
            self._sandbox = None
        if runs_on_gpu(config.engine) != driver_has_gpu and (config.dtype == "auto" or config.max_model_len is None):
            raise KDError(
                f"{platform.node()} {'has no' if driver_has_gpu else 'has a'} GPU, and the driver's machine is the other "
                "way: name --dtype and --max-model-len, which would follow from the driver's"
            )
        plan.model = identity.model_folder(config.teacher, identity.revision(plan.model) or config.revision)
        if identity.weights_hash(plan.model) != plan.fields["weights"]:
            raise KDError(f"{platform.node()}: the weights of {config.teacher} there are not those that the driver has")
        self._ray = ray
        said: list[str] = []
        self._teacher = load(config.engine, plan.engine_options(), said.append)
        return said

    def run(self) -> None:
        """Take shards until there are none."""
        out = self._plan.config.out
        if not (out / "plan.json").is_file():
            raise KDError(f"{platform.node()} does not see {out}: --out must be a folder that all nodes share")
        assert self._teacher is not None
        state, reported = Progress(), 0.0

        def report(state: Progress, at_once: bool = False) -> None:
            nonlocal reported
            if at_once or time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                found = Report(state.shards_done, state.samples_done, state.tokens_done, state.samples)
                sent = self._desk.report.remote(self._number, found)
                if at_once:
                    self._ray.get(sent)

        capture.fill(self._plan, self._shards(), self._teacher, state, report, sandbox=self._sandbox)
        report(state, at_once=True)

    def _shards(self) -> Iterator[Shard]:
        while drawn := self._ray.get(self._desk.draw.remote(self._number)):
            yield self._ray.get(drawn[0])


def run(
    plan: Plan,
    workers: Workers,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """``capture.run`` by several workers: do what is missing of a plan, and return the manifest."""
    with folders.held(plan.config.out, folders.CACHE):
        capture.check_folder(plan)
        todo = plan.todo()
        if not todo:
            capture.prepare(plan)
        else:
            with _connected(plan, workers) as (ray, count, gpus):
                _Driver(ray, plan, todo, gpus).work(count, capture.begun(plan, progress), stop, say)
        return capture.sum_up(plan)


class _Driver:
    """Hires workers, watches them, replaces the lost."""

    def __init__(self, ray: Any, plan: Plan, todo: list[Shard], gpus: float):
        self._ray, self._plan, self._todo = ray, plan, todo
        self._state = capture.expected(plan, todo)
        self._done_before, self._planned_samples = self._state.shards_done, self._state.samples
        self._sandboxed = capture.sandbox_for(plan) is not None
        self._numbers = itertools.count()
        self._losses = self._written_at_loss = self._redone = 0
        self._actors: dict[int, Any] = {}
        # The plan goes to every worker, its examples only shard by shard.
        self._bare = copy.copy(plan)
        self._bare.examples, self._bare.shards = [], []
        out = plan.config.out.absolute() if isinstance(plan.config.out, Path) else plan.config.out
        self._bare.config = replace(plan.config, out=out, overwrite=False)
        self._bare_ref = ray.put(self._bare)
        self._desk = ray.remote(Desk).options(num_cpus=0).remote([ray.put(shard) for shard in todo])
        self._actor_class = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0)

    def work(self, count: int, progress: Callable[[Progress], None], stop: Callable[[], bool], say: Say) -> None:
        said: set[str] = set()  # many workers have the same to say
        starting: dict[Any, int] = {}
        running: dict[Any, int] = {}
        claimed = closed = False
        try:
            for _ in range(min(count, len(self._todo))):
                starting |= self._hire()
            while running or (starting and not closed and self._left()):
                done, _ = self._ray.wait([*starting, *running], timeout=REPORT_SECONDS)
                for ref in done:
                    started = ref in starting
                    number = starting.pop(ref) if started else running.pop(ref)
                    if not self._returned(ref):
                        self._lost(number)
                        starting |= self._hire() if self._left() and not closed else {}
                    elif started:
                        for sentence in self._ray.get(ref):
                            if sentence not in said:
                                say(sentence)
                            said.add(sentence)
                        if not claimed:  # now that an engine runs: if none can start, --overwrite has deleted nothing
                            capture.prepare(self._plan)
                            self._state.started = time.monotonic()
                            claimed = True
                        running |= {self._actors[number].run.remote(): number}
                    else:
                        del self._actors[number]
                if not closed and stop():
                    self._desk.close.remote()
                    closed = True
                self._look(len(running))
                if self._state.samples_done:
                    progress(self._state)
            if not claimed:
                capture.prepare(self._plan)
            progress(self._state)
        finally:
            for actor in self._actors.values():
                self._ray.kill(actor)

    def _hire(self) -> dict[Any, int]:
        number = next(self._numbers)
        actor = self._actor_class.remote(self._bare_ref, number, self._desk, self._sandboxed)
        self._actors[number] = actor
        return {actor.start.remote(runs_on_gpu(self._plan.config.engine)): number}

    def _left(self) -> bool:
        return any(not self._is_written(shard) for shard in self._todo)

    def _is_written(self, shard: Shard) -> bool:
        return (self._plan.config.out / shard.name).exists()

    def _returned(self, ref: Any) -> bool:
        """Whether a call of a worker ended well; False if the worker is no more. Its own errors are raised here."""
        from ray import exceptions

        try:
            self._ray.get(ref)
        except exceptions.RayTaskError as error:
            raise _as_one_sentence(error.cause) from None
        except exceptions.RayError:
            return False
        return True

    def _lost(self, number: int) -> None:
        """Put back what a lost worker had begun and not written. KDError if that goes on and nothing gets done."""
        with contextlib.suppress(Exception):  # it is dead, or not to be reached: then it must not come back
            self._ray.kill(self._actors[number])
        del self._actors[number]
        begun = self._ray.get(self._desk.begun.remote(number))
        missing = [index for index in begun if not self._is_written(self._todo[index])]
        reported = self._ray.get(self._desk.reports.remote()).get(number, Report())
        per = self._plan.samples_per_example
        kept = sum(len(self._todo[index].examples) * per for index in begun if index not in missing)
        self._redone += max(reported.samples - kept, 0)
        self._ray.get(self._desk.put_back.remote(number, missing))
        self._look(0)
        self._state.lost += 1
        self._losses = 1 + (self._losses if self._state.shards_done == self._written_at_loss else 0)
        self._written_at_loss = self._state.shards_done
        if self._losses > MAX_LOSSES:
            raise KDError(
                f"{self._losses} workers died one after the other and no shard was written between; whole shards are kept. Out of "
                "memory? Lower --workers, --max-num-batched-tokens or --gpu-memory-utilization, and run the same command again"
            )

    def _look(self, alive: int) -> None:
        from ray import exceptions

        try:
            reports = self._ray.get(self._desk.reports.remote()).values()
        except exceptions.RayError as error:
            raise KDError(
                f"Ray lost the actor that hands out the shards ({first_line(error)}); whole shards are kept: run the same "
                "command again"
            ) from None
        state = self._state
        state.workers = alive
        state.shards_done = self._done_before + sum(report.shards for report in reports)
        state.samples_done = sum(report.samples for report in reports)
        state.tokens_done = sum(report.tokens for report in reports)
        state.samples = self._planned_samples + self._redone + sum(report.more_samples for report in reports)


def _as_one_sentence(cause: BaseException) -> KDError:
    if isinstance(cause, KDError):
        return cause
    return KDError(f"a worker failed: {type(cause).__name__}: {first_line(cause)}. Whole shards are kept")


@contextlib.contextmanager
def _connected(plan: Plan, workers: Workers) -> Iterator[tuple[Any, int, float]]:
    """Ray, how many workers, GPUs of each; KDError if it is missing or has no room for one worker."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that it will be so one day
    try:
        import ray
    except ImportError:
        raise extras.missing("ray") from None
    gpus = workers.gpus_each(plan)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if workers.address == LOCAL:
            cores = os.cpu_count() or 1
            if not gpus:  # Ray would give each engine one thread
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (workers.count or 1))))
            ray.init(
                num_cpus=workers.count or cores,  # what Ray counts: one for each worker
                include_dashboard=False,
                object_store_memory=256_000_000,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
            ray.init(address=workers.address, runtime_env={"env_vars": passed}, **quiet)
    except Exception as error:
        raise KDError(f"--ray {workers.address}: Ray could not be started or reached: {first_line(error)}") from None
    # Ray prints what it thinks of a lost worker to stdout, where data goes; it is counted in the progress line.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.ExitStack() as leaving:
        leaving.callback(ray.shutdown)
        there = ray.cluster_resources()
        if gpus > there.get("GPU", 0) or there.get("CPU", 0) < 1:
            raise KDError(
                f"--gpus-per-worker {gpus:g}: Ray has {there.get('GPU', 0):g} GPUs and {there.get('CPU', 0):g} CPUs in all, "
                "so no worker would ever start"
            )
        yield ray, workers.count or (max(1, int(there["GPU"] // gpus)) if gpus else 1), gpus
