"""What commands print: data on stdout, everything else on stderr, and an error as one sentence and an exit code."""

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
from typing import Any

import click

from kdcache.errors import KDError, Unstoppable
from kdcache.machine import is_first_rank
from kdcache.printable import json_text, printable
from kdcache.progress import Progress


def note(text: str) -> None:
    """Print lines for people on stderr."""
    click.echo(printable(text, keep="\n\t"), err=True)


def say(text: str) -> None:
    """Print lines for people on stdout. Data for programs (JSON, CSV) is not printed with this."""
    click.echo(printable(text, keep="\n\t"))


def note_device() -> None:
    """Print the device that will compute and, if a GPU is not used, why."""
    from kdcache import machine

    note(f"on {machine.device_in_words()}")


def _plain(value: Any) -> Any:
    """Return a value that JSON has no type for as text; bytes in hexadecimal."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _finite(value: Any) -> Any:
    """Return a value that JSON can hold: -inf (of an empty tail) and NaN become null, and keys become text."""
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any, width: int) -> str:
    """Return a value as the text of a table cell, at most ``width`` characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    text = printable(str(value))
    return text if len(text) <= width else text[: width - 1] + "…"


def print_rows(
    names: Sequence[str], rows: Iterable[Sequence[Any]], as_csv: bool, as_json: bool, width: int = 64
) -> None:
    """Print rows as JSON lines, as CSV, or as a table whose cells have at most ``width`` characters."""
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
    """A file for csv.writer that prints its rows to stdout, each ended by LF.

    The writer itself must end rows with CR LF, because it quotes only cells that contain a character of the line ending.
    In a file or a pipe the CSV is exact; on a terminal, control characters are escaped.
    """

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()

    def write(self, row: str) -> int:
        line = row.removesuffix("\r\n") + "\n"
        return sys.stdout.write(printable(line, keep="\n\t") if self.terminal else line)


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Make a closed pipe, as with `| head`, no error: the remaining output is dropped."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at exit


#: The first rows of a table, whose cells decide the widths of its columns. Later rows are not held in memory.
WIDTHS_FROM = 1000


def print_table(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
    """Print a table with aligned columns; columns of numbers are aligned to the right."""
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
    """Print a table in Markdown."""
    for line in (names, ["---"] * len(names), *([_cell(value, 200) for value in row] for row in rows)):
        click.echo(f"| {' | '.join(line)} |")


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print one fact per line, or all of them as a JSON object."""
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
    """Shows the progress of work on stderr: one line on a terminal, elsewhere a line every ten seconds.

        with ProgressLine() as line:
            integrity.verify(cache, line.show)

    The last progress is always shown.
    """

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.begun = False  # whether anything was reported
        self._skipped: Progress | None = None  # the last progress, unless it is on the screen
        self._written = 0.0  # seconds on the monotonic clock

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, progress: Progress) -> None:
        self.begun = True
        due = self._written + (0.2 if self.terminal else 10)
        if progress.done >= progress.total or time.monotonic() >= due:
            self._write(progress)
        else:
            self._skipped = progress

    def close(self) -> None:
        """Show the last progress and end its line."""
        if self._skipped is not None:
            self._write(self._skipped)
        if self.terminal and self._written:
            sys.stderr.write("\n")
        self._written = 0.0

    def _write(self, progress: Progress) -> None:
        self._written, self._skipped = time.monotonic(), None
        left = progress.seconds_left if progress.done < progress.total else None
        text = f"{progress.done:,}/{progress.total:,} {progress.unit}  {progress.note}{time_left(left)}"
        text = printable(text.rstrip())
        sys.stderr.write(f"\r\x1b[K{text}" if self.terminal else text + "\n")
        sys.stderr.flush()


def time_left(seconds: float | None) -> str:
    """Return the end of a line of progress, as in "  ETA 1:05" (minutes and seconds); nothing for None."""
    return "" if seconds is None else f"  ETA {int(seconds // 60)}:{int(seconds % 60):02d}"


class CtrlC:
    """Lets a command finish what it has begun at the first Ctrl-C, and stops it at the second.

    The first Ctrl-C only sets ``requested``, for the command to look at. Before ``begun`` returns True there is nothing to
    finish, and even the first one raises KeyboardInterrupt.
    """

    def __init__(self, begun: Callable[[], bool]):
        self.begun = begun
        self.requested = False

    def __enter__(self) -> CtrlC:
        self.before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _handle(self, *_: object) -> None:
        if self.requested or not self.begun():
            raise KeyboardInterrupt
        self.requested = True
        sys.stderr.write("\nfinishing the shards that were started; Ctrl-C again stops at once\n")


def warn_of_unsafe(unsafe_exec: bool) -> None:
    """Warn of --unsafe-exec, in red."""
    if unsafe_exec:
        click.secho(
            "warning: --unsafe-exec runs programs that a model wrote, with your permissions and without a sandbox",
            fg="red",
            err=True,
        )


def this_command() -> str:
    """Return this command line for running it again, without --overwrite, which would delete the results so far."""
    return shlex.join(["kd", *(argument for argument in sys.argv[1:] if argument != "--overwrite")])


def _let_first_rank_speak() -> None:
    """Wait, in every rank but the first, long enough for torchrun to end this process.

    An error that all ranks meet is then printed once, by the first rank. An error that only this rank meets, such as a
    missing file on its machine, is still printed, after the wait.
    """
    if not is_first_rank():
        time.sleep(30)


def exit_code(command: Callable[[], Any]) -> int:
    """Run ``command`` and return its exit code. A user's error is printed as one sentence."""
    try:
        command()
    except click.exceptions.Abort:
        code = 130
    except Unstoppable:
        note("DuckDB does not react to Ctrl-C in this query: kd ends without waiting for it")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(130)  # a regular exit would wait for DuckDB's threads
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
