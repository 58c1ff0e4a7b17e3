"""Write report.html, which opens anywhere without a network, with report.json and the data of every plot beside it.

kd report data/demo
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.storage import atomic, folders
from kdcache.view import server
from trainer.evaluate import metrics
from trainer.evaluate.compare import Comparison
from trainer.evaluate.folder import TEACHER
from trainer.report.find import Sources
from trainer.report.gather import Contents, gather
from trainer.report.plots import Figure

LONGEST_TEXT = 20_000  # characters of a text on the page


@dataclass(frozen=True)
class TableLine:
    """One model at one temperature in the table of the page."""

    label: str
    temperature: float | None
    cells: dict[str, Comparison]  # by metric


@dataclass(frozen=True)
class Table:
    """The comparison as the page shows it."""

    metrics: list[str]
    lines: list[TableLine]
    legend: list[tuple[str, str]]  # metric, and what it is


def write(sources: Sources, out: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Write report.html, report.json and plots/*.csv in ``out``, and return the page, which is written last."""
    from trainer.report import figures as drawing

    with folders.held(out, folders.REPORT):
        folders.check_writable(out, folders.REPORT)
        contents = gather(sources, say)
        say("drawing")
        figures = drawing.figures_of(contents)
        (out / "plots").mkdir(exist_ok=True)
        for figure in figures:
            atomic.write_csv(out / "plots" / f"{figure.name}.csv", figure.columns, figure.rows)
        atomic.write_json(out / "report.json", contents.as_json())
        atomic.write_text(out / "report.html", render(contents, {figure.name: figure for figure in figures}))
    return out / "report.html"


def render(contents: Contents, figures: Mapping[str, Figure]) -> str:
    """Return the page as HTML, with its styles and plots inside."""
    import jinja2

    pages = Path(__file__).parent / "page"
    base = Path(server.__file__).parent / "page/base.css"  # the page of kd view has it too
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pages),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = _short
    environment.filters["number"] = _number
    styles = "\n".join(path.read_text(encoding="utf-8") for path in (base, pages / "report.css"))
    return environment.get_template("report.html").render(
        data=contents, figures=figures, styles=styles, table=_table(contents.comparisons), teacher=TEACHER
    )


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _short(text: str | None) -> str:
    """Return a text cut to what the page can bear; the whole is in report.json and in the cache."""
    text = text or ""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters in all)"


def _table(comparisons: Sequence[Comparison]) -> Table:
    """Return one line per model and temperature with a column per metric, and the legend of the columns."""
    names = [n for n in metrics.ordered({row.metric for row in comparisons}) if metrics.metric_of(n).on_page]
    lines: dict[tuple[str, float | None], dict[str, Comparison]] = {}
    for row in comparisons:
        lines.setdefault((row.label, row.temperature), {})[row.metric] = row
    shown = dict.fromkeys(metrics.metric_of(name) for name in names)
    return Table(
        names,
        [TableLine(label, temperature, cells) for (label, temperature), cells in lines.items()],
        [(m.name, f"{m.meaning}; {'less' if m.less_is_better else 'more'} is better") for m in shown],
    )
