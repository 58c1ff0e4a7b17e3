"""Phase one, top to bottom: skip what is done, run the teacher, sparsify, write.

    kd cache-teacher --teacher embedded --examples builtin --limit 50 --out data/first

``plan.py`` has fixed what will be in which shard. A shard is written when all its answers are in, whole or not at all;
so running the same command again after any interruption continues with the shards that are missing.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdcache import machine, storage
from kdcache.cache import manifest, sparsify, writer
from kdcache.cache.format import FORMAT_VERSION, SPLITS
from kdcache.capture.plan import Plan, Sample, Shard
from kdcache.errors import KDError
from kdcache.examples.types import BadRow
from kdcache.judge import rewards_file as judging
from kdcache.judge import verifiers
from kdcache.judge.sandbox import Sandbox
from kdcache.judge.sandbox.pool import JudgePool
from kdcache.prompts.thoughts import whole_turn
from kdcache.prompts.vocabulary import vocab_table
from kdcache.storage import Location, atomic, folders, lock
from kdcache.teachers import Answer, Refusal, Request, Say, Teacher, load, runs_on_gpu

#: Bytes a candidate (id and q8 log-probability) takes on disk; the rest of a row takes about 25 bytes a token.
#: Both measured on real text; used for the prediction of --dry-run alone.
BYTES_PER_CANDIDATE = {"q8": 2.3, "f32": 4.9}
OTHER_BYTES_PER_TOKEN = 25


@dataclass
class Progress:
    """Handed to the progress callback after every answer."""

    shards_done: int = 0
    shards: int = 0
    samples_done: int = 0
    tokens_done: int = 0
    samples: int = 0  # expected in this run
    workers: int = 0  # that are at it, where there are several
    lost: int = 0  # workers that died; others have taken over
    started: float = field(default_factory=time.monotonic)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_done / max(time.monotonic() - self.started, 1e-9)

    @property
    def eta_seconds(self) -> float | None:
        if not self.samples_done:
            return None
        return (time.monotonic() - self.started) / self.samples_done * max(self.samples - self.samples_done, 0)


@dataclass
class OpenShard:
    """A shard whose answers are coming in."""

    shard: Shard
    samples: dict[str, Sample] = field(default_factory=dict)  # by sample_id, in the plan's order
    rejected: list[BadRow] = field(default_factory=list)
    rows: dict[str, writer.Row] = field(default_factory=dict)  # by sample_id
    verdicts: dict[str, Future[verifiers.Verdict]] = field(default_factory=dict)  # of rows that have a verifier
    answers: int = 0


def run(
    plan: Plan,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Do what is missing of a plan, and return the manifest.

    Once ``stop`` says so, no further shard is begun: those begun are finished, and the manifest is not complete.
    ``say`` is told what the user should know of the engine.
    """
    with folders.held(plan.config.out, folders.CACHE):
        _work(plan, progress, stop, say)
        return sum_up(plan)


def run_slice(
    plan: Plan,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Do what is missing of a plan's slice, beside the processes that do the others; returns what is there of it.

    Slices write shards (the first to come also what is fixed before); the manifest is summed by ``kd cache info``.
    """
    assert plan.config.plan_slice is not None
    with lock.held_slice(plan.config.out, *plan.config.plan_slice):
        state = _work(plan, progress, stop, say)
    mine = plan.mine()
    missing = {shard.name for shard in plan.missing(plan.shards)}
    of_mine = sum(shard.name in missing for shard in mine)
    return {
        "cache": str(plan.config.out),
        "plan_slice": "/".join(map(str, plan.config.plan_slice)),
        "complete": not of_mine,
        "shards": len(mine) - of_mine,
        "shards_planned": len(mine),
        "samples_now": state.samples_done,
        "completion_tokens_now": state.tokens_done,
        "shards_missing_in_the_cache": len(missing),
        "fingerprint": plan.fingerprint,
    }


def _work(plan: Plan, progress: Callable[[Progress], None], stop: Callable[[], bool], say: Say) -> Progress:
    """Write the shards that are this process's and are missing."""
    check_folder(plan)
    todo = plan.todo()
    state = expected(plan, todo)
    sandbox = sandbox_for(plan) if todo else None
    # The engine first: if it cannot start, --overwrite has deleted nothing.
    teacher = load(plan.config.engine, plan.engine_options(), say) if todo else None
    prepare(plan)
    if teacher is not None:
        state.started = time.monotonic()
        fill(plan, todo, teacher, state, begun(plan, progress), stop, sandbox)
    return state


def begun(plan: Plan, progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """``progress`` that also deletes the old cache, which was set aside, at the first answer."""

    def shown(state: Progress) -> None:
        folders.drop(plan.config.out)
        progress(state)

    return shown


def check_folder(plan: Plan) -> None:
    """Refuse a folder that is something else; delete a claim under which no shard was ever written."""
    plan.check_folder()
    if plan.finds_stale_claim() and not plan.config.overwrite:
        assert isinstance(plan.config.out, Path)
        folders.delete(plan.config.out, folders.CACHE)


def expected(plan: Plan, todo: list[Shard]) -> Progress:
    """The state of a run that has ``todo`` before it."""
    mine = len(plan.mine())
    samples = sum(len(shard.examples) for shard in todo) * plan.samples_per_example
    return Progress(shards=mine, shards_done=mine - len(todo), samples=samples)


def prepare(plan: Plan) -> None:
    """Claim the folder, and strike what its manifest and rewards say of shards that are to be written anew.

    Slices of one plan do so one after the other: what a later one finds missing, an earlier one has struck already.
    """
    out = plan.config.out
    one_at_a_time = lock.held(out, ".lock-claim", wait=True) if plan.config.plan_slice else contextlib.nullcontext()
    with one_at_a_time:
        if plan.config.plan_slice:
            folders.recover(out, folders.CACHE)
        claim_folder(plan)
        missing = plan.missing(plan.shards)
        if missing:
            manifest.forget(out, [shard.name for shard in missing])
            judging.forget(out)


def sum_up(plan: Plan) -> dict[str, Any]:
    """Write the manifest, and return it."""
    with room_for(plan.config.out, "manifest.json", 500 * len(plan.shards) + 10_000):
        found = manifest.write(plan.config.out)
    if plan.config.strict and found["rejected"]:
        raise KDError(f"--strict: {found['rejected']} rows could not be taken; see {plan.config.out}/rejected.jsonl")
    return found


def claim_folder(plan: Plan) -> None:
    """Make the folder this plan's: everything that is fixed before the first row is run."""
    out = plan.config.out
    if plan.config.overwrite and (out / "plan.json").is_file():
        plan.check_folder()  # again: starting the engine took its time
        if isinstance(out, Path):
            folders.set_aside(out)
        else:
            empty(out)
    out.mkdir(parents=True, exist_ok=True)
    if not atomic.create_json(out / "plan.json", plan.as_json()):
        plan.check_folder(overwrite=False)  # it may have come from another run while the engine started
    (out / "data").mkdir(exist_ok=True)
    judging.prepare(out)
    for folder in (out, out / "data"):
        atomic.remove_leftovers(folder)
    if not (out / "vocab.parquet").is_file():
        with room_for(out, "vocab.parquet", 15 * plan.vocab_size):
            writer.write_table(out / "vocab.parquet", vocab_table(plan.prompts.tokenizer, plan.vocab_size))


def empty(cache: Location) -> None:
    """Delete a remote cache, plan.json last: interrupted anywhere, what is left is still a cache, to be overwritten."""
    assert not isinstance(cache, Path)
    for path in sorted(cache.below(), key=lambda path: path.name == "plan.json"):
        path.unlink(missing_ok=True)


class Background:
    """One thread that sparsifies and writes while the engine works on; what is waiting for it is bounded.

    The first error ends its work and is raised from the next call.
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
        """Wait for what was handed in; after an error, for the piece of work at hand only."""
        self._error = self._error or error
        self._work.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def fill(
    plan: Plan,
    todo: Iterable[Shard],
    teacher: Teacher,
    state: Progress,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    sandbox: Sandbox | None = None,
) -> None:
    """Feed the teacher from all shards to do in turn; write each shard when its last answer is in.

    Shards are drawn from ``todo`` as the engine has room for them.
    Answers are judged by their row's verifier in threads of their own, while the teacher goes on.
    """
    open_shards: dict[str, OpenShard] = {}
    written = time.monotonic()

    def requests() -> Iterator[Request]:
        for shard in todo:
            if stop():
                return
            opened = open_shards[shard.name] = OpenShard(shard)
            for example in shard.examples:
                for sample in plan.samples_of(shard, example):
                    if isinstance(sample, BadRow):
                        reject(plan, opened, sample)
                    else:
                        opened.samples[sample.sample_id] = sample
            state.samples += len(opened.samples) - len(shard.examples) * plan.samples_per_example
            for sample in opened.samples.values():
                yield sample.request
            if not opened.samples:
                finish(opened)

    def take(opened: OpenShard, sample: Sample, answer: Answer | Refusal) -> None:
        row = make_row(plan, sample, answer)
        if isinstance(row, BadRow):
            reject(plan, opened, row)
            return
        opened.rows[sample.sample_id] = row
        verifier = row.fields["verifier"]
        if plan.config.verify and verifier is not None:
            turn = whole_turn(row.fields["prompt"], row.fields["completion"])
            asked = (verifier, turn, row.fields["reference"], sandbox)
            opened.verdicts[sample.sample_id] = judges.submit(verifiers.verify, *asked)

    def finish(opened: OpenShard) -> None:
        del open_shards[opened.shard.name]
        background(lambda: put(opened))

    def put(opened: OpenShard) -> None:
        nonlocal written
        for sample_id, verdict in opened.verdicts.items():
            opened.rows[sample_id].fields["reward"] = verdict.result().reward
        now = time.monotonic()
        write(plan, opened, teacher, seconds=now - written)
        written = now
        state.shards_done += 1

    with JudgePool() as judges, Background() as background, judges.stopped_by_errors():
        for request, answer in teacher.run(requests()):
            shard_name, sample_id = request.key
            opened = open_shards[shard_name]
            background(partial(take, opened, opened.samples[sample_id], answer))
            opened.answers += 1
            state.samples_done += 1
            state.tokens_done += 0 if isinstance(answer, Refusal) else len(answer.completion_ids)
            if opened.answers == len(opened.samples):
                finish(opened)
            progress(state)
    progress(state)


def sandbox_for(plan: Plan) -> Sandbox | None:
    """Where answers that are programs are run; None if there are none. KDError if there is no such place."""
    if not plan.config.verify:
        return None
    asked = (example.verifier for example in plan.examples if not isinstance(example, BadRow))
    try:
        return verifiers.sandbox_for(asked, plan.config.unsafe_exec)
    except KDError as error:
        raise KDError(f"{error}; or --no-verify, and kd verify-answers later") from None


def reject(plan: Plan, opened: OpenShard, row: BadRow) -> None:
    """A row that cannot be taken is recorded with its shard, and the run goes on."""
    if plan.config.strict:
        raise KDError(f"--strict: {row.source}:{row.row_id}: {row.reason}")
    opened.rejected.append(row)


def make_row(plan: Plan, sample: Sample, answer: Answer | Refusal) -> writer.Row | BadRow:
    """The teacher's answer, sparsified, with what was known of the sample before; or why there is none to be kept."""
    fields = dict(sample.fields)
    if isinstance(answer, Refusal):
        return BadRow(fields["source"], sample.row_id, answer.reason)
    if not len(answer.completion_ids):
        return BadRow(fields["source"], sample.row_id, "the teacher answered nothing")
    finite = np.isfinite(answer.token_logprobs).all() and np.isfinite(answer.logprobs[:, 0]).all()
    if not finite or np.isnan(answer.logprobs).any():
        return BadRow(fields["source"], sample.row_id, "the teacher's log-probabilities are not finite numbers")
    if fields["origin"] == "sampled":
        fields["completion"] = plan.prompts.decode(answer.completion_ids)
        fields["finish_reason"] = answer.finish_reason
    return writer.Row(
        fields=fields,
        prompt_ids=sample.request.prompt_ids,
        completion_ids=answer.completion_ids,
        token_logprobs=answer.token_logprobs,
        token_ranks=answer.token_ranks,
        entropies=sparsify.entropies(answer.logprobs),
        candidates=plan.sparsifier(answer.ids, answer.logprobs, plan.config.seed, sample.sample_id),
    )


def write(plan: Plan, opened: OpenShard, teacher: Teacher, seconds: float) -> None:
    config = plan.config
    metadata = {
        "format_version": FORMAT_VERSION,
        "fingerprint": plan.fingerprint,
        "date": str(plan.date),
        "precision": config.precision,
        "sparsify": str(plan.sparsifier),
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "engine": teacher.version,
        "hardware": "gpu" if runs_on_gpu(config.engine) else "cpu",
        "seconds": round(seconds, 1),  # since the shard before: they sum to the run's
        "rejected": [asdict(row) for row in opened.rejected],
        "differs": Counter(s.differs for id_, s in opened.samples.items() if s.differs and id_ in opened.rows),
    }
    rows = [opened.rows[sample_id] for sample_id in opened.samples if sample_id in opened.rows]
    tokens = sum(len(row.completion_ids) for row in rows)
    with room_for(config.out, opened.shard.name, tokens * bytes_per_token(plan)):
        writer.write_shard(config.out / opened.shard.name, rows, config.precision, metadata)


@contextlib.contextmanager
def room_for(folder: Location, what: str, about_bytes: float) -> Iterator[None]:
    """A full disk ends the run with what is needed and what is free; whole shards stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise KDError(
            f"disk full: {what} needs about {about_bytes / 1e6:.1f} MB, and {storage.free_bytes(folder) / 1e6:.1f} MB are "
            f"free at {folder}. Whole shards are kept; make room and run the same command again"
        ) from None


def bytes_per_token(plan: Plan) -> float:
    """Predicted, and rather too much for ``threshold``, which seldom keeps the most it may."""
    return plan.sparsifier.most_candidates * BYTES_PER_CANDIDATE[plan.config.precision] + OTHER_BYTES_PER_TOKEN


def dry_run(plan: Plan) -> dict[str, Any]:
    """What a run would do: samples, tokens, predicted bytes, free disk, shards. Nothing is written."""
    config = plan.config
    plan.check_folder()
    todo = plan.todo()
    samples = prompt_tokens = given_tokens = sampled_tokens = rejected = 0
    differs: Counter[str] = Counter()
    for shard in todo:
        for sample in (s for example in shard.examples for s in plan.samples_of(shard, example)):
            if isinstance(sample, BadRow):
                rejected += 1
                continue
            samples += 1
            differs.update([sample.differs] if sample.differs else [])
            prompt_tokens += len(sample.request.prompt_ids)
            if sample.request.completion_ids is None:
                sampled_tokens += config.sampling.max_tokens
            else:
                given_tokens += len(sample.request.completion_ids)
    return {
        "out": str(config.out),
        "fingerprint": plan.fingerprint,
        "teacher": plan.fields["teacher"],
        "engine": config.engine,
        "dtype": plan.dtype,
        "max_model_len": plan.max_model_len,
        "device": machine.chosen(runs_on_gpu(config.engine)),
        "examples": len(plan.examples),
        "samples_to_do": samples,
        "rejected": rejected,
        "template": plan.prompts.facts.describe(plan.prompts.tokenizer),
        "differs_from_template": dict(differs) or None,
        "asks_first": plan.first_asked(),
        "near_duplicates_dropped": plan.near_duplicates,
        "prompt_tokens": prompt_tokens,
        "given_completion_tokens": given_tokens,
        "sampled_completion_tokens_at_most": sampled_tokens,
        "predicted_bytes_at_most": int((given_tokens + sampled_tokens) * bytes_per_token(plan)),
        "free_disk_bytes": storage.free_bytes(config.out),
        "shards": len(plan.shards),
        "shards_to_do": len(todo),
        "shards_by_split": {split: sum(s.split == split for s in plan.shards) for split in SPLITS},
    }
