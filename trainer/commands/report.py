"""`kd report` writes one page about runs, evaluations and quantized students."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache import quiet
from kdcache.commands.console import note, print_facts
from kdcache.commands.options import LOCATION, PATH, json_option


@click.command("report")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=PATH)
@click.option("--cache", type=LOCATION, help="Cache of the runs and evaluations [default: the one in the folders].")
@click.option(
    "--out",
    type=PATH,
    default=Path("data/report"),
    show_default=True,
    help="Folder of report.html, report.json and plots/*.csv.",
)
@json_option
def report(folders: tuple[Path, ...], cache: Path | None, out: Path, as_json: bool) -> None:
    """Write a page about runs and evaluations.

    It shows what was trained, how much of the teacher's quality was kept and what it cost. The page is a single file that
    opens without a network. FOLDER is a run, an evaluation or a quantized student, or a folder that contains some, such as
    the output of kd run and kd demo.

    \b
    kd report data/demo --out data/demo/report
    kd report data/kd data/sft data/grpo data/evaluation --cache data/qwen
    """
    quiet.libraries()
    from trainer.report import find, render

    sources = find.find(folders, cache)
    page = render.write(sources, out, note)
    print_facts(
        {
            "report": str(page),
            "runs": len(sources.runs),
            "evaluations": len(sources.evaluations),
            "quantized": len(sources.quantized),
            "cache": str(sources.cache) if sources.cache else None,
        },
        as_json,
    )
