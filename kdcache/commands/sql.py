"""`kd sql` runs SQL queries on a cache; on a terminal it has a prompt."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from kdcache.commands.console import ProgressLine, note, print_rows, reader_may_leave
from kdcache.commands.options import LOCATION, PathType, json_option
from kdcache.errors import KDError

#: A check of fewer megabytes takes less than about a second, and is not worth a line.
SHOWN_MEGABYTES = 2000


class _SQLCommand(click.Command):
    """A command whose query may begin with an SQL comment (``--``), which is not an option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(context, [f"\n{arg}" if arg.startswith(("-- ", "--\n")) else arg for arg in args])


@click.command("sql", cls=_SQLCommand)
@click.argument("cache", type=LOCATION, required=False)
@click.argument("query", required=False)
@click.option("--file", type=PathType(exists=True, dir_okay=False), help="Read the query from a file.")
@click.option("--list", "list_views", is_flag=True, help="List the views, and what each answers.")
@click.option(
    "--csv", "as_csv", is_flag=True, help="Print CSV. Values are not changed when the output is a file or a pipe."
)
@json_option
def sql(
    cache: Path | None, query: str | None, file: Path | None, list_views: bool, as_csv: bool, as_json: bool
) -> None:
    """Run SQL queries on a cache, in DuckDB's dialect.

    Without QUERY, the query is read from stdin; a terminal gets a prompt.

    \b
    kd sql data/cache --list
    kd sql data/cache "SELECT * FROM captured_mass_curve"
    kd sql data/cache "SELECT * FROM uncertain_tokens LIMIT 10" --json
    kd sql data/cache
    """
    from kdcache.cache import query as queries

    def show(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 64) -> None:
        print_rows(names, rows, as_csv, as_json, width)

    def show_views() -> None:
        show(["view", "answers"], queries.described(), width=120)

    with reader_may_leave():
        if list_views:
            show_views()
            return
        if cache is None:
            raise click.UsageError("Missing argument 'CACHE'.")
        text = _query_text(query, file)
        with ProgressLine() as line:
            connection = queries.connect(cache, show=lambda p: line.show(p) if p.total > SHOWN_MEGABYTES else None)
        if unplanned := queries.unplanned_files(cache):
            first = f"(the first is {unplanned[0]})"
            note(
                f"warning: {len(unplanned)} files in data/ are in no plan and are not read {first}; run: kd cache verify {cache}"
            )
        if missing := queries.missing_shards(cache):
            shards = "1 shard is" if len(missing) == 1 else f"{len(missing)} shards are"
            note(f"warning: {shards} missing (the first is {missing[0]}); the answers leave them out")
        if text is not None:
            show(*queries.stream(connection, text))
        else:
            _sql_prompt(lambda typed: show(*queries.stream(connection, typed)), show_views, queries.is_complete)


def _query_text(query: str | None, file: Path | None) -> str | None:
    """Return the query, from the arguments, a file or stdin; None if it will be typed at a prompt."""
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
    """Answer each query that is typed, up to its semicolon, until Ctrl-D. Ctrl-C drops an unfinished query."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and editing)
    hint = "A query ends with a semicolon; .views lists the views, Ctrl-D leaves."
    note(hint)
    text = ""
    while True:
        try:
            line = _ask("...> " if text else "kd> ")
            if not text and line.strip() == ".views":
                show_views()
            elif not text and (not line.strip() or line.startswith(".")):
                note(hint)
            else:
                text += line + "\n"
                if complete(text):
                    typed, text = text, ""
                    answer(typed)
        except EOFError:
            note("")
            return
        except KDError as error:
            note(f"Error: {error}")
        except KeyboardInterrupt:
            text = ""
            note("")


def _ask(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # data alone goes to stdout
    return input()
