"""`kd`: parses, calls, prints. No logic here, and heavy imports only inside commands.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad shards found,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from kdcache import __version__, quiet
from kdcache.errors import KDError, Unstoppable
from kdcache.printable import json_text, printable

EXTRA_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="kd")
def kd() -> None:
    """Run the teacher once; distil as often as you like.

    \b
    kd cache-teacher   phase one: a teacher's log-probabilities and samples -> a Parquet cache
    kd sql             ask SQL of the cache, and kd view: look at it in the browser
    kd train           phase two: a student from the cache alone
    kd grpo            reinforcement learning on the cache's prompts and verifiers
    kd evaluate        what the students kept, and kd compare: of the teacher, with intervals
    kd quantize        a student in 4 or 8 bits, measured before and after
    kd report          all of it on one page
    kd run             an experiment of recipes/, from the cache to the page
    kd demo            all of it, on this machine, in a quarter of an hour
    """


def _expanded(value: Any) -> Any:
    """A path with ~ as the home folder, once and for all: a shell leaves it in --out=~/x, and libraries expand it or not."""
    return os.path.expanduser(value) if isinstance(value, str) else value


class _PathType(click.Path):
    """A path of this machine."""

    def __init__(self, **options: Any):
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return super().convert(_expanded(value), parameter, context)


class _NameOrPathType(click.ParamType):
    """A name (of a model, a data set, a recipe) or a path."""

    name = "text"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        return _expanded(str(value))


class _LocationType(click.ParamType):
    """Where a cache is: a folder, or a URL of an object store."""

    name = "path"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        from kdcache import storage

        if value == "":
            self.fail("expected a folder, or a URL of an object store; found an empty text", parameter, context)
        return storage.location(_expanded(value))


LOCATION, PATH, NAME_OR_PATH = _LocationType(), _PathType(), _NameOrPathType()


class FiniteRange(click.FloatRange):
    """click's range lets NaN through, and infinity where one end is open."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", parameter, context)
        return number


unsafe_option = click.option(
    "--unsafe-exec",
    is_flag=True,
    help="Run the programs that answers hold without a sandbox, where bubblewrap cannot be had. They can do what you can.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _trust(_: click.Context, __: click.Parameter, given: bool) -> None:
    if given:
        from kdcache import models

        models.trust_remote_code()


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_trust,
    help="Run the Python code that comes with a model, where one has some. It can do what you can.",
)


# --- phase one --------------------------------------------------------------------------------------------------------


@kd.command("cache-teacher", context_settings=EXTRA_OPTIONS)
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
    from kdcache import capture, cluster, examples, machine
    from kdcache.plan import CaptureConfig, Plan
    from kdcache.teachers import Sampling, runs_on_gpu

    _warn_of_unsafe(options["unsafe_exec"])
    workers = cluster.Workers(options.pop("ray_address"), options.pop("workers"), options.pop("gpus_per_worker"))
    if workers.address is None and (workers.count or workers.gpus is not None):
        raise click.UsageError("--workers and --gpus-per-worker go with --ray")
    if workers.address and options["plan_slice"]:
        raise click.UsageError(
            "--ray hands out the shards itself; --plan-slice is for processes that do not know each other"
        )
    extra = _engine_extra(context, options["engine"])
    config = CaptureConfig(
        columns=examples.Columns(options.pop("prompt_column"), options.pop("completion_column"), options.pop("system")),
        sampling=Sampling(options.pop("temperature"), options.pop("top_p"), options.pop("max_tokens")),
        split_ratios=_ratios(options.pop("split_ratios")),
        plan_slice=_plan_slice(options.pop("plan_slice")),
        engine_extra=extra,
        **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")},
    )
    plan = Plan(config)
    device = machine.chosen(runs_on_gpu(config.engine))
    named = f"{plan.fields['teacher']} ({config.engine}, {plan.dtype})"
    _note(f"{named} on {device}, {len(plan.examples)} examples -> {config.out}")
    for note in (*plan.introduction(), *plan.notes()):
        _note(note)
    if options["dry_run"]:
        _print_facts(capture.dry_run(plan), options["as_json"])
        return
    run = capture.run_slice if config.plan_slice else capture.run
    if workers.address:
        run = partial(cluster.run, workers=workers)
    line = _ProgressLine("samples")

    def show(state: capture.Progress) -> None:
        shards = f"shard {min(state.shards_done + 1, state.shards)}/{state.shards}"
        if workers.address:
            shards += f"  {state.workers} workers" + (f" ({state.lost} lost)" if state.lost else "")
        line.show(
            state.samples_done, state.samples, f"{shards}  {state.tokens_per_second:,.0f} tokens/s", state.eta_seconds
        )

    with _CtrlC(lambda: line.last > 0) as interrupt:
        try:
            found = run(plan, progress=show, stop=lambda: interrupt.asked, say=_note)
        except KeyboardInterrupt:
            line.close()
            _note(f"interrupted; whole shards are kept. To continue:\n  {_this_command()}")
            raise
        line.close()
    if interrupt.asked and not found["complete"]:
        done = found["shards"] if config.plan_slice else len(found["shards"])
        planned = f"the slice's {found['shards_planned']}" if config.plan_slice else found["shards_planned"]
        _note(f"stopped with {done} of {planned} shards written. To continue:\n  {_this_command()}")
        raise KeyboardInterrupt
    if config.plan_slice:
        _print_facts(found, options["as_json"])
        missing = found["shards_missing_in_the_cache"]
        _note(
            f"{missing} shards are the other slices' to write; kd cache info {config.out} sums up what is there"
            if missing
            else f"no shard is missing; kd cache info {config.out} sums the cache up"
        )
        return
    if found["rejected"]:
        _note(f"{found['rejected']} rows could not be taken; why is in {config.out}/rejected.jsonl, the first:")
        first = json.loads((config.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()[0])
        _note(printable(f"  {first['source']}:{first['row_id']}: {first['reason']}"))
    if not found["rows"]:
        raise KDError("no sample could be taken, so the cache is empty")
    _print_facts(
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


@kd.group("cache", context_settings=CONTEXT)
def cache_group() -> None:
    """Look after a cache."""


@cache_group.command("info")
@click.argument("cache", type=LOCATION)
@json_option
def cache_info(cache: Path, as_json: bool) -> None:
    """Sum up a cache: teacher, samples, tokens, bytes a token, and what is missing.

    Where the shards have changed, manifest.json, README.md and rejected.jsonl are written anew.

    \b
    kd cache info data/cache
    """
    from kdcache import manifest

    _print_facts(manifest.summary(cache), as_json)


@cache_group.command("verify")
@click.argument("cache", type=LOCATION)
@click.option("--repair", is_flag=True, help="Move bad files to CACHE/set-aside, so that the next capture redoes them.")
@json_option
def cache_verify(cache: Path, repair: bool, as_json: bool) -> None:
    """Look at every byte and every number of a cache. Exit code 3 if anything is wrong or missing.

    \b
    kd cache verify data/cache
    kd cache verify data/cache --repair      # then run the same kd cache-teacher command again
    """
    from kdcache import format, integrity

    line = _ProgressLine("shards")
    report = integrity.verify(cache, lambda done, total: line.show(done, total, "", None))
    line.close()
    if repair and not report.sound:
        integrity.repair(report)
    facts = {
        "cache": str(cache),
        "sound": report.sound,
        "shards": report.shards,
        "samples": report.rows,
        "completion_tokens": report.completion_tokens,
        "missing": len(report.missing),
        "bad": len(report.problems),
    }
    if as_json:
        names = ("missing", "problems", "unvouched", "unprotected", "set_aside", "notes")
        _print_facts(facts | {name: getattr(report, name) for name in names}, as_json)
    else:
        for name, words in report.problems.items():
            _say(f"bad      {name}: {'; '.join(words)}")
        for name in report.missing:
            _say(f"missing  {name}")
        _print_facts(facts, as_json)
    if report.unvouched:
        _note(f"{report.unvouched} shards are in no manifest yet; kd cache info records them")
    if report.unprotected:
        first = f"(the first is {report.unprotected[0]})"
        _note(
            f"not protected: {len(report.unprotected)} files are from before files had checksums of their own {first}"
        )
    for note in report.notes:
        _note(note)
    if report.set_aside:
        _note(f"{len(report.set_aside)} files were moved to {cache}/set-aside")
    if report.sound:
        return
    to_capture = report.missing or [name for name in report.set_aside if name != format.REWARDS_FILE]
    if to_capture:
        _note("run the same kd cache-teacher command again: it redoes what is missing, and nothing else")
    if format.REWARDS_FILE in report.set_aside:
        _note("run kd verify-answers again: it makes the rewards anew")
    if report.problems and not repair:
        _note("--repair sets the bad files aside, so that they can be made again")
    raise SystemExit(3)


@kd.command("verify-answers", context_settings=CONTEXT)
@click.argument("cache", type=LOCATION)
@click.option("--where", help="SQL condition on the samples to judge, as in \"origin = 'sampled'\".")
@click.option("--renew", is_flag=True, help="Judge those too that have a reward.")
@unsafe_option
@json_option
def verify_answers(cache: Path, where: str | None, renew: bool, unsafe_exec: bool, as_json: bool) -> None:
    """Judge the answers in a cache by their rows' verifiers: tests are run in a sandbox, numbers and texts compared.

    Shards never change: rewards go to CACHE/rewards.parquet, and `reward` of the view samples is theirs.

    \b
    kd verify-answers data/codeforces
    kd sql data/codeforces "SELECT avg(reward) FROM samples WHERE origin = 'sampled'"
    """
    from kdcache import judging

    _warn_of_unsafe(unsafe_exec)
    line = _ProgressLine("answers")
    found = judging.verify_answers(cache, renew, unsafe_exec, where, lambda done, of: line.show(done, of, "", None))
    line.close()
    _print_facts(found, as_json)


class _SQLCommand(click.Command):
    """Takes a query that begins with a comment for what it is, not for an option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, [f"\n{arg}" if arg.startswith(("-- ", "--\n")) else arg for arg in args])


@kd.command("sql", cls=_SQLCommand)
@click.argument("cache", type=LOCATION, required=False)
@click.argument("query", required=False)
@click.option("--file", type=_PathType(exists=True, dir_okay=False), help="Read the query from a file.")
@click.option("--list", "list_views", is_flag=True, help="List the views, with what each answers.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, exact in a file or a pipe.")
@json_option
def sql(
    cache: Path | None, query: str | None, file: Path | None, list_views: bool, as_csv: bool, as_json: bool
) -> None:
    """Ask SQL of a cache, in DuckDB's dialect. Without a QUERY it is read from stdin; a terminal gets a prompt.

    \b
    kd sql data/cache --list
    kd sql data/cache "SELECT * FROM captured_mass_curve"
    kd sql data/cache "SELECT * FROM uncertain_tokens LIMIT 10" --json
    kd sql data/cache
    """
    from kdcache import query as queries

    def show(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
        _print_rows(names, rows, as_csv, as_json, width)

    def show_views() -> None:
        show(["view", "answers"], queries.described(), width=120)

    with _reader_may_leave():
        if list_views:
            show_views()
            return
        if cache is None:
            raise click.UsageError("Missing argument 'CACHE'.")
        text = _query_text(query, file)
        line = _ProgressLine("MB of shards checked")

        def checked(done: int, total: int) -> None:
            if total > 2e9:  # a second or more
                line.show(done // 10**6, total // 10**6, "", None)

        connection = queries.connect(cache, progress=checked)
        line.close()
        if unplanned := queries.unplanned_files(cache):
            first = f"(the first is {unplanned[0]})"
            _note(
                f"warning: {len(unplanned)} files in data/ are in no plan and are not read {first}; run: kd cache verify {cache}"
            )
        if missing := queries.missing_shards(cache):
            shards = "1 shard is" if len(missing) == 1 else f"{len(missing)} shards are"
            _note(f"warning: {shards} missing (the first is {missing[0]}); what is asked is answered without them")
        if text is not None:
            show(*queries.stream(connection, text))
        else:
            _sql_prompt(lambda typed: show(*queries.stream(connection, typed)), show_views, queries.is_complete)


def _query_text(query: str | None, file: Path | None) -> str | None:
    """The query as given, from a file or from stdin; None if it is to be typed."""
    if query is not None and file is not None:
        raise click.UsageError("give a QUERY or --file, not both")
    if query is None and file is None and sys.stdin.isatty():
        return None
    if query is not None:
        raw = os.fsencode(query)
    else:
        raw = file.read_bytes() if file else sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise click.UsageError("the query is not UTF-8") from None
    if not text.strip():
        raise click.UsageError('name a query ("SELECT ..."), --file or --list')
    return text


def _sql_prompt(answer: Callable[[str], None], show_views: Callable[[], None], complete: Callable[[str], bool]) -> None:
    """Answer what is typed, each query up to its semicolon, until Ctrl-D. Ctrl-C drops what was begun."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and editing)
    hint = "A query ends with a semicolon; .views lists what can be asked, Ctrl-D leaves."
    _note(hint)
    text = ""
    while True:
        try:
            line = _ask("...> " if text else "kd> ")
            if not text and line.strip() == ".views":
                show_views()
            elif not text and (not line.strip() or line.startswith(".")):
                _note(hint)
            else:
                text += line + "\n"
                if complete(text):
                    typed, text = text, ""
                    answer(typed)
        except EOFError:
            _note("")
            return
        except KDError as error:
            _note(f"Error: {error}")
        except KeyboardInterrupt:
            text = ""
            _note("")


def _ask(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # data alone goes to stdout
    return input()


# --- phase two --------------------------------------------------------------------------------------------------------

from_cache_option = click.option(
    "--from-cache",
    type=LOCATION,
    multiple=True,
    required=True,
    help="A cache: a folder, or s3://bucket/folder. Give it again for several of one tokenizer.",
)
where_option = click.option(
    "--where", help="SQL condition on the samples, as in \"origin = 'sampled' AND language = 'es'\"."
)
max_length_option = click.option(
    "--max-length",
    type=int,
    default=2048,
    show_default=True,
    help="Longer samples (prompt + completion) are dropped whole and counted.",
)


_LORA_OPTIONS = (
    click.option(
        "--lora-r", type=click.IntRange(1), help="Train LoRA matrices of this rank; they are merged at the end."
    ),
    click.option(
        "--lora-alpha", type=click.IntRange(1), help="Scale of what LoRA adds, over its rank [default: twice the rank]."
    ),
    click.option(
        "--lora-dropout",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        show_default=True,
        help="Of LoRA's input, while training.",
    ),
    click.option(
        "--lora-target-modules",
        default="all-linear",
        show_default=True,
        help="Names of layers, with commas; all-linear: every linear layer but the head.",
    ),
    click.option(
        "--load-in-4bit", is_flag=True, help="QLoRA: the frozen weights in 4 bits (NF4, bitsandbytes). Needs --lora-r."
    ),
)


def lora_options(command: Any) -> Any:
    """The options of LoRA and QLoRA, which training and reinforcement learning share."""
    for option in reversed(_LORA_OPTIONS):
        command = option(command)
    return command


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """--config: its keys become defaults, so that flags win; what the command does not know is kept for its library."""
    if path is None:
        return
    import yaml

    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise click.UsageError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise click.UsageError(f"--config {path}: expected a mapping of options to values, as in `learning_rate: 2e-4`")
    given = {key.replace("-", "_"): _literal(value) for key, value in given.items()}
    if "trust_remote_code" in given:
        raise click.UsageError(
            f"--config {path}: trust_remote_code is for the command line, so that no file can ask for it"
        )
    own = {p.name for p in context.command.params if p.name not in ("config", "as_json", "dry_run", "overwrite")}
    several = {p.name for p in context.command.params if p.multiple}
    given = {key: [value] if key in several and not isinstance(value, list) else value for key, value in given.items()}
    context.default_map = {key: value for key, value in given.items() if key in own}
    context.meta["kd.config"] = {key: value for key, value in given.items() if key not in own}


config_option = click.option(
    "--config",
    type=_PathType(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML of options by name; flags on the command line win. Every run leaves one as run.yaml.",
)


@kd.command("init-student", context_settings=CONTEXT)
@click.option(
    "--from",
    "base",
    type=NAME_OR_PATH,
    default="embedded",
    show_default=True,
    help="Hub id, model folder, or `embedded`: a checkpoint, or the teacher to take layers of.",
)
@click.option(
    "--keep-layers", help="Layers to keep: a number (evenly spread), or a list like 0-4,6,8-29 [default: all]."
)
@click.option("--out", type=PATH, required=True, help="Folder of the student.")
@click.option("--overwrite", is_flag=True, help="Replace a student that this command made.")
@trust_option
@json_option
def init_student(base: str, keep_layers: str | None, out: Path, overwrite: bool, as_json: bool) -> None:
    """Make a student: a checkpoint as it is, or some of the teacher's own layers.

    \b
    kd init-student --from embedded --keep-layers 20 --out data/student
    """
    quiet.libraries()
    from trainer import student

    _print_facts(student.init_student(base, out, keep_layers, overwrite), as_json)


@kd.command("train", context_settings=EXTRA_OPTIONS)
@config_option
@from_cache_option
@click.option("--student", type=NAME_OR_PATH, required=True, help="Hub id or folder of the student to start from.")
@click.option("--output-dir", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--method",
    type=click.Choice(["kd", "sft"]),
    default="kd",
    show_default=True,
    help="Distillation, or plain fine-tuning on the same completions.",
)
@click.option(
    "--alpha",
    type=float,
    default=0.5,
    show_default=True,
    help="Loss = (1 - alpha) cross-entropy + alpha divergence from the teacher.",
)
@click.option(
    "--divergence",
    default="forward_kl",
    show_default=True,
    help="forward_kl (any cache); on topk caches also reverse_kl, jsd, skewed_kl[:SKEW], tvd.",
)
@where_option
@max_length_option
@click.option(
    "--too-long",
    type=click.Choice(["drop", "cut"]),
    default="drop",
    show_default=True,
    help="What becomes of longer samples: dropped, or their completions cut at --max-length (with no end of turn).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the student's weights (--bf16 keeps them in float32 and computes in bfloat16).",
)
@lora_options
@click.option(
    "--evals-per-epoch",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="How often the validation split is measured and a checkpoint kept.",
)
@click.option(
    "--early-stopping-patience", type=click.IntRange(1), help="Stop after N measurements without a better one."
)
@click.option("--overwrite", is_flag=True, help="Delete a run that is already there.")
@click.option("--dry-run", is_flag=True, help="Print samples, tokens, steps and memory; train nothing.")
@trust_option
@json_option
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a student from the cache alone (phase two). The teacher is never loaded.

    Run the same command again after an interruption: it continues at the last whole checkpoint. Other options are
    transformers.TrainingArguments', by their names: --learning-rate 1e-4, --num-train-epochs 1,
    --per-device-train-batch-size 8, --gradient-accumulation-steps 4, --bf16, --report-to tensorboard, ...

    \b
    kd train --from-cache data/cache --student data/student --output-dir data/kd --learning-rate 2e-4
    """
    quiet.libraries()
    from trainer import run

    extra = _train_extra(context)
    config = run.TrainConfig(
        arguments=extra, **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")}
    )
    resolved = run.prepare(config)
    if options["dry_run"]:
        from trainer import memory

        _print_facts(resolved.facts() | memory.estimate(resolved), options["as_json"])
        return
    first_rank = _is_first_rank()
    if first_rank:
        _introduce(resolved)
    from trainer import distill

    show = _StepLine(resolved.checkpoint)

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        hidden = ("epoch", "tokens", "seconds")
        show(
            step, steps, "  ".join(f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and k not in hidden)
        )

    try:
        found = distill.train(resolved, report)
    except KeyboardInterrupt:
        if first_rank:
            _note(f"interrupted. To continue at the last checkpoint:\n  {_this_command()}")
        raise
    if first_rank:
        _print_facts(found, options["as_json"])


@kd.command("grpo", context_settings=EXTRA_OPTIONS)
@config_option
@from_cache_option
@click.option("--student", type=NAME_OR_PATH, required=True, help="Hub id or folder of the student to start from.")
@click.option("--output-dir", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--where",
    help="SQL condition on the view prompts [default: success > 0 AND success < 1, the prompts that the teacher's own answers "
    "got right sometimes].",
)
@click.option(
    "--guide",
    type=click.Choice(["prefix"]),
    help="Begin a falling share of each group's answers with the first half of a right answer from the cache.",
)
@click.option(
    "--teacher-weight",
    type=float,
    default=0.0,
    show_default=True,
    help="Weight, at most 0.5, of one more reward: the teacher's probability of the answer's tokens, for as long as an answer in "
    "the cache begins alike.",
)
@click.option(
    "--guards/--no-guards", default=True, show_default=True, help="Stop a run that has collapsed, saying how."
)
@click.option(
    "--guard-window", type=click.IntRange(2), default=20, show_default=True, help="Steps that a guard looks at."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the student's weights.",
)
@lora_options
@unsafe_option
@click.option("--overwrite", is_flag=True, help="Delete a run that is already there.")
@click.option("--dry-run", is_flag=True, help="Print what would be learnt from; train nothing.")
@trust_option
@json_option
@click.pass_context
def grpo(context: click.Context, **options: Any) -> None:
    """Reinforcement learning (GRPO) on the cache's prompts, judged by their verifiers. The teacher is never loaded.

    The reward is 1 for a right answer (tests are run in a sandbox) and 0.1 for one in the form asked for; an answer that is
    cut off gets nothing. Other options are trl.GRPOConfig's, by their names: --num-generations 8, --max-completion-length 512,
    --beta 0.04, --learning-rate 1e-6, --max-steps 200, --use-vllm, --report-to tensorboard, ...

    \b
    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --max-steps 100
    kd grpo --from-cache data/cache --student data/kd --output-dir data/grpo --guide prefix --where "success > 0"
    """
    quiet.libraries()
    from trainer import grpo as reinforcement

    first_rank = _is_first_rank()
    _warn_of_unsafe(options["unsafe_exec"] and first_rank)
    extra = _grpo_extra(context)
    config = reinforcement.GrpoConfig(
        arguments=extra, **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")}
    )
    resolved = reinforcement.prepare(config)
    if options["dry_run"]:
        _print_facts(resolved.facts(), options["as_json"])
        return
    if first_rank:
        _introduce(resolved)
    show = _StepLine(resolved.checkpoint)

    def report(step: int, steps: int, logs: dict[str, float]) -> None:
        names = {
            "reward": "reward",
            "rewards/correctness/mean": "right",
            "rewards/form/mean": "form",
            "rewards/likeness/mean": "likeness",
            "completions/mean_length": "tokens",
            "entropy": "entropy",
            "kl": "kl",
        }
        show(step, steps, "  ".join(f"{short} {float(logs[k]):.3g}" for k, short in names.items() if k in logs))

    try:
        found = reinforcement.train(resolved, report)
    except KeyboardInterrupt:
        if first_rank:
            _note(f"interrupted. To continue at the last checkpoint:\n  {_this_command()}")
        raise
    if first_rank:
        _print_facts(found, options["as_json"])


@kd.command("evaluate", context_settings=CONTEXT)
@click.argument("models", nargs=-1, required=True, type=NAME_OR_PATH)
@from_cache_option
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@where_option
@max_length_option
@click.option(
    "--generate",
    type=click.IntRange(0),
    help="Generate answers for N prompts; 0 for none, and no Rouge-L [default: all].",
)
@click.option(
    "--temperature",
    "temperatures",
    type=click.FloatRange(0),
    multiple=True,
    help="Of generated answers, 0 is greedy; give it again for several [default: the teacher's in the cache, else 0].",
)
@click.option("--top-p", type=float, help="Nucleus of sampling [default: the teacher's].")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Answers a prompt, at temperatures above 0 [default: as many as the teacher's].",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), help="Longest generated answer [default: the teacher's, else 128]."
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    show_default=True,
    help="What generates; auto is vLLM where it is installed.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@unsafe_option
@click.option(
    "--out",
    type=PATH,
    default=Path("data/evaluation"),
    show_default=True,
    help="Folder of what is measured, for kd compare; what is there with the same settings is not measured again.",
)
@trust_option
@json_option
def evaluate(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure students on a cache's held-out split, beside the teacher, whose row comes from the cache.

    A model is a folder or a Hub id, or LABEL=MODEL; models of one label count as runs (training seeds) of a kind.

    \b
    kl          nats a token to the teacher, bucket form     agreement   with the teacher's best token
    ce          of the completions, nats a token             ece         calibration error of the best token
    rougeL      F1 with the reference: words of any script, no stemming; rougeL_teacher: with the teacher's own answer
    exact       the reference, word for word                 pass@K      right by the row's verifier (tests are run)

    \b
    kd evaluate data/student data/sft data/kd --from-cache data/cache
    kd evaluate before=data/student kd=data/kd-0 kd=data/kd-1 --from-cache data/cache --temperature 0 --temperature 1
    kd compare data/evaluation
    """
    quiet.libraries()
    from trainer import compare as comparison
    from trainer import evaluate as evaluation

    _warn_of_unsafe(options["unsafe_exec"])
    line = _ProgressLine("done")
    config = evaluation.EvaluateConfig(models=tuple(map(evaluation.label_of, models)), **options)
    _note_device()
    out = evaluation.evaluate(config, lambda what, done, total: line.show(done, total, what, None), _note)
    line.close()
    found = comparison.rows([out])
    if as_json:
        click.echo(json_text(found, indent=2))
    else:
        _print_table(*comparison.wide(found))
        _note(f"intervals and retention: kd compare {out}")


@kd.command("compare", context_settings=CONTEXT)
@click.argument("evaluations", nargs=-1, required=True, type=PATH)
@click.option("--against", help="Label of a model to take the differences to, as in --against sft.")
@click.option("--metric", "metrics", multiple=True, help="Show this metric alone; give it again for several.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--out", type=PATH, help="Folder of comparison.json and .csv [default: the first].")
@json_option
def compare(
    evaluations: tuple[Path, ...],
    against: str | None,
    metrics: tuple[str, ...],
    markdown: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """What each student retained of the teacher, with 95% intervals, from what kd evaluate measured.

    Retention is the student's value over the teacher's, on the same prompts and at the same temperature; models that
    were measured on others are refused. Intervals resample the problems, and runs of one label.

    \b
    kd compare data/evaluation
    kd compare data/evaluation --against sft --metric rougeL --metric kl
    """
    from trainer import compare as comparison

    found = comparison.rows(evaluations, against)
    unknown = [name for name in metrics if name not in {row["metric"] for row in found}]
    if unknown:
        there = ", ".join(dict.fromkeys(row["metric"] for row in found))
        raise click.UsageError(f"--metric {unknown[0]}: not measured; there are: {there}")
    written = comparison.write(found, out or evaluations[0])
    if all(row["interval"] is None for row in found):
        _note("no intervals: the split holds fewer than five problems, and resampling so few says little of others")
    if metrics:
        found = [row for row in found if row["metric"] in metrics]
    if as_json:
        click.echo(json_text(found, indent=2))
    else:
        (_print_markdown if markdown else _print_table)(*comparison.long(found))
        _note(f"written: {', '.join(map(str, written))}")


@kd.command("quantize", context_settings=CONTEXT)
@click.argument("student", type=NAME_OR_PATH)
@click.option("--out", type=PATH, required=True, help="Folder of the quantized student.")
@click.option(
    "--format",
    type=click.Choice(["nf4", "fp4", "int8", "w4a16"]),
    default="nf4",
    show_default=True,
    help="nf4, fp4 (4 bits), int8: for transformers. w4a16 (4 bits, calibrated on the cache's train split): for vLLM.",
)
@click.option(
    "--from-cache",
    type=LOCATION,
    multiple=True,
    help="A cache: its test split measures the quality, its train split calibrates w4a16. Give it again for several.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Measure size, memory and speed before and after, and with --from-cache the quality.",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Of measuring both in turns; medians are shown.",
)
@click.option("--overwrite", is_flag=True, help="Delete a quantized student that is already there.")
@click.option("--dry-run", is_flag=True, help="Print the sizes before and (estimated) after; write nothing.")
@trust_option
@json_option
def quantize(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Quantize a student's linear layers to 4 or 8 bits, and measure what that saves and what it costs.

    Embeddings and head stay as they are. The folder loads as any other: in transformers, kd evaluate, kd chat. Figures
    of before and after are of this machine and one sequence at a time; they are kept in OUT/quantization.json and .csv.

    \b
    kd quantize data/kd --out data/kd-nf4 --from-cache data/cache
    kd quantize data/kd --out data/kd-w4a16 --format w4a16 --from-cache data/cache
    """
    quiet.libraries()
    from trainer import quantize as quantizing

    plan = quantizing.prepare(quantizing.QuantizeConfig(**options))
    if dry_run:
        _print_facts(plan.facts(), as_json)
        return
    line = _ProgressLine("done")
    _note_device()
    record = quantizing.quantize(plan, lambda what, done, total: line.show(done, total, what, None))
    line.close()
    if as_json:
        click.echo(json_text(record, indent=2))
    elif record["measured"]:
        _print_table(*quantizing.table(record["measured"]["rows"]))
        _say(f"\n{record['measured']['verdict']}")
    else:
        _print_facts(plan.facts(), as_json)


@kd.command("report", context_settings=CONTEXT)
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=PATH)
@click.option("--cache", type=LOCATION, help="The cache they come from [default: the one among the folders].")
@click.option(
    "--out",
    type=PATH,
    default=Path("data/report"),
    show_default=True,
    help="Folder of report.html, report.json and plots/*.csv.",
)
@json_option
def report(folders: tuple[Path, ...], cache: Path | None, out: Path, as_json: bool) -> None:
    """One page on what was trained, what it kept of the teacher and what it cost. It opens anywhere, without a network.

    FOLDER is a run, an evaluation or a quantized student, or a folder that holds some, as kd run and kd demo leave it.

    \b
    kd report data/demo --out data/demo/report
    kd report data/kd data/sft data/grpo data/evaluation --cache data/qwen
    """
    quiet.libraries()
    from trainer import report as reporting

    found = reporting.find(folders, cache)
    page = reporting.write(found, out, _note)
    _print_facts(
        {
            "report": str(page),
            "runs": len(found.runs),
            "evaluations": len(found.evaluations),
            "quantized": len(found.quantized),
            "cache": str(found.cache) if found.cache else None,
        },
        as_json,
    )


@kd.command("push", context_settings=CONTEXT)
@click.argument("folder", type=PATH)
@click.argument("repo_id", metavar="REPO")
@click.option("--public", is_flag=True, help="Make the repository public [default: private].")
@click.option("--dry-run", is_flag=True, help="Print what would go; send nothing.")
@json_option
def push(folder: Path, repo_id: str, public: bool, dry_run: bool, as_json: bool) -> None:
    """Upload a cache (as a data set) or a student (as a model) to the Hugging Face Hub, with its card.

    Checkpoints, optimizer states and set-aside shards stay here. The options that a cache or run was made with go along, and
    paths among them; so do prompts and answers of the data set: check its licence and the teacher's before --public.

    \b
    kd push data/qwen my-name/qwen-cache --dry-run
    kd push data/kd my-name/qwen-0.5b-distilled
    """
    from kdcache import publish

    asked = publish.prepare(folder, repo_id, private=not public)
    facts = {
        "repository": f"{repo_id} ({asked.repo_type}, {'private' if asked.private else 'public'})",
        "files": len(asked.files),
        "bytes": sum(asked.files.values()),
    }
    if dry_run and not as_json:
        for name, size in asked.files.items():
            _say(f"{size:>15,}  {name}")
    if not dry_run:
        facts["url"] = publish.push(asked)
    _print_facts(facts | ({"names": list(asked.files)} if as_json else {}), as_json)


@kd.command("view", context_settings=CONTEXT)
@click.argument("cache", type=LOCATION)
@click.option("--sample", help="Open this sample_id first.")
@click.option(
    "--student",
    type=NAME_OR_PATH,
    help="Show this student (a folder or Hub id) beside the teacher; it is loaded when it is first needed.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Listen here [default: 8470, or a free one where that is taken]."
)
@click.option("--no-browser", is_flag=True, help="Print the address alone, and open no browser.")
@trust_option
def view(cache: Path, sample: str | None, student: str | None, port: int | None, no_browser: bool) -> None:
    """Look at a cache in the browser: its samples, each token shaded by how unsure the teacher was, and what else it could have said.

    Search, and sort by uncertainty, surprise, length or reward. With --student, shade by the student's KL to the teacher
    instead, and see both side by side. The page comes from this process, on 127.0.0.1; nothing leaves the machine, and
    the teacher is not loaded. Ctrl-C ends it.

    \b
    kd view data/demo/cache
    kd view data/demo/cache --student data/demo/kd --sample builtin:en-001:g
    """
    quiet.libraries()
    from trainer.view import View

    with contextlib.closing(View(cache)) as viewed:
        beside = None
        if student is not None:
            from trainer.forced import Student
            from trainer.student import check_tokenizer

            check_tokenizer(student, viewed.cache)
            beside = Student(student, viewed.cache)
        if sample is not None:
            viewed.shown(sample)
        _serve(viewed, beside, port, sample, not no_browser)


def _serve(viewed: Any, student: Any, port: int | None, sample: str | None, open_browser: bool) -> None:
    from trainer.serve import Server

    with Server(viewed, student, port, sample) as server:
        click.echo(server.url)
        _note("Ctrl-C ends it")
        sys.stdout.flush()
        with contextlib.ExitStack() as leaving:
            if open_browser and (
                sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            ):
                import webbrowser  # without a display it would start a text browser in this very terminal

                webbrowser.open(leaving.enter_context(_address_file(server.url)))
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


@contextlib.contextmanager
def _address_file(url: str) -> Iterator[str]:
    """A file that leads to ``url``, for this user's eyes alone: a browser's arguments are everybody's to read."""
    with tempfile.TemporaryDirectory(prefix="kd-view-") as folder:  # mode 0700
        path = Path(folder) / "view.html"
        path.write_text(f'<meta http-equiv="refresh" content="0; url={url}">', encoding="utf-8")
        yield path.as_uri()


@kd.command("chat", context_settings=CONTEXT)
@click.argument("student", type=NAME_OR_PATH)
@click.option("--system", help="System prompt.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--bos",
    type=click.Choice(["auto", "add", "never"]),
    help="What stands before a prompt, as in kd cache-teacher [default: as the student was trained].",
)
@trust_option
def chat(student: str, system: str | None, temperature: float, max_new_tokens: int, bos: str | None) -> None:
    """Try a student by hand: one line, one answer; an empty line or Ctrl-D ends.

    \b
    kd chat data/kd
    echo "What is 3 + 4?" | kd chat data/kd
    """
    quiet.libraries()
    from trainer import chat as chatting

    conversation = chatting.Conversation(student, system, temperature, max_new_tokens, bos)
    _note_device()
    if conversation.prompts.lacks_bos:
        _note(f"warning: {student} {conversation.prompts.without_bos}")
    while True:
        if sys.stdin.isatty():
            click.secho("> ", nl=False, err=True, bold=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        for piece in conversation.answer(line):
            click.echo(printable(piece, keep="\n\t") if sys.stdout.isatty() else piece, nl=False)
        click.echo()


@kd.command("demo", context_settings=CONTEXT)
@click.option(
    "--out",
    type=PATH,
    default=Path("data/demo"),
    show_default=True,
    help="Folder of everything it makes.",
)
def demo(out: Path) -> None:
    """Cache a teacher, train a student with KD and one with SFT on the same examples, and compare them.

    Everything is real: SmolLM2-135M-Instruct in vLLM, DuckDB, transformers. About a quarter of an hour on two cores;
    run it again after an interruption and it continues.

    \b
    kd demo --out data/demo
    """
    from kdcache import recipe

    recipe.run("demo", out, _note)


@kd.command("run", context_settings=CONTEXT)
@click.argument("recipe", type=NAME_OR_PATH)
@click.option("--out", type=PATH, help="Folder of everything it makes [default: data/RECIPE].")
@click.option(
    "--data-path",
    type=_PathType(exists=True),
    help="The data set's file or folder; without it the recipe takes it from the Hub.",
)
@click.option("--dry-run", is_flag=True, help="Print the commands, each checked; run none.")
def run_recipe(recipe: str, out: Path | None, data_path: Path | None, dry_run: bool) -> None:
    """Run a whole experiment: cache, train (KD and SFT), evaluate, compare. RECIPE is a name of recipes/, or a .yaml.

    Run it again after an interruption: it continues where it stopped.

    \b
    kd run dolly-en --dry-run
    kd run dolly-en-cpu --data-path dolly.jsonl --out data/dolly
    """
    quiet.libraries()
    from kdcache import recipe as recipes

    out = out or Path("data") / Path(recipe).stem
    if not dry_run:
        recipes.run(recipe, out, _note, data_path)
        return
    for step in recipes.steps(recipes.load(recipe), out, data_path):
        _check_command(step.arguments)
        _say(f"# {step.name}\n{step.command}\n")


def _check_command(arguments: list[str]) -> None:
    """Parse a `kd` command as if it were run: UsageError for what it does not know."""
    command: click.Command = kd
    while isinstance(command, click.Group):
        name, arguments = arguments[0], arguments[1:]
        if name not in command.commands:
            raise click.UsageError(f"no command {name}")
        command = command.commands[name]
    with command.make_context(command.name, list(arguments)) as context:
        if command is cache_teacher:
            _engine_extra(context, context.params["engine"])
        elif command is train:
            _train_extra(context)
        elif command is grpo:
            _grpo_extra(context)


# --- how things are printed -------------------------------------------------------------------------------------------


def _note(text: str) -> None:
    click.echo(printable(text, keep="\n\t"), err=True)


def _say(text: str) -> None:
    """Lines for people on stdout. Data for programs (JSON, CSV) goes its own way."""
    click.echo(printable(text, keep="\n\t"))


def _is_first_rank() -> bool:
    """Whether this process speaks: under torchrun one does."""
    return os.environ.get("RANK", "0") == "0"


def _introduce(resolved: Any) -> None:
    """What a training run (``trainer.run.Run`` or ``trainer.grpo.GrpoRun``) says before its first step."""
    _note_device()
    facts = resolved.facts().items()
    _note("  ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts if value is not None))
    for note in resolved.notes:
        _note(note)


def _note_device() -> None:
    """The first line of whatever computes: on which device, and why not on a GPU that is there."""
    from kdcache import machine

    _note(f"on {machine.chosen()}")


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity, and no key but text: a tail of -inf becomes null."""
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any, width: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = printable(str(value))
    return text if len(text) <= width else text[: width - 1] + "…"


def _print_rows(
    names: Sequence[str], rows: Iterable[Sequence[Any]], as_csv: bool, as_json: bool, width: int = 64
) -> None:
    if as_json:
        for row in rows:
            click.echo(json_text(dict(zip(names, map(_finite, row))), default=_plain))
    elif as_csv:
        writer = csv.writer(_CsvLines(), lineterminator="\r\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        _print_table(names, rows, width)


class _CsvLines:
    """Takes rows that end in CR LF, so that a cell with one of the two is quoted, and ends them in LF.

    In a file or a pipe CSV is exact; on a terminal it is looked at.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()

    def write(self, row: str) -> int:
        line = row.removesuffix("\r\n") + "\n"
        return sys.stdout.write(printable(line, keep="\n\t") if self.terminal else line)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """A closed pipe, as of `| head`, is no error: what is left is not printed."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


WIDTHS_FROM = 1000  # rows that the widths of a table's columns are taken from: the others are not held in memory


def _print_table(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
    rest = iter(rows)
    first = list(itertools.islice(rest, WIDTHS_FROM))
    names = [printable(name) for name in names]
    cells = [[_cell(value, width) for value in row] for row in first]
    numeric = [all(isinstance(r[i], int | float | type(None)) for r in first) for i in range(len(names))]  # type: ignore[index]
    widths = [max([len(n), *(len(r[i]) for r in cells)]) for i, n in enumerate(names)]

    def line(values: Sequence[str]) -> str:
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, numeric)).rstrip()

    click.echo(line(names))
    click.echo("  ".join("-" * w for w in widths))
    for row in itertools.chain(cells, ([_cell(value, width) for value in row] for row in rest)):
        click.echo(line(row))


def _print_markdown(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for line in (names, ["---"] * len(names), *([_cell(value, 200) for value in row] for row in rows)):
        click.echo(f"| {' | '.join(line)} |")


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json_text(facts, indent=2, default=_plain))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        click.echo(printable(f"{name.replace('_', ' ').ljust(width)}  {shown if shown is not None else '-'}"))


class _ProgressLine:
    """One line on a terminal; elsewhere a line every ten seconds. The last state is always shown."""

    def __init__(self, unit: str):
        self.unit = unit
        self.unshown: tuple[int, int, str, float | None] | None = None
        self.terminal = sys.stderr.isatty()
        self.last = 0.0

    def show(self, done: int, total: int, middle: str, eta_seconds: float | None) -> None:
        now = time.monotonic()
        if done < total and now - self.last < (0.2 if self.terminal else 10):
            self.unshown = done, total, middle, eta_seconds
            return
        self.last = now
        self._write(done, total, middle, eta_seconds)

    def _write(self, done: int, total: int, middle: str, eta_seconds: float | None) -> None:
        self.unshown = None
        eta = (
            ""
            if eta_seconds is None or done >= total
            else f"  ETA {int(eta_seconds // 60)}:{int(eta_seconds % 60):02d}"
        )
        text = printable(f"{done:,}/{total:,} {self.unit}  {middle}{eta}")
        sys.stderr.write(f"\r\x1b[K{text}" if self.terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.unshown:
            self._write(*self.unshown)
        if self.terminal and self.last:
            sys.stderr.write("\n")


class _CtrlC:
    """The first Ctrl-C only sets ``asked``, once there is something to finish; the second, or an early one, stops."""

    def __init__(self, begun: Callable[[], bool]):
        self.begun = begun
        self.asked = False

    def __enter__(self) -> _CtrlC:
        self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _handle(self, *_: object) -> None:
        if self.asked or not self.begun():
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write("\nfinishing the shards that are begun; Ctrl-C again stops at once\n")


class _StepLine:
    """A line a logged step of a training, with the time that is left at the speed so far."""

    def __init__(self, checkpoint: str | None):
        self.first = int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else 0
        self.begun = time.monotonic()

    def __call__(self, step: int, steps: int, shown: str) -> None:
        seconds = (time.monotonic() - self.begun) / max(step - self.first, 1) * (steps - step)
        _note(f"step {step}/{steps}  {shown}  ETA {int(seconds // 60)}:{int(seconds % 60):02d}")


def _warn_of_unsafe(unsafe_exec: bool) -> None:
    if unsafe_exec:
        click.secho(
            "warning: --unsafe-exec runs what a model wrote, with your rights and no sandbox", fg="red", err=True
        )


def _this_command() -> str:
    """What was typed, to be run again; without --overwrite, which would delete what is to be continued."""
    return shlex.join(["kd", *(argument for argument in sys.argv[1:] if argument != "--overwrite")])


# --- options that are passed through ----------------------------------------------------------------------------------


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(
            f"--split-ratios {text}: expected three shares (train,validation,test), as in 0.9,0.05,0.05"
        ) from None
    return train, validation, test


def _plan_slice(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) < 20):
        raise click.UsageError(f"--plan-slice {text}: expected I/N with I from 0 to N - 1, as in 0/4 .. 3/4")
    return int(index), int(count)


def _extra_options(context: click.Context) -> dict[str, Any]:
    """`--some-name value`, `--some-name=value`, `--flag` and `--no-flag` that the command itself does not know."""
    found: dict[str, Any] = {}
    own = [option for parameter in context.command.params for option in parameter.opts]
    arguments = list(context.args)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--") or len(argument) < 4:
            raise click.UsageError(f"unexpected argument {argument!r}")
        near = _nearest(argument.partition("=")[0], own)
        if near:
            raise click.UsageError(f"no option {argument.partition('=')[0]}; did you mean {near}?")
        name, has_value, value = argument[2:].partition("=")
        if not has_value and arguments and not arguments[0].startswith("--"):
            has_value, value = "=", arguments.pop(0)
        key = name.replace("-", "_")
        if has_value:
            found[key] = _literal(value)
        elif key.startswith("no_"):
            found[key[3:]] = False
        else:
            found[key] = True
    return found


def _literal(value: Any) -> Any:
    """What a text means: a number, True, None, a list; else the text. (YAML reads 2e-4 as text.)"""
    import ast

    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return _expanded(value)


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.84) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def _check_extra(
    extra: dict[str, Any],
    known: Iterable[str],
    whose: str,
    own: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Refuse what is not ``known``, with the name that was probably meant: a new one, or the nearest."""
    known = list(known)
    for key in extra:
        if key not in known:
            now = (renamed or {}).get(key)
            near = _nearest(key, [*known, *own], 0.6)
            hint = f"; it is now {now}" if now else f"; did you mean --{near.replace('_', '-')}?" if near else ""
            hint = hint.replace("; it is now nothing: ", ": ")
            raise click.UsageError(f"no option --{key.replace('_', '-')}, neither of this command nor of {whose}{hint}")
    return extra


def _engine_extra(context: click.Context, engine: str) -> dict[str, Any]:
    extra = _extra_options(context)
    if extra and engine == "vllm":
        from kdcache.teachers.vllm import engine_options

        _check_extra(extra, engine_options(), "vLLM")
    return extra


def _train_extra(context: click.Context) -> dict[str, Any]:
    from trainer import run

    return _library_extra(context, run.training_argument_names(), "TrainingArguments", run.RENAMED)


def _grpo_extra(context: click.Context) -> dict[str, Any]:
    from trainer import grpo

    return _library_extra(context, grpo.argument_names(), "trl.GRPOConfig")


def _library_extra(
    context: click.Context, known: Iterable[str], whose: str, renamed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What --config and the command line hold that is the library's, flags winning."""
    own = [p.name for p in context.command.params if p.name]
    return _check_extra(context.meta.get("kd.config", {}) | _extra_options(context), known, whose, own, renamed)


def _let_first_rank_speak() -> None:
    """Wait in another rank than the first: an error that all meet is printed once, as torchrun ends the others by then.

    One that a single rank meets, such as a file that its machine lacks, is printed by that rank.
    """
    if not _is_first_rank():
        time.sleep(30)


def main() -> None:
    """The `kd` command: user errors become one sentence and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        kd(prog_name="kd", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except Unstoppable:
        _note("DuckDB does not react to Ctrl-C in this query: kd ends without waiting for it")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # an exit in good order would wait for what does not end
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as error:
        _let_first_rank_speak()
        shown = io.StringIO()
        error.show(shown)
        _note(shown.getvalue().rstrip("\n"))
        code = 2
    except KDError as error:
        _let_first_rank_speak()
        _note(f"Error: {error}")
        code = error.exit_code
    except ImportError as error:
        from kdcache import extras

        package = extras.missing_package(error)
        if package in (None, "kdcache", "trainer", "cli"):
            raise
        click.echo(f"Error: {extras.missing(package)}", err=True)
        code = 1
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _note(f"Error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        code = 1
    else:
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
