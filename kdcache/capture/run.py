"""Phase one, top to bottom: skip what is written, run the teacher, sparsify, write.

    kd cache-teacher --teacher embedded --examples builtin --limit 50 --out data/first

The plan (``plan.py``) says what will be in which shard. A shard is written when its last answer is in, as a whole or
not at all. So the same command, run again after any interruption, continues with the shards that are missing.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from kdcache.cache import manifest, writer
from kdcache.cache.format import FORMAT_VERSION, CacheRow
from kdcache.capture import folder
from kdcache.capture.plan import Plan, Shard
from kdcache.capture.requests import Question, answered, questions_of
from kdcache.capture.space import bytes_per_token, needs_space
from kdcache.errors import KDError
from kdcache.examples.types import BadRow, Example
from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.judge.sandbox.pool import JudgePool
from kdcache.progress import Progress, ShowProgress, silent
from kdcache.prompts.thoughts import whole_turn
from kdcache.prompts.tokenize import Prompts
from kdcache.storage import folders, lock
from kdcache.teachers import Answer, Refusal, Request, Say, Teacher
from kdcache.teachers.device import runs_on_gpu
from kdcache.teachers.engine import load


def run(
    plan: Plan,
    show: ShowProgress = silent,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the missing shards of a plan, and return the manifest.

    Once ``stop`` returns True, no further shard is begun: those that are begun are finished, and the manifest is not
    complete. ``say`` receives what the user should know about the engine.
    """
    with folders.held(plan.config.out, folders.CACHE):
        _write_missing(plan, show, stop, say)
        return write_manifest(plan)


def run_slice(
    plan: Plan,
    show: ShowProgress = silent,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the missing shards of a plan's slice, beside the processes of other slices; return facts about the slice.

    Slices do not write the manifest, which would be a race; ``kd cache info`` does when all are finished.
    """
    assert plan.config.plan_slice is not None
    with lock.held_slice(plan.config.out, *plan.config.plan_slice):
        tally = _write_missing(plan, show, stop, say)
    assigned = plan.assigned_shards()
    missing = {shard.name for shard in plan.missing(plan.shards)}
    missing_assigned = sum(shard.name in missing for shard in assigned)
    return {
        "cache": str(plan.config.out),
        "plan_slice": "/".join(map(str, plan.config.plan_slice)),
        "complete": not missing_assigned,
        "shards": len(assigned) - missing_assigned,
        "shards_planned": len(assigned),
        "samples_now": tally.answers,
        "completion_tokens_now": tally.tokens,
        "shards_missing_in_the_cache": len(missing),
        "fingerprint": plan.fingerprint,
    }


def _write_missing(plan: Plan, show: ShowProgress, stop: Callable[[], bool], say: Say) -> Tally:
    """Write the shards that are assigned to this process and missing, and return what was counted on the way."""
    folder.check_and_drop_stale_claim(plan)
    todo = plan.todo()
    tally = expected(plan, todo)
    if not todo:
        folder.prepare(plan)
        return tally
    sandbox = sandbox_for(plan)
    # The engine starts before the folder is touched: if it cannot start, --overwrite has deleted nothing.
    teacher = load(plan.config.engine, plan.engine_options(), say)
    folder.prepare(plan)
    tally.started = time.monotonic()
    show = folder.dropping_old_cache(plan, show)  # the overwritten cache is deleted at the first answer
    fill(plan, todo, teacher, tally, lambda: show(tally.progress()), stop, sandbox)
    return tally


def write_manifest(plan: Plan) -> dict[str, Any]:
    """Write the manifest from the shards, and return it. KDError for rejected rows under --strict."""
    with needs_space(plan.config.out, "manifest.json", 500 * len(plan.shards) + 10_000):
        content = manifest.rebuild(plan.config.out)
    if plan.config.strict and content["rejected"]:
        raise KDError(f"--strict: {content['rejected']} rows were rejected; see {plan.config.out}/rejected.jsonl")
    return content


def sandbox_for(plan: Plan) -> Sandbox | None:
    """Return where answers that are programs will run; None if there are none. KDError where no sandbox works."""
    if not plan.config.verify:
        return None
    examples = (example for shard in plan.shards for example in shard.examples)
    try:
        return verifiers.sandbox_for(
            (example.verifier for example in examples if isinstance(example, Example)), plan.config.unsafe_exec
        )
    except KDError as error:
        raise KDError(f"{error}; or --no-verify, and kd verify-answers later") from None


# --- what is counted --------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How far a run has come. ``fill`` counts up; ``progress`` turns the counts into what the user sees."""

    shards_written: int = 0  # those of earlier runs included
    shards: int = 0
    answers: int = 0  # of this run
    samples: int = 0  # that this run will ask for, as far as is known
    tokens: int = 0  # of completions, in this run
    started: float = field(default_factory=time.monotonic)

    def progress(self, workers: str = "") -> Progress:
        """Return the state for the user; ``workers`` says how many processes share the work, if several do."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        shard = f"shard {min(self.shards_written + 1, self.shards)}/{self.shards}"
        return Progress(
            done=self.answers,
            total=self.samples,
            unit="samples",
            note="  ".join(filter(None, [shard, workers, f"{self.tokens / seconds:,.0f} tokens/s"])),
            seconds_left=seconds / self.answers * max(self.samples - self.answers, 0) if self.answers else None,
        )


def expected(plan: Plan, todo: list[Shard]) -> Tally:
    """Return the tally of a run that is about to write ``todo``."""
    assigned = len(plan.assigned_shards())
    samples = sum(len(shard.examples) for shard in todo) * plan.samples_per_example
    return Tally(shards_written=assigned - len(todo), shards=assigned, samples=samples)


# --- from shards to answers to shards ---------------------------------------------------------------------------------
#
# ``fill`` keeps three kinds of threads busy at the same time. Each answer moves from left to right:
#
#     this thread: the engine         the background thread: NumPy, disk       the judges: one program each
#     -----------------------         ----------------------------------       ---------------------------
#     open a shard when the engine
#     has room, send its questions
#     answer of a question      --->  sparsify it into a row             --->  judge it, if it has a verifier
#     ... (other answers) ...                                                  ...
#     last answer of the shard  --->  wait for the shard's verdicts      <---  verdict
#                                     write the shard
#
# The engine answers in any order, and draws from the next shard while answers of the previous one are missing, so several
# shards are open at a time. The background thread works in the order in which it was handed work, so all rows of a shard
# are made before the shard is written. Its queue is bounded: if the disk is slower than the engine, the engine waits.


@dataclass
class OpenShard:
    """A shard whose answers are coming in. All dictionaries are by sample_id."""

    shard: Shard
    questions: dict[str, Question] = field(default_factory=dict)  # in the plan's order
    rejected: list[BadRow] = field(default_factory=list)
    answers: int = 0  # counted by the engine's thread
    rows: dict[str, CacheRow] = field(default_factory=dict)  # made by the background thread
    verdicts: dict[str, Future[verifiers.Verdict]] = field(default_factory=dict)


def fill(
    plan: Plan,
    shards: Iterable[Shard],
    teacher: Teacher,
    tally: Tally,
    after_answer: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
    sandbox: Sandbox | None = None,
) -> None:
    """Ask the teacher for all samples of ``shards``, and write each shard when its last answer is in.

    A shard is drawn from ``shards`` when the engine has room for it. After each answer ``tally`` is counted up and
    ``after_answer`` is called. Errors of all threads are raised here; shards that are not written by then are dropped.
    """
    prompts = plan.open_prompts()
    open_shards: dict[str, OpenShard] = {}
    last_written = time.monotonic()

    def requests() -> Iterator[Request]:
        """Open one shard after the other; the engine draws from here when it has room."""
        for shard in shards:
            if stop():
                return
            opened = open_shards[shard.name] = open_shard(plan, prompts, shard)
            # The plan counted every example as equally many samples; some have fewer.
            tally.samples += len(opened.questions) - len(shard.examples) * plan.samples_per_example
            yield from [question.request for question in opened.questions.values()]
            if not opened.questions:
                close(opened)

    def close(opened: OpenShard) -> None:
        del open_shards[opened.shard.name]
        background(partial(write_and_count, opened))

    def write_and_count(opened: OpenShard) -> None:
        nonlocal last_written
        add_rewards(opened)
        written = time.monotonic()
        write(plan, opened, teacher, seconds=written - last_written)
        last_written = written
        tally.shards_written += 1

    # Left from right to left: an error first ends the judges' programs, for whose verdicts the background may be waiting.
    with JudgePool() as judges, Background() as background, judges.stopped_by_errors():
        for request, answer in teacher.run(requests()):
            shard_name, sample_id = request.key
            opened = open_shards[shard_name]
            question = opened.questions[sample_id]
            background(partial(add_answer, plan, prompts, opened, question, answer, judges, sandbox))
            opened.answers += 1
            tally.answers += 1
            tally.tokens += 0 if isinstance(answer, Refusal) else len(answer.completion_ids)
            if opened.answers == len(opened.questions):
                close(opened)
            after_answer()
    after_answer()


def open_shard(plan: Plan, prompts: Prompts, shard: Shard) -> OpenShard:
    """Return a shard with its questions; examples that cannot be asked about are rejected."""
    opened = OpenShard(shard)
    for example in shard.examples:
        for question in questions_of(plan, prompts, shard, example):
            if isinstance(question, BadRow):
                reject(plan, opened, question)
            else:
                opened.questions[question.sample_id] = question
    return opened


def add_answer(
    plan: Plan,
    prompts: Prompts,
    opened: OpenShard,
    question: Question,
    answer: Answer | Refusal,
    judges: JudgePool,
    sandbox: Sandbox | None,
) -> None:
    """Make the row of an answer, and hand the answer to the judges if its row has a verifier."""
    row = answered(plan, prompts, question, answer)
    if isinstance(row, BadRow):
        reject(plan, opened, row)
        return
    opened.rows[row.sample_id] = row
    if plan.config.verify and row.verifier is not None:
        turn = whole_turn(question.prompt, row.completion or "")
        verdict = judges.submit(verifiers.verify, row.verifier, turn, row.reference, sandbox)
        opened.verdicts[row.sample_id] = verdict


def add_rewards(opened: OpenShard) -> None:
    """Wait for the verdicts on a shard's answers, and put their rewards into the rows."""
    for sample_id, verdict in opened.verdicts.items():
        opened.rows[sample_id] = replace(opened.rows[sample_id], reward=verdict.result().reward)


def reject(plan: Plan, opened: OpenShard, row: BadRow) -> None:
    """Record a row that cannot be used in its shard; KDError under --strict."""
    if plan.config.strict:
        raise KDError(f"--strict: {row.source}:{row.row_id}: {row.reason}")
    opened.rejected.append(row)


def write(plan: Plan, opened: OpenShard, teacher: Teacher, seconds: float) -> None:
    """Write a shard whose answers are all in. ``seconds`` count from the shard before, so they sum to the run's."""
    config = plan.config
    rows = [opened.rows[sample_id] for sample_id in opened.questions if sample_id in opened.rows]
    metadata = {
        "format_version": FORMAT_VERSION,
        "fingerprint": plan.fingerprint,
        "date": str(plan.template_date),
        "precision": config.precision,
        "sparsify": str(plan.sparsifier),
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "engine": teacher.version,
        "hardware": "gpu" if runs_on_gpu(config.engine) else "cpu",
        "seconds": round(seconds, 1),
        "rejected": [asdict(row) for row in opened.rejected],
        "differs": Counter(
            question.differs
            for question in opened.questions.values()
            if question.differs and question.sample_id in opened.rows
        ),
    }
    tokens = sum(row.completion_tokens for row in rows)
    with needs_space(config.out, opened.shard.name, tokens * bytes_per_token(plan)):
        writer.write_shard(config.out / opened.shard.name, rows, config.precision, metadata)


class Background:
    """One thread that works while the engine goes on. Calling it queues work, and blocks if ``waiting`` pieces are queued.

    The first error ends its work, and is raised from the next call or at the end.
    """

    def __init__(self, waiting: int = 128):
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    work()
            except BaseException as error:
                self._error = error

    def __call__(self, work: Callable[[], None]) -> None:
        self._work.put(work)
        self._raise()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        """Wait until all work is finished or, after an error, until the piece in progress is."""
        self._error = self._error or error
        self._work.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
