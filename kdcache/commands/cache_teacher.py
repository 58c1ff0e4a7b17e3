"""`kd cache-teacher` runs the teacher over examples and writes its log-probabilities into a cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kdcache import quiet
from kdcache.capture.config import CaptureConfig
from kdcache.commands.console import CtrlC, ProgressLine, note, print_facts, this_command, warn_of_unsafe
from kdcache.commands.options import FiniteRange, config_from, json_option, options_of, trust_option
from kdcache.commands.passthrough import Library, PassThrough
from kdcache.errors import KDError
from kdcache.printable import printable

if TYPE_CHECKING:
    from kdcache.capture.plan import Plan


def engine_library(parameters: Mapping[str, Any]) -> Library | None:
    """Return vLLM's options; None for transformers, which has none and says so itself."""
    if parameters["engine"] != "vllm":
        return None
    from kdcache.teachers.vllm import engine_options

    return Library("vLLM", frozenset(engine_options()))


@click.command("cache-teacher", cls=PassThrough, library=engine_library)
@options_of(CaptureConfig)
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Run several engines as Ray workers: on this machine, or on a cluster (`auto` or HOST:PORT) whose nodes share --out.",
)
@click.option("--workers", type=click.IntRange(1), help="Engines under --ray [default: as many as there are GPUs for].")
@click.option(
    "--gpus-per-worker",
    type=FiniteRange(0),
    help="GPUs per engine under --ray [default: as many as its tensor and pipeline parallelism need].",
)
@click.option("--dry-run", is_flag=True, help="Print what would be captured; write nothing.")
@trust_option
@json_option
@click.pass_context
def cache_teacher(
    context: click.Context,
    ray_address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run a teacher over examples into a cache (phase one).

    The cache holds the teacher's log-probabilities of given answers, and its own samples with theirs. Run the same command
    again after any interruption: it continues with the missing shards.

    \b
    Other options are passed to vLLM, under vLLM's own names: --gpu-memory-utilization 0.9,
    --tensor-parallel-size 2, --quantization awq, ...

    \b
    kd cache-teacher --teacher embedded --examples builtin --out data/cache
    kd cache-teacher --teacher Qwen/Qwen2.5-3B --examples dolly --prompt-format alpaca
    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples rows.jsonl --mode both --samples 4
    """
    quiet.libraries()
    from kdcache.capture import ray as cluster
    from kdcache.capture import run as capture
    from kdcache.capture.dry_run import dry_run as predicted
    from kdcache.capture.resolve import resolve

    warn_of_unsafe(options["unsafe_exec"])
    ray_address = ray_address or None  # `--ray "$ADDRESS"` with an empty variable
    if ray_address is None and (workers is not None or gpus_per_worker is not None):
        raise click.UsageError("--workers and --gpus-per-worker go with --ray")
    if ray_address is not None and options["plan_slice"]:
        raise click.UsageError(
            "--ray assigns the shards itself; --plan-slice is for processes that do not know each other"
        )
    engine_options = cache_teacher.library_options(context)
    plan = resolve(config_from(CaptureConfig, options, engine_extra=engine_options))
    _introduce(plan)
    if dry_run:
        print_facts(predicted(plan), as_json)
        return
    run = capture.run_slice if plan.config.plan_slice else capture.run
    if ray_address is not None:
        run = partial(cluster.run, options=cluster.RayOptions(ray_address, workers, gpus_per_worker))
    with ProgressLine() as line, CtrlC(lambda: line.begun) as interrupt:
        try:
            manifest = run(plan, show=line.show, stop=lambda: interrupt.requested, say=note)
        except KeyboardInterrupt:
            line.close()
            note(f"interrupted; whole shards are kept. To continue:\n  {this_command()}")
            raise
    if interrupt.requested and not manifest["complete"]:
        written = manifest["shards"] if plan.config.plan_slice else len(manifest["shards"])
        planned = f"the slice's {manifest['shards_planned']}" if plan.config.plan_slice else manifest["shards_planned"]
        note(f"stopped with {written} of {planned} shards written. To continue:\n  {this_command()}")
        raise KeyboardInterrupt
    if plan.config.plan_slice:
        _report_slice(plan, manifest, as_json)
    else:
        _report_cache(plan, manifest, as_json)


def _introduce(plan: Plan) -> None:
    """Print, before the engine starts, which teacher runs where, and what the user should know."""
    from kdcache import machine
    from kdcache.teachers.device import runs_on_gpu

    config = plan.config
    teacher = f"{plan.fields['teacher']} ({config.engine}, {plan.dtype})"
    note(
        f"{teacher} on {machine.device_in_words(runs_on_gpu(config.engine))}, {plan.example_count} examples -> {config.out}"
    )
    for text in (*plan.introduction.lines(), *plan.notes):
        note(text)


def _report_slice(plan: Plan, facts: dict[str, Any], as_json: bool) -> None:
    print_facts(facts, as_json)
    out, missing = plan.config.out, facts["shards_missing_in_the_cache"]
    if missing:
        note(
            f"{missing} shards belong to other slices and are not written yet; to sum up the cache: kd cache info {out}"
        )
    else:
        note(f"no shard is missing; to sum up the cache: kd cache info {out}")


def _report_cache(plan: Plan, manifest: dict[str, Any], as_json: bool) -> None:
    out = plan.config.out
    if manifest["rejected"]:
        note(f"{manifest['rejected']} rows were rejected; the reasons are in {out}/rejected.jsonl, the first:")
        first = json.loads((out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()[0])
        note(printable(f"  {first['source']}:{first['row_id']}: {first['reason']}"))
    if not manifest["rows"]:
        raise KDError("every row was rejected, so the cache is empty")
    facts = {
        "cache": str(out),
        "samples": manifest["rows"],
        "completion_tokens": manifest["completion_tokens"],
        "rejected": manifest["rejected"],
        "near_duplicates_dropped": plan.near_duplicates,
        "shards": len(manifest["shards"]),
        "bytes": manifest["bytes"],
        "fingerprint": manifest["fingerprint"],
    }
    print_facts(facts, as_json)
