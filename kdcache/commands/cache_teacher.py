"""`kd cache-teacher` runs the teacher over examples and writes what it said into a cache."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import CtrlC, ProgressLine, note, print_facts, this_command, warn_of_unsafe
from kdcache.commands.options import (
    EXTRA_OPTIONS,
    LOCATION,
    NAME_OR_PATH,
    FiniteRange,
    check_extra,
    extra_options,
    json_option,
    plan_slice,
    ratios,
    trust_option,
    unsafe_option,
)
from kdcache.errors import KDError
from kdcache.printable import printable


@click.command("cache-teacher", context_settings=EXTRA_OPTIONS)
@click.option(
    "--teacher",
    type=NAME_OR_PATH,
    default="embedded",
    show_default=True,
    help="Hub id, model folder, or `embedded` (SmolLM2-135M-Instruct).",
)
@click.option("--revision", help="Branch, tag or commit of a Hub teacher.")
@click.option(
    "--examples",
    type=NAME_OR_PATH,
    default="builtin",
    show_default=True,
    help="`builtin`; `dolly`, `dolly-es`, `bugnet-python`, `bugnet-cpp`, `pytorrent`, `codeforces-cots`, "
    "`codeforces-cots-cpp`, `codeforces`, `self-instruct`, `arithmetic`; a .jsonl/.parquet file; or a Hub data set id.",
)
@click.option(
    "--data-path",
    type=NAME_OR_PATH,
    help="File or folder (or another Hub id) of a named data set, in its own layout [default: its Hub id].",
)
@click.option(
    "--prompt-format",
    type=click.Choice(["chat", "alpaca"]),
    default="chat",
    show_default=True,
    help="The teacher's chat template, or Stanford Alpaca's plain text (in Spanish for Spanish).",
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "add", "never"]),
    default="auto",
    show_default=True,
    help="What stands before a prompt: what tokenizer and chat template put there; one BOS token, where there is none; or no "
    "BOS before text that no chat template rendered.",
)
@click.option("--prompt-column", help="Column of the prompts, if it is not `prompt` or `messages`.")
@click.option("--completion-column", help="Column of the given answers, if it is not `completion`.")
@click.option("--system", help="System prompt to put before every prompt.")
@click.option("--limit", type=int, help="Take the first N examples.")
@click.option("--shuffle", is_flag=True, help="Take them in an order drawn from --seed, so that --limit is a sample.")
@click.option(
    "--mode",
    type=click.Choice(["score", "sample", "both"]),
    default="score",
    show_default=True,
    help="Score given answers, sample the teacher's own, or both.",
)
@click.option("--samples", type=int, default=1, show_default=True, help="Answers to sample for each prompt.")
@click.option(
    "--reasoning",
    is_flag=True,
    help="Ask for the reasoning in <think> and the answer in <answer>, in the row's language.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Judge answers whose row says how (tests are run in a sandbox), and keep the reward of each.",
)
@unsafe_option
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Of sampling; 0 is greedy. Log-probabilities are always at 1.",
)
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus of sampling.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest sampled answer, in tokens.")
@click.option(
    "--sparsify",
    default="threshold:0.02",
    show_default=True,
    help="What to keep of each distribution: tokens above TAU and an unbiased sample of the others (threshold:TAU), or "
    "the K best and the mass of the rest (topk:K, as in topk:64: four times the bytes, for any divergence).",
)
@click.option(
    "--capture-k", type=int, help="Candidates to take from the engine [default: topk's K, 256 for threshold]."
)
@click.option(
    "--precision",
    type=click.Choice(["q8", "f32"]),
    default="q8",
    show_default=True,
    help="Of log-probabilities: 256-value codebook, or exact.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and of the splits.")
@click.option(
    "--rows-per-shard", type=int, default=512, show_default=True, help="Samples a shard: what an interruption can cost."
)
@click.option(
    "--split-ratios",
    default="0.9,0.05,0.05",
    show_default=True,
    help="Shares of train,validation,test; a problem is on one side.",
)
@click.option(
    "--near-duplicates",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Train rows that nearly repeat a validation or test row (and validation rows a test row): reject and count "
    "them, or keep them.",
)
@click.option(
    "--out", type=LOCATION, default="data/cache", show_default=True, help="Folder of the cache, or s3://bucket/folder."
)
@click.option(
    "--plan-slice",
    metavar="I/N",
    help="Write every N-th shard alone, from the I-th on (from 0): N processes with one folder fill one cache, as in "
    "--plan-slice $SLURM_ARRAY_TASK_ID/8 for --array=0-7; then kd cache info.",
)
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Several engines as Ray workers: on this machine, or on a cluster (`auto` or HOST:PORT) whose nodes share --out.",
)
@click.option("--workers", type=click.IntRange(1), help="Engines under --ray [default: as many as there are GPUs for].")
@click.option(
    "--gpus-per-worker",
    type=FiniteRange(0),
    help="GPUs of each engine under --ray [default: what its tensor and pipeline parallelism ask for].",
)
@click.option("--overwrite", is_flag=True, help="Delete a cache that is already there.")
@click.option("--strict", is_flag=True, help="Fail at the first row that cannot be taken, instead of listing it.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="vLLM, or plain transformers where vLLM cannot be installed.",
)
@click.option(
    "--max-model-len",
    type=int,
    help="Longest prompt + completion; longer rows are rejected and counted [default: the model's; on a CPU at most 2048].",
)
@click.option("--dtype", default="auto", show_default=True, help="Of the teacher's weights.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing.")
@trust_option
@json_option
@click.pass_context
def cache_teacher(context: click.Context, **options: Any) -> None:
    """Run the teacher over examples and write what it said into a cache (phase one).

    Run the same command again after any interruption: it continues with the shards that are missing. Other options
    are vLLM's own, by its names: --gpu-memory-utilization 0.9, --tensor-parallel-size 2, --quantization awq, ...

    \b
    kd cache-teacher --teacher embedded --examples builtin --out data/cache
    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples dolly --prompt-format alpaca --out data/dolly
    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples rows.jsonl --mode both --samples 4 --out data/qwen
    """
    quiet.libraries()
    from kdcache import machine
    from kdcache.capture import ray as cluster
    from kdcache.capture import run as capture
    from kdcache.capture.plan import CaptureConfig, Plan
    from kdcache.examples import types
    from kdcache.teachers import Sampling, runs_on_gpu

    warn_of_unsafe(options["unsafe_exec"])
    workers = cluster.Workers(options.pop("ray_address"), options.pop("workers"), options.pop("gpus_per_worker"))
    if workers.address is None and (workers.count or workers.gpus is not None):
        raise click.UsageError("--workers and --gpus-per-worker go with --ray")
    if workers.address and options["plan_slice"]:
        raise click.UsageError(
            "--ray hands out the shards itself; --plan-slice is for processes that do not know each other"
        )
    extra = engine_extra(context, options["engine"])
    config = CaptureConfig(
        columns=types.Columns(options.pop("prompt_column"), options.pop("completion_column"), options.pop("system")),
        sampling=Sampling(options.pop("temperature"), options.pop("top_p"), options.pop("max_tokens")),
        split_ratios=ratios(options.pop("split_ratios")),
        plan_slice=plan_slice(options.pop("plan_slice")),
        engine_extra=extra,
        **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")},
    )
    plan = Plan(config)
    device = machine.device_in_words(runs_on_gpu(config.engine))
    named = f"{plan.fields['teacher']} ({config.engine}, {plan.dtype})"
    note(f"{named} on {device}, {len(plan.examples)} examples -> {config.out}")
    for text in (*plan.introduction(), *plan.notes()):
        note(text)
    if options["dry_run"]:
        print_facts(capture.dry_run(plan), options["as_json"])
        return
    run = capture.run_slice if config.plan_slice else capture.run
    if workers.address:
        run = partial(cluster.run, workers=workers)
    line = ProgressLine("samples")

    def show(state: capture.Progress) -> None:
        shards = f"shard {min(state.shards_done + 1, state.shards)}/{state.shards}"
        if workers.address:
            shards += f"  {state.workers} workers" + (f" ({state.lost} lost)" if state.lost else "")
        line.show(
            state.samples_done, state.samples, f"{shards}  {state.tokens_per_second:,.0f} tokens/s", state.eta_seconds
        )

    with CtrlC(lambda: line.last > 0) as interrupt:
        try:
            found = run(plan, progress=show, stop=lambda: interrupt.asked, say=note)
        except KeyboardInterrupt:
            line.close()
            note(f"interrupted; whole shards are kept. To continue:\n  {this_command()}")
            raise
        line.close()
    if interrupt.asked and not found["complete"]:
        done = found["shards"] if config.plan_slice else len(found["shards"])
        planned = f"the slice's {found['shards_planned']}" if config.plan_slice else found["shards_planned"]
        note(f"stopped with {done} of {planned} shards written. To continue:\n  {this_command()}")
        raise KeyboardInterrupt
    if config.plan_slice:
        print_facts(found, options["as_json"])
        missing = found["shards_missing_in_the_cache"]
        note(
            f"{missing} shards are the other slices' to write; kd cache info {config.out} sums up what is there"
            if missing
            else f"no shard is missing; kd cache info {config.out} sums the cache up"
        )
        return
    if found["rejected"]:
        note(f"{found['rejected']} rows could not be taken; why is in {config.out}/rejected.jsonl, the first:")
        first = json.loads((config.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()[0])
        note(printable(f"  {first['source']}:{first['row_id']}: {first['reason']}"))
    if not found["rows"]:
        raise KDError("no sample could be taken, so the cache is empty")
    print_facts(
        {
            "cache": str(config.out),
            "samples": found["rows"],
            "completion_tokens": found["completion_tokens"],
            "rejected": found["rejected"],
            "near_duplicates_dropped": plan.near_duplicates,
            "shards": len(found["shards"]),
            "bytes": found["bytes"],
            "fingerprint": found["fingerprint"],
        },
        options["as_json"],
    )


def engine_extra(context: click.Context, engine: str) -> dict[str, Any]:
    extra = extra_options(context)
    if extra and engine == "vllm":
        from kdcache.teachers.vllm import engine_options

        check_extra(extra, engine_options(), "vLLM")
    return extra
