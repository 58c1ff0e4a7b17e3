"""`kd view` shows a cache in the browser."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from kdcache import quiet
from kdcache.commands.console import note
from kdcache.commands.options import LOCATION, NAME_OR_PATH, trust_option


@click.command("view")
@click.argument("cache", type=LOCATION)
@click.option("--sample", help="Open this sample_id first.")
@click.option(
    "--student",
    type=NAME_OR_PATH,
    help="Show this student (a folder or Hub id) beside the teacher. It is loaded when it is first needed.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), help="Port of the page [default: 8470, or a free port if it is taken]."
)
@click.option("--no-browser", is_flag=True, help="Print the address; open no browser.")
@trust_option
def view(cache: Path, sample: str | None, student: str | None, port: int | None, no_browser: bool) -> None:
    """Look at a cache in the browser.

    The page shows the samples, with each token shaded by the teacher's uncertainty, and the other tokens that the teacher
    considered. Search, and sort by uncertainty, surprise, length or reward. With --student, tokens are shaded by the
    student's KL from the teacher instead, and both stand side by side. This process serves the page on 127.0.0.1; nothing
    leaves the machine, and the teacher is not loaded. Ctrl-C ends it.

    \b
    kd view data/demo/cache
    kd view data/demo/cache --student data/demo/kd --sample builtin:en-001:g
    """
    quiet.libraries()
    from kdcache.view.samples import View

    with contextlib.closing(View(cache)) as viewed:
        beside = None
        if student is not None:
            from trainer.evaluate.forced import Student
            from trainer.student.load import check_tokenizer

            check_tokenizer(student, viewed.cache)
            beside = Student(student, viewed.cache)
        if sample is not None:
            viewed.load(sample)
        _serve(viewed, beside, port, sample, not no_browser)


def _serve(viewed: Any, student: Any, port: int | None, sample: str | None, open_browser: bool) -> None:
    from kdcache.view.server import Server

    with Server(viewed, student, port, sample) as server:
        click.echo(server.url)
        note("Ctrl-C ends it")
        sys.stdout.flush()
        with contextlib.ExitStack() as leaving:
            if open_browser and (
                sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            ):
                import webbrowser  # without a display it would start a text browser in this terminal

                webbrowser.open(leaving.enter_context(_address_file(server.url)))
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()


@contextlib.contextmanager
def _address_file(url: str) -> Iterator[str]:
    """Yield the address of a file that leads to ``url`` and that only this user can read.

    Other users of this machine can read a browser's arguments, and ``url`` holds a secret.
    """
    with tempfile.TemporaryDirectory(prefix="kd-view-") as folder:  # mode 0700
        path = Path(folder) / "view.html"
        path.write_text(f'<meta http-equiv="refresh" content="0; url={url}">', encoding="utf-8")
        yield path.as_uri()
