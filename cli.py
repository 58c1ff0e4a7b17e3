"""`kd`: parses, calls, prints. No logic here, and heavy imports only inside commands.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad shards found,
130 interrupted.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from kdcache import __version__
from kdcache.errors import KDError

EXTRA_OPTIONS = {"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="kd")
def kd() -> None:
    """Run the teacher once; distil as often as you like.

    \b
    kd cache-teacher   phase one: a teacher's log-probabilities and samples -> a Parquet cache
    kd sql             ask SQL of the cache
    kd train           phase two: a student from the cache alone
    kd evaluate        what the students kept
    kd demo            all of it, on this machine, in a quarter of an hour
    """


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


# --- phase one --------------------------------------------------------------------------------------------------------


@kd.command("cache-teacher", context_settings=EXTRA_OPTIONS)
@click.option("--teacher", default="embedded", show_default=True, help="Hub id, model folder, or `embedded` (SmolLM2-135M-Instruct).")
@click.option("--revision", help="Branch, tag or commit of a Hub teacher.")
@click.option("--examples", default="builtin", show_default=True, help="`builtin`, a .jsonl/.parquet file, or a Hub data set id.")
@click.option("--prompt-column", help="Column of the prompts, if it is not `prompt` or `messages`.")
@click.option("--completion-column", help="Column of the given answers, if it is not `completion`.")
@click.option("--system", help="System prompt to put before every prompt.")
@click.option("--limit", type=int, help="Take the first N examples.")
@click.option("--mode", type=click.Choice(["score", "sample", "both"]), default="score", show_default=True, help="Score given answers, sample the teacher's own, or both.")
@click.option("--samples", type=int, default=1, show_default=True, help="Answers to sample for each prompt.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of sampling; 0 is greedy. Log-probabilities are always at 1.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus of sampling.")
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest sampled answer, in tokens.")
@click.option("--sparsify", default="topk:64", show_default=True, help="What to keep of each distribution.")
@click.option("--capture-k", type=int, help="Candidates to take from the engine [default: what --sparsify needs].")
@click.option("--precision", type=click.Choice(["q8", "f32"]), default="q8", show_default=True, help="Of log-probabilities: 256-value codebook, or exact.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and of the splits.")
@click.option("--rows-per-shard", type=int, default=512, show_default=True, help="Samples a shard: what an interruption can cost.")
@click.option("--split-ratios", default="0.9,0.05,0.05", show_default=True, help="Shares of train,validation,test; a problem is on one side.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("data/cache"), show_default=True, help="Folder of the cache.")
@click.option("--overwrite", is_flag=True, help="Delete a cache that is already there.")
@click.option("--engine", type=click.Choice(["vllm", "transformers"]), default="vllm", show_default=True, help="vLLM, or plain transformers where vLLM cannot be installed.")
@click.option("--max-model-len", type=int, help="Longest prompt + completion; longer rows are rejected and counted [default: the model's; on a CPU at most 2048].")
@click.option("--dtype", default="auto", show_default=True, help="Of the teacher's weights.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing.")
@json_option
@click.pass_context
def cache_teacher(context: click.Context, **options: Any) -> None:
    """Run the teacher over examples and write what it said into a cache (phase one).

    Run the same command again after any interruption: it continues with the shards that are missing. Other options
    are vLLM's own, by its names: --gpu-memory-utilization 0.9, --tensor-parallel-size 2, --quantization awq, ...

    \b
    kd cache-teacher --teacher embedded --examples builtin --out data/cache
    kd cache-teacher --teacher Qwen/Qwen2.5-3B-Instruct --examples rows.jsonl --mode both --samples 4 --out data/qwen
    """
    from kdcache import capture, examples
    from kdcache.teachers import Sampling

    extra = _engine_extra(context, options["engine"])
    config = capture.CaptureConfig(
        columns=examples.Columns(options.pop("prompt_column"), options.pop("completion_column"), options.pop("system")),
        sampling=Sampling(options.pop("temperature"), options.pop("top_p"), options.pop("max_tokens")),
        split_ratios=_ratios(options.pop("split_ratios")),
        engine_extra=extra,
        **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")},
    )
    work = capture.Capture(config)
    if options["dry_run"]:
        _print_facts(work.dry_run(), options["as_json"])
        return
    line = _ProgressLine("samples")

    def show(state: capture.Progress) -> None:
        shards = f"shard {min(state.shards_done + 1, state.shards)}/{state.shards}"
        line.show(state.samples_done, state.samples, f"{shards}  {state.tokens_per_second:,.0f} tokens/s", state.eta_seconds)

    _note(f"{work.fields['teacher']} ({config.engine}, {work.dtype}), {len(work.examples)} examples -> {config.out}")
    try:
        found = work.run(show)
    except KeyboardInterrupt:
        line.close()
        _note(f"interrupted; whole shards are kept. To continue:\n  {_this_command()}")
        raise
    line.close()
    if found["rejected"]:
        _note(f"{found['rejected']} rows could not be taken; why is in {config.out}/rejected.jsonl, the first:")
        first = json.loads((config.out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()[0])
        _note(f"  {first['source']}:{first['row_id']}: {first['reason']}")
    if not found["rows"]:
        raise KDError("no sample could be taken, so the cache is empty")
    _print_facts(
        {
            "cache": str(config.out),
            "samples": found["rows"],
            "completion_tokens": found["completion_tokens"],
            "rejected": found["rejected"],
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
@click.argument("cache", type=click.Path(path_type=Path))
@json_option
def cache_info(cache: Path, as_json: bool) -> None:
    """Sum up a cache: teacher, samples, tokens, bytes a token.

    \b
    kd cache info data/cache
    """
    from kdcache import manifest

    _print_facts(manifest.summary(cache), as_json)


@kd.command("sql")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("query", required=False)
@click.option("--list", "list_views", is_flag=True, help="List the views, with what each answers.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@json_option
def sql(cache: Path, query: str | None, list_views: bool, as_csv: bool, as_json: bool) -> None:
    """Ask SQL of a cache, in DuckDB's dialect.

    \b
    kd sql data/cache --list
    kd sql data/cache "SELECT * FROM captured_mass WHERE k IN (1, 8, 64)"
    kd sql data/cache "SELECT * FROM uncertain_tokens LIMIT 10" --json
    """
    from kdcache import query as queries

    if list_views:
        names, rows = ["view", "answers"], list(queries.described())
    elif query:
        names, rows = queries.run(cache, query)
    else:
        raise click.UsageError('name a query ("SELECT ...") or --list')
    if as_json:
        for row in rows:
            click.echo(json.dumps(dict(zip(names, row)), ensure_ascii=False, default=_plain))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    else:
        _print_table(names, rows)


# --- how things are printed -------------------------------------------------------------------------------------------


def _note(text: str) -> None:
    click.echo(text, err=True)


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def _cell(value: Any, width: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = str(value).replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return text if len(text) <= width else text[: width - 1] + "…"


def _print_table(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
    cells = [[_cell(value, width) for value in row] for row in rows]
    numeric = [all(isinstance(r[i], int | float | type(None)) for r in rows) for i in range(len(names))]  # type: ignore[index]
    widths = [max([len(n), *(len(r[i]) for r in cells)]) for i, n in enumerate(names)]

    def line(values: Sequence[str]) -> str:
        return "  ".join(v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, numeric)).rstrip()

    click.echo(line(names))
    click.echo("  ".join("-" * w for w in widths))
    for row in cells:
        click.echo(line(row))


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2, default=_plain))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {shown if shown is not None else '-'}")


class _ProgressLine:
    """One line on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, unit: str):
        self.unit = unit
        self.terminal = sys.stderr.isatty()
        self.last = 0.0

    def show(self, done: int, total: int, middle: str, eta_seconds: float | None) -> None:
        now = time.monotonic()
        if done < total and now - self.last < (0.2 if self.terminal else 10):
            return
        self.last = now
        eta = "" if eta_seconds is None or done >= total else f"  ETA {int(eta_seconds // 60)}:{int(eta_seconds % 60):02d}"
        text = f"{done:,}/{total:,} {self.unit}  {middle}{eta}"
        sys.stderr.write(f"\r\x1b[K{text}" if self.terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.terminal and self.last:
            sys.stderr.write("\n")


def _this_command() -> str:
    return shlex.join(["kd", *sys.argv[1:]])


# --- options that are passed through ----------------------------------------------------------------------------------


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--split-ratios {text}: expected three shares (train,validation,test), as in 0.9,0.05,0.05") from None
    return train, validation, test


def _extra_options(context: click.Context) -> dict[str, Any]:
    """`--some-name value`, `--some-name=value`, `--flag` and `--no-flag` that the command itself does not know."""
    import ast

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
            try:
                found[key] = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
            except (ValueError, SyntaxError):
                found[key] = value
        elif key.startswith("no_"):
            found[key[3:]] = False
        else:
            found[key] = True
    return found


def _nearest(name: str, names: Iterable[str], cutoff: float = 0.84) -> str | None:
    import difflib

    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def _check_extra(extra: dict[str, Any], known: Iterable[str], whose: str) -> dict[str, Any]:
    known = list(known)
    for key in extra:
        if key not in known:
            near = _nearest(key, known, 0.6)
            hint = f"; did you mean --{near.replace('_', '-')}?" if near else ""
            raise click.UsageError(f"no option --{key.replace('_', '-')}, neither of this command nor of {whose}{hint}")
    return extra


def _engine_extra(context: click.Context, engine: str) -> dict[str, Any]:
    extra = _extra_options(context)
    if extra and engine == "vllm":
        from kdcache.teachers.vllm import engine_options

        _check_extra(extra, engine_options(), "vLLM")
    return extra


def main() -> None:
    """The `kd` command: user errors become one sentence and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        kd(prog_name="kd", standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except KDError as error:
        click.echo(f"Error: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    else:
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
