"""Phase one on Ray: several engines fill one cache, and a worker that dies costs only the shards it had begun.

    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples rows.jsonl --out /shared/qwen --ray auto --workers 8

The plan is the same as for one process. A *worker* is a Ray actor that holds one engine and fills shards with
``kdcache.capture.run.fill``; it draws the next shard from a *queue*, another actor, when its engine has room. The
*driver* starts the workers, replaces those that die, shows progress, and writes the manifest at the end. All of them
must see the cache's folder under one path.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdcache import extras, models
from kdcache.capture import folder
from kdcache.capture.plan import Plan, Shard
from kdcache.capture.ray_worker import REPORT_SECONDS, ShardQueue, Worker
from kdcache.capture.run import Tally, expected, sandbox_for, write_manifest
from kdcache.errors import KDError, UsageError, first_line
from kdcache.progress import ShowProgress, silent
from kdcache.storage import atomic, folders
from kdcache.teachers import Say
from kdcache.teachers.device import runs_on_gpu

LOCAL = "local"
#: This many workers may die in succession without a shard written in between. After one more, the run ends.
MAX_LOSSES = 3
#: The driver's environment variables that the workers get, by how they begin. None of them holds a token or a key.
PASSED_ON = ("VLLM_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "TORCH_", "HF_HUB_DISABLE_", models.TRUST)


@dataclass(frozen=True)
class RayOptions:
    """Where the workers run, and how many."""

    address: str = LOCAL  # LOCAL (this machine), ``auto`` (the cluster it belongs to) or HOST:PORT
    workers: int | None = None  # None: as many as there are GPUs for, else one
    gpus_per_worker: float | None = None  # None: as many as the engine's parallelism asks for

    def gpus(self, plan: Plan) -> float:
        """Return the GPUs of each worker."""
        extra = plan.config.engine_extra
        engine = int(extra.get("tensor_parallel_size", 1)) * int(extra.get("pipeline_parallel_size", 1))
        if self.gpus_per_worker is None:
            return engine if engine > 1 or runs_on_gpu(plan.config.engine) else 0
        if engine > 1 and self.gpus_per_worker < engine:
            raise UsageError(f"--gpus-per-worker {self.gpus_per_worker:g}: the engine's parallelism asks for {engine}")
        return self.gpus_per_worker


def run(
    plan: Plan,
    options: RayOptions,
    show: ShowProgress = silent,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the missing shards of a plan with several workers, and return the manifest.

    The arguments are those of ``kdcache.capture.run.run``.
    """
    with folders.held(plan.config.out, folders.CACHE):
        folder.check_and_drop_stale_claim(plan)
        todo = plan.todo()
        if not todo:
            folder.prepare(plan)
        else:
            with _connected(plan, options) as connection:
                Driver(connection, plan, todo).work(folder.dropping_old_cache(plan, show), stop, say)
        return write_manifest(plan)


# --- the driver -------------------------------------------------------------------------------------------------------
#
# The life of a worker. Its state is which of its two methods it is in; Ray says when a method returns.
#
#                 start() returns                run() returns: no shard is left
#     STARTING ---------------------> RUNNING ------------------------------------> finished
#        |                               |
#        |        its process dies       |
#        +---------------+---------------+
#                        v
#                      lost: a new worker starts, if shards are left
#
# An error raised by start() or run() is not a loss. It would meet every worker, so it ends the capture.
#
# The life of a shard. Only the folder says what is written; what workers report serves the progress line.
#
#     queued ---- drawn by a worker ----> begun ---- its file exists ----> written
#       ^                                   |
#       +-- its worker is lost, no file ----+
#
# Ctrl-C closes the queue: begun shards are finished, and queued ones stay for the next run.


@dataclass(frozen=True)
class Connection:
    """A connection to Ray, and what was asked of it."""

    ray: Any
    workers: int
    gpus: float  # of each worker


@dataclass
class RunningCall:
    """A worker, and which of its methods has been called and has not returned."""

    number: int
    actor: Any
    is_started: bool = False  # False: in start(); True: in run()


class Driver:
    """Start workers, watch them, and replace those that are lost."""

    def __init__(self, connection: Connection, plan: Plan, todo: list[Shard]):
        self._connection, self._ray, self._plan, self._todo = connection, connection.ray, plan, todo
        self._before = expected(plan, todo)
        self._tally = expected(plan, todo)
        self._sandboxed = sandbox_for(plan) is not None
        self._numbers = itertools.count()
        self._calls: dict[Any, RunningCall] = {}  # by Ray's reference of the result
        self._is_claimed = self._is_closed = False
        self._lost = 0
        self._losses_in_succession = self._written_at_last_loss = 0
        self._repeated_answers = 0  # of lost workers, for shards that they did not write
        self._sentences: set[str] = set()  # that the user has read: many workers say the same
        # Each worker gets the plan without the shards; each shard goes to the worker that draws it.
        out = plan.config.out.absolute() if isinstance(plan.config.out, Path) else plan.config.out
        config = replace(plan.config, out=out, overwrite=False)
        self._plan_reference = self._ray.put(replace(plan, config=config, shards=()))
        references = [self._ray.put(shard) for shard in todo]
        self._queue = self._ray.remote(ShardQueue).options(num_cpus=0).remote(references)
        self._worker_class = self._ray.remote(Worker).options(num_cpus=1, num_gpus=connection.gpus, max_restarts=0)

    def work(self, show: ShowProgress, stop: Callable[[], bool], say: Say) -> None:
        """Return when every shard is written, or when ``stop`` was heeded and the begun shards are written."""
        try:
            for _ in range(min(self._connection.workers, len(self._todo))):
                self._start_worker()
            while self._is_busy():
                returned, _ = self._ray.wait(list(self._calls), timeout=REPORT_SECONDS)
                for reference in returned:
                    self._on_return(reference, say)
                if not self._is_closed and stop():
                    self._queue.close.remote()
                    self._is_closed = True
                self._read_tallies()
                if self._tally.answers:
                    show(self._tally.progress(self._workers()))
            if not self._todo:  # else the first engine that runs claims the folder, and no other may touch it
                folder.prepare(self._plan)
            if self._lost:
                atomic.remove_leftovers(self._plan.config.out / "data")  # what lost workers of this machine half wrote
            show(self._tally.progress(self._workers()))
        finally:
            for call in self._calls.values():
                self._ray.kill(call.actor)

    def _is_busy(self) -> bool:
        """Return whether to wait: for running workers always, for starting ones only while there is work for them."""
        running = any(call.is_started for call in self._calls.values())
        return running or (bool(self._calls) and not self._is_closed and self._has_shards_left())

    def _start_worker(self) -> None:
        number = next(self._numbers)
        actor = self._worker_class.remote(self._plan_reference, number, self._queue, self._sandboxed)
        reference = actor.start.remote(runs_on_gpu(self._plan.config.engine))
        self._calls[reference] = RunningCall(number, actor)

    def _on_return(self, reference: Any, say: Say) -> None:
        """Move a worker to its next state."""
        call = self._calls.pop(reference)
        try:
            sentences = self._result(reference)
        except WorkerLost:
            self._on_loss(call)
            if self._has_shards_left() and not self._is_closed:
                self._start_worker()
            return
        if call.is_started:
            return  # finished
        for sentence in sentences:
            if sentence not in self._sentences:
                say(sentence)
            self._sentences.add(sentence)
        if not self._is_claimed:  # the first engine runs: if none could start, --overwrite has deleted nothing
            folder.prepare(self._plan)
            self._tally.started = time.monotonic()
            self._is_claimed = True
        call.is_started = True
        self._calls[call.actor.run.remote()] = call

    def _result(self, reference: Any) -> Any:
        """Return what a worker's method returned. WorkerLost if the worker is gone; its own errors become KDErrors."""
        from ray import exceptions

        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise as_one_sentence(error.cause) from None
        except exceptions.RayError:
            raise WorkerLost from None

    def _on_loss(self, call: RunningCall) -> None:
        """Queue again what a lost worker had begun and not written. KDError if losses go on without progress."""
        with contextlib.suppress(Exception):  # if it is only out of reach, it must not come back
            self._ray.kill(call.actor)
        begun = self._ray.get(self._queue.begun.remote(call.number))
        missing = [number for number in begun if not self._is_written(self._todo[number])]
        kept_answers = sum(
            len(self._todo[number].examples) * self._plan.samples_per_example
            for number in begun
            if number not in missing
        )
        reported = self._ray.get(self._queue.tallies.remote()).get(call.number, Tally())
        self._repeated_answers += max(reported.answers - kept_answers, 0)
        self._ray.get(self._queue.put_back.remote(call.number, missing))
        self._read_tallies()
        self._lost += 1
        is_progress = self._tally.shards_written > self._written_at_last_loss
        self._losses_in_succession = 1 if is_progress else self._losses_in_succession + 1
        self._written_at_last_loss = self._tally.shards_written
        if self._losses_in_succession > MAX_LOSSES:
            raise KDError(
                f"{self._losses_in_succession} workers died one after the other, and no shard was written in between; "
                "whole shards are kept. Out of memory? Lower --workers, --max-num-batched-tokens or "
                "--gpu-memory-utilization, and run the same command again"
            )

    def _has_shards_left(self) -> bool:
        return any(not self._is_written(shard) for shard in self._todo)

    def _is_written(self, shard: Shard) -> bool:
        if self._plan.config.overwrite and not self._is_claimed:
            return False  # shards of this name are those of the cache that will be overwritten
        return (self._plan.config.out / shard.name).exists()

    def _read_tallies(self) -> None:
        """Sum the workers' tallies, those of lost workers included."""
        from ray import exceptions

        try:
            tallies = self._ray.get(self._queue.tallies.remote()).values()
        except exceptions.RayError as error:
            raise KDError(
                f"Ray lost the actor that hands out the shards ({first_line(error)}); whole shards are kept: run the "
                "same command again"
            ) from None
        self._tally.shards_written = self._before.shards_written + sum(tally.shards_written for tally in tallies)
        self._tally.answers = sum(tally.answers for tally in tallies)
        self._tally.tokens = sum(tally.tokens for tally in tallies)
        corrections = sum(tally.samples for tally in tallies)  # each worker counts how far the plan was off
        self._tally.samples = self._before.samples + self._repeated_answers + corrections

    def _workers(self) -> str:
        running = sum(call.is_started for call in self._calls.values())
        return f"{running} workers" + (f" ({self._lost} lost)" if self._lost else "")


class WorkerLost(Exception):
    """A worker's process has died, or its node is out of reach."""


def as_one_sentence(cause: BaseException) -> KDError:
    """Return a worker's own sentence, or one that names an error nobody expected."""
    if isinstance(cause, KDError):
        return cause
    return KDError(f"a worker failed: {type(cause).__name__}: {first_line(cause)}. Whole shards are kept")


# --- the connection ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(plan: Plan, options: RayOptions) -> Iterator[Connection]:
    """Start Ray or connect to it. KDError if it is not installed, out of reach, or has no room for one worker."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of a new default where it is unset
    try:
        import ray
    except ImportError:
        raise extras.missing("ray") from None
    gpus = options.gpus(plan)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if options.address == LOCAL:
            cores = os.cpu_count() or 1
            if not gpus:  # Ray would give each engine one thread
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // (options.workers or 1))))
            ray.init(
                num_cpus=options.workers or cores,  # Ray counts one for each worker
                include_dashboard=False,
                object_store_memory=256_000_000,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
        else:
            passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
            ray.init(address=options.address, runtime_env={"env_vars": passed}, **quiet)
    except Exception as error:
        raise KDError(f"--ray {options.address}: Ray could not be started or reached: {first_line(error)}") from None
    # Ray prints its opinion of a lost worker to stdout, where data goes. The progress line counts lost workers instead.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.ExitStack() as on_exit:
        on_exit.callback(ray.shutdown)
        resources = ray.cluster_resources()
        if gpus > resources.get("GPU", 0) or resources.get("CPU", 0) < 1:
            raise KDError(
                f"--gpus-per-worker {gpus:g}: Ray has {resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} "
                "CPUs in all, so no worker would ever start"
            )
        workers = options.workers or (max(1, int(resources["GPU"] // gpus)) if gpus else 1)
        yield Connection(ray, workers, gpus)
