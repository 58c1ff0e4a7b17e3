"""What commands print: data on stdout, everything else on stderr, and errors as one sentence and an exit code."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from kdcache.errors import KDError, Unstoppable
from kdcache.printable import json_text, printable


def note(text: str) -> None:
    click.echo(printable(text, keep="\n\t"), err=True)


def say(text: str) -> None:
    """Lines for people on stdout. Data for programs (JSON, CSV) goes its own way."""
    click.echo(printable(text, keep="\n\t"))


def is_first_rank() -> bool:
    """Whether this process speaks: under torchrun one does."""
    return os.environ.get("RANK", "0") == "0"


def introduce(resolved: Any) -> None:
    """What a training run (``trainer.distill.plan.Run`` or ``trainer.grpo.train.GrpoRun``) says before its first step."""
    note_device()
    facts = resolved.facts().items()
    note("  ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts if value is not None))
    for text in resolved.notes:
        note(text)


def note_device() -> None:
    """The first line of whatever computes: on which device, and why not on a GPU that is there."""
    from kdcache import machine

    note(f"on {machine.device_in_words()}")


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


def print_rows(
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
        print_table(names, rows, width)


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
def reader_may_leave() -> Iterator[None]:
    """A closed pipe, as of `| head`, is no error: what is left is not printed."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


WIDTHS_FROM = 1000  # rows that the widths of a table's columns are taken from: the others are not held in memory


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
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


def print_markdown(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for line in (names, ["---"] * len(names), *([_cell(value, 200) for value in row] for row in rows)):
        click.echo(f"| {' | '.join(line)} |")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json_text(facts, indent=2, default=_plain))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {v}" for k, v in value.items())
        click.echo(printable(f"{name.replace('_', ' ').ljust(width)}  {shown if shown is not None else '-'}"))


class ProgressLine:
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


class CtrlC:
    """The first Ctrl-C only sets ``asked``, once there is something to finish; the second, or an early one, stops."""

    def __init__(self, begun: Callable[[], bool]):
        self.begun = begun
        self.asked = False

    def __enter__(self) -> CtrlC:
        self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _handle(self, *_: object) -> None:
        if self.asked or not self.begun():
            raise KeyboardInterrupt
        self.asked = True
        sys.stderr.write("\nfinishing the shards that are begun; Ctrl-C again stops at once\n")


class StepLine:
    """A line a logged step of a training, with the time that is left at the speed so far."""

    def __init__(self, checkpoint: str | None):
        self.first = int(Path(checkpoint).name.rpartition("-")[2]) if checkpoint else 0
        self.begun = time.monotonic()

    def __call__(self, step: int, steps: int, shown: str) -> None:
        seconds = (time.monotonic() - self.begun) / max(step - self.first, 1) * (steps - step)
        note(f"step {step}/{steps}  {shown}  ETA {int(seconds // 60)}:{int(seconds % 60):02d}")


def warn_of_unsafe(unsafe_exec: bool) -> None:
    if unsafe_exec:
        click.secho(
            "warning: --unsafe-exec runs what a model wrote, with your rights and no sandbox", fg="red", err=True
        )


def this_command() -> str:
    """What was typed, to be run again; without --overwrite, which would delete what is to be continued."""
    return shlex.join(["kd", *(argument for argument in sys.argv[1:] if argument != "--overwrite")])


def _let_first_rank_speak() -> None:
    """Wait in another rank than the first: an error that all meet is printed once, as torchrun ends the others by then.

    One that a single rank meets, such as a file that its machine lacks, is printed by that rank.
    """
    if not is_first_rank():
        time.sleep(30)


def exit_code(command: Callable[[], Any]) -> int:
    """Run ``command``: user errors become one sentence and an exit code."""
    try:
        command()
    except click.exceptions.Abort:
        code = 130
    except Unstoppable:
        note("DuckDB does not react to Ctrl-C in this query: kd ends without waiting for it")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # an exit in good order would wait for what does not end
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as error:
        _let_first_rank_speak()
        shown = io.StringIO()
        error.show(shown)
        note(shown.getvalue().rstrip("\n"))
        code = 2
    except KDError as error:
        _let_first_rank_speak()
        note(f"Error: {error}")
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
        note(f"Error: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        code = 1
    else:
        code = 0
    return code
