"""GRPO on what is cached: its prompts, its verifiers, its verified reasoning. trl.GRPOTrainer underneath; no teacher is loaded.

    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100

Prompts reach the student as the cache's own token ids. By default those are chosen that the teacher's own answers got right
sometimes, and not always. With ``guide`` a share of each group's answers begins with the first part of a verified answer from
the cache; what was given is not trained on, and the share falls as the answers that had no guide come right.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from kdcache import machine, models
from kdcache.cache import query
from kdcache.cache.format import FORMAT_VERSION
from kdcache.cache.reader import Cache, Sample
from kdcache.errors import KDError, UsageError
from kdcache.judge import verifiers
from kdcache.models.identity import model_folder
from kdcache.storage import Location, atomic
from trainer.data.stream import select
from trainer.distill.plan import (
    RUN_FILE,
    Begun,
    Report,
    StudentConfig,
    alone,
    begin,
    bos_of,
    made_with,
    open_for,
    resume_point,
    steps_asked_for,
    stop_unless_finite,
)
from trainer.grpo import rewards
from trainer.run import checkpoints, parallel
from trainer.run.arguments import REFUSED_BY_GRPO, as_usage, check_lora, check_values, made
from trainer.run.checkpoints import Resume
from trainer.student import lora as adapters
from trainer.student.load import answer_as_cached, cached_stop_ids, load_student, stop_ids

SOMETIMES = "success > 0 AND success < 1"
GUIDES = ("prefix",)


@dataclass(frozen=True)
class GrpoConfig(StudentConfig):
    """What ``kd grpo`` was asked for; ``arguments`` are trl.GRPOConfig's."""

    guide: str | None = None
    teacher_weight: float = 0.0  # of rewards.likeness
    guards: bool = True
    guard_window: int = 20
    unsafe_exec: bool = False

    places: ClassVar[tuple[str, ...]] = (*StudentConfig.places, "guards", "guard_window", "unsafe_exec")


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]
    judges: tuple[verifiers.Judge, ...]  # what its rows say of judging; the best verdict counts
    reasoned: bool  # reasoning was asked for in it
    traces: list[list[int]] = field(repr=False)  # ids of answers that are right, their end of turn left out
    cached: list[Sample] = field(default_factory=list, repr=False)  # every answer, where the teacher's word is a reward


@dataclass(frozen=True)
class GrpoRun:
    """A run resolved: what it learns from, before the first step."""

    config: GrpoConfig
    prompts: list[Prompt]
    where: str | None
    parallel: str | None  # DDP or FSDP2, with the number of processes; None for one
    plan: dict[str, Any] = field(repr=False)  # of the first cache: how prompts are made and answers end
    record: dict[str, Any]
    checkpoint: str | None
    resume: Callable[[], Resume]  # finds ``checkpoint``, once more when the folder's lock is held
    notes: Sequence[str]  # on what it goes on from

    def facts(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.config.output_dir),
            "parallel": self.parallel,
            "prompts": len(self.prompts),
            "where": self.where,
            "prompts_with_a_trace": sum(bool(prompt.traces) for prompt in self.prompts),
            "guide": self.config.guide,
            "continues_at": None if self.checkpoint is None else Path(self.checkpoint).name,
        }


def prepare(config: GrpoConfig) -> GrpoRun:
    """Choose the prompts and check everything that can be checked without weights."""
    if config.guide is not None and config.guide not in GUIDES:
        raise UsageError(f"--guide {config.guide}: expected {' or '.join(GUIDES)}")
    if config.guide is not None and config.arguments.get("use_vllm"):
        raise UsageError(
            "--guide needs each answer of a group to begin differently, which --use-vllm cannot; use one of them"
        )
    if not 0.0 <= config.teacher_weight <= rewards.MOST_TEACHER_WEIGHT:
        raise UsageError(
            f"--teacher-weight {config.teacher_weight}: expected 0 to {rewards.MOST_TEACHER_WEIGHT}, so that it cannot outweigh "
            "being right"
        )
    steps_asked_for(config.arguments)
    caches = open_for(config)
    where = config.where if config.where is not None else _default_where(config)
    prompts = _merged(prompt for cache in caches for prompt in _choose(cache.path, cache.plan, where))
    if not prompts:
        judged = sum(len(_choose(cache.path, cache.plan, None)) for cache in caches)
        if not judged:
            raise KDError(
                "no training row of this cache says how an answer is judged, so there is nothing to reward; cache examples with a "
                "verifier (arithmetic, codeforces, a table with the columns verifier and reference)"
            )
        raise KDError(
            f"{judged} prompts of the train split have a verifier, and none fulfils {where}; success comes from the teacher's own "
            "answers (kd cache-teacher --mode sample, kd verify-answers)"
        )
    if config.guide is not None and not any(prompt.traces for prompt in prompts):
        raise KDError(
            "--guide prefix needs answers in the cache that are right (reward = 1) to the prompts chosen; none is"
        )
    if config.teacher_weight:
        _add_cached(prompts, caches)
    check_lora(config)
    _arguments(config, len(prompts))  # what cannot be is told before anything is made
    record = {
        "format_version": FORMAT_VERSION,
        "method": "grpo",
        "config": config.as_json(),
        "prompts": len(prompts),
        "caches": [{"path": str(c.path), "fingerprint": c.fingerprint} for c in caches],
        "made_with": made_with(),
        "finished": False,
        **bos_of(caches),
    }
    resume = partial(resume_point, config, record, _settings, "kd grpo")
    found = resume()
    return GrpoRun(
        config,
        prompts,
        where,
        parallel.mode(config.arguments),
        caches[0].plan,
        record,
        found.path,
        resume,
        found.notes,
    )


def _default_where(config: GrpoConfig) -> str | None:
    """Prompts that the teacher gets right sometimes, where its own answers were judged."""
    judged = any(
        query.select(path, "sum(judged) AS n", None, "train", view="prompts")["n"][0].as_py()
        for path in config.from_cache
    )
    return SOMETIMES if judged else None


def _choose(cache: Location, plan: dict[str, Any], where: str | None) -> list[Prompt]:
    columns = "prompt, prompt_ids, judges, traces"
    rest = "AND verifier IS NOT NULL ORDER BY prompt_id, source"
    found = query.select(cache, columns, where, "train", rest, view="prompts").to_pylist()
    reasoned = plan["fields"].get("reasoning") is not None
    stops = cached_stop_ids(plan)
    return [
        Prompt(
            row["prompt"],
            row["prompt_ids"],
            tuple((judge["verifier"], judge["reference"]) for judge in row["judges"]),
            reasoned,
            [trace[:-1] if trace[-1] in stops else trace for trace in row["traces"]],
        )
        for row in found
    ]


def _merged(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each prompt once, with the judges and traces of all data sets and caches that have it."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        known = found.get(prompt.text, prompt)
        judges = tuple(dict.fromkeys([*known.judges, *prompt.judges]))
        traces = known.traces + [trace for trace in prompt.traces if trace not in known.traces]
        found[prompt.text] = dataclasses.replace(known, judges=judges, traces=traces)
    return list(found.values())


def _add_cached(prompts: Sequence[Prompt], caches: Sequence[Cache]) -> None:
    """Give each prompt the answers that the cache holds to it, with the teacher's distributions."""
    answers = {tuple(prompt.ids): prompt.cached for prompt in prompts}
    units = select(caches, "train")
    for first in range(0, len(units), 256):
        for sample in units.load(np.arange(first, min(first + 256, len(units)))):
            if (found := answers.get(tuple(sample.prompt_ids.tolist()))) is not None:
                found.append(sample)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    same = {name: record.get(name) for name in ("method", "config", "prompts")}
    return same | {"caches": [cache["fingerprint"] for cache in record["caches"]]}


# --- training ---------------------------------------------------------------------------------------------------------


class _Watch(TrainerCallback):
    """Hands what was logged to the guards and to the caller; what an interrupted run had logged is remembered first."""

    def __init__(self, guards: rewards.Guards | None, report: Report):
        self.guards, self.report = guards, report

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:
            if self.guards is not None and "reward" in logs:
                self.guards.remember(_step(logs))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        watched = {name: logs[name] for name in ("loss", "grad_norm", "reward") if name in logs}
        stop_unless_finite(watched, state.global_step, args.fp16)
        if state.is_world_process_zero:
            self.report(state.global_step, state.max_steps, logs)
        if self.guards is not None:
            self.guards(_step(logs))


def _step(logs: dict[str, Any]) -> rewards.Step:
    return rewards.Step(
        correctness=float(logs["rewards/correctness/mean"]),
        format=float(logs["rewards/form/mean"]),
        length_tokens=float(logs["completions/mean_length"]),
        entropy_nats=float(logs.get("entropy", 0.0)),
        varied=1.0 - float(logs.get("frac_reward_zero_std", 0.0)),
    )


def _success_of(checkpoint: str | None) -> float:
    """What share of unguided answers was right, when an interrupted run was saved."""
    if checkpoint is None:
        return 0.0
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return next((float(logs["success"]) for logs in reversed(state["log_history"]) if "success" in logs), 0.0)


@alone
def train(run: GrpoRun, report: Report) -> dict[str, Any]:
    """Train, and save the student as a Hugging Face folder. ``rewards.Collapsed`` if a guard stops it."""
    import datasets

    config = run.config
    sandbox = verifiers.sandbox_for((v for prompt in run.prompts for v, _ in prompt.judges), config.unsafe_exec)
    arguments = _arguments(config, len(run.prompts))
    student, tokenizer = load_student(config.student, config.dtype, "nf4" if config.load_in_4bit else None)
    answer_as_cached(student, tokenizer, run.plan)
    stops = stop_ids(student, tokenizer, cached_stop_ids(run.plan))
    model = adapters.add(student, config)
    with as_usage("trl.GRPOTrainer"):
        trainer = trainer_class(bool(config.arguments.get("use_vllm")))(
            run,
            sandbox,
            stops,
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt.text} for prompt in run.prompts]),
            processing_class=tokenizer,
            callbacks=[Begun(), _Watch(rewards.Guards(config.guard_window) if config.guards else None, report)],
        )
    trainer.success = _success_of(run.checkpoint)
    if arguments.process_index == 0:
        begin(run)  # last of all: what fails before this has changed nothing
    try:
        trainer.train(resume_from_checkpoint=run.checkpoint)
    except rewards.Collapsed:
        trainer._save_checkpoint(trainer.model, trial=None)  # --no-guards goes on from here
        raise
    first, adapted = arguments.process_index == 0, config.lora_r is not None
    with checkpoints.whole_student(
        config.output_dir, checkpoints.size_of(trainer.model.parameters()), first
    ) as scratch:
        trainer.save_model(str(scratch / adapters.FOLDER if adapted else scratch))  # by all ranks: shards are gathered
        if first and adapted:
            adapters.merge(config, scratch / adapters.FOLDER, scratch, run.plan)
        if first:
            trainer.state.save_to_json(str(scratch / TRAINER_STATE_NAME))
    if first:
        with checkpoints.saving(config.output_dir, 0):
            atomic.write_json(config.output_dir / RUN_FILE, run.record | {"finished": True})
    return {"output_dir": str(config.output_dir), "steps": trainer.state.global_step, "success": trainer.success}


def trainer_class(use_vllm: bool) -> Any:
    """TRL's trainer on the cache. TRL imports vLLM wherever it is installed: here only where it will generate."""
    from trl import import_utils

    from trainer.grpo.trainer import FromCache

    asked = import_utils.is_vllm_available
    if not use_vllm:
        import_utils.is_vllm_available = lambda *_, **__: False
    try:
        from trl import GRPOTrainer
    finally:
        import_utils.is_vllm_available = asked
    return type("CachedGRPO", (checkpoints.WholeCheckpoints, FromCache, GRPOTrainer), {})


def argument_names() -> list[str]:
    from trl import GRPOConfig

    return [f.name for f in dataclasses.fields(GRPOConfig)]


def _arguments(config: GrpoConfig, prompts: int) -> Any:
    """trl.GRPOConfig of a run. UsageError for what it, or its optimizer, schedule and prompts, cannot be made of."""
    from trl import GRPOConfig

    given: dict[str, Any] = {
        "logging_steps": 1,
        "save_steps": 20,
        "save_total_limit": 2,
        "report_to": "none",
        "use_cpu": machine.torch_device() == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "reward_weights": [1.0, rewards.FORMAT_WEIGHT, *([weight] if (weight := config.teacher_weight) else [])],
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **check_values(config.arguments, REFUSED_BY_GRPO, GRPOConfig),
        "trust_remote_code": models.code_is_trusted(),
        "output_dir": str(config.output_dir),
    }
    if given["report_to"] is None:  # `none` on the command line
        given["report_to"] = "none"
    asked = given.get("max_steps", -1)
    together = made(GRPOConfig, given, asked if asked > 0 else 1000)
    at_once = together.generation_batch_size // together.num_generations
    if at_once > prompts:
        raise UsageError(
            f"a generation answers {at_once} prompts (its {together.generation_batch_size} answers over --num-generations "
            f"{together.num_generations}), and there are {prompts}; use a smaller --per-device-train-batch-size"
        )
    answers = together.per_device_train_batch_size * together.steps_per_generation
    if config.guide is not None and answers % together.num_generations:
        raise UsageError(
            f"--guide needs whole groups on a process: {answers} answers a generation are no multiple of --num-generations "
            f"{together.num_generations}"
        )
    shape = models.config(model_folder(config.student))
    if together.router_aux_loss_coef is not None and not hasattr(shape, "output_router_logits"):
        raise UsageError(
            "--router-aux-loss-coef weighs the loss of a mixture of experts, and the student is none; leave it out"
        )
    longest = getattr(shape, "max_position_embeddings", None)
    if longest is not None and together.max_completion_length > longest:
        raise UsageError(
            f"--max-completion-length {together.max_completion_length}: the student knows {longest} positions, prompt and answer "
            "together"
        )
    if together.sync_ref_model and (together.beta == 0 or config.lora_r is not None):
        raise UsageError(
            "--sync-ref-model needs a student of reference, which there is with --beta and without --lora-r"
        )
    if together.use_vllm and find_spec("vllm") is None:
        raise KDError("--use-vllm: vllm is not installed; install it, or leave the option out")
    if together.log_completions and find_spec("rich") is None:
        raise KDError("--log-completions: rich is not installed; pip install rich, or leave the option out")
    if together.use_liger_kernel and find_spec("liger_kernel") is None:
        raise KDError(
            "--use-liger-kernel: liger-kernel is not installed; pip install liger-kernel, or leave the option out"
        )
    return together
