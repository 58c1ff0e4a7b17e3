"""The plots of a report: matplotlib's SVG in the page's own colours and type, with the data behind each.

A colour is a variable of base.css, so that one plot serves the light and the dark page. matplotlib knows no variables: it
draws in stand-in colours, which are replaced in the SVG. Every plot carries a sentence on what it shows, for screen readers.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluate.bootstrap import Estimate

SERIES = tuple(f"--series-{number}" for number in range(1, 9))
INK, MUTED, LINE = "--ink", "--ink-muted", "--line"
_VARIABLES = (*SERIES, INK, MUTED, LINE)
#: The colours that matplotlib draws in, which ``_svg`` replaces by the variables.
_STAND_IN = {variable: f"#0a0b{number:02x}" for number, variable in enumerate(_VARIABLES)}

WIDTH_INCHES, HEIGHT_INCHES = 4.7, 3.0  # near the size at which a phone shows them


@dataclass(frozen=True)
class Figure:
    """One plot: its SVG, a title and a note, and the data behind it."""

    name: str  # of its CSV
    title: str
    note: str
    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Curve:
    """A line of a plot. Lines of one ``label`` share an entry of the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its interval, on a line of its own."""

    label: str
    estimate: Estimate
    colour: str


def curves(
    name: str, title: str, note: str, x_label: str, y_label: str, lines: Sequence[Curve], log_x: bool = False
) -> Figure:
    """Draw lines through their points."""
    figure, axes = _axes(x_label, y_label)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    legend: set[str] = set()
    for curve in lines:
        axes.plot(
            *zip(*curve.points),
            color=_STAND_IN[curve.colour],
            linestyle=(0, (4, 2)) if curve.dashed else "-",
            marker="o" if curve.marked or len(curve.points) == 1 else None,
            markersize=4,
            linewidth=1.6,
            label=None if curve.label in legend else curve.label,
        )
        legend.add(curve.label)
    if not log_x and all(float(x).is_integer() for curve in lines for x, _ in curve.points):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if len(legend) > 1:
        _legend(figure, axes, len(legend))
    rows = tuple((curve.label, x, y) for curve in lines for x, y in curve.points)
    description = (
        f"{title}. {len(legend)} lines: {', '.join(dict.fromkeys(c.label for c in lines))}; {y_label} by {x_label}."
    )
    return Figure(name, title, note, _svg(figure, description), ("line", x_label, y_label), rows)


def bars(
    name: str,
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    groups: Mapping[str, Mapping[str, float]],
    colours: Sequence[str] = SERIES,
) -> Figure:
    """Draw bars side by side. ``groups``: legend -> (name on the axis -> height)."""
    import numpy as np

    figure, axes = _axes(x_label, y_label)
    names = list(dict.fromkeys(n for heights in groups.values() for n in heights))
    width = 0.8 / max(len(groups), 1)
    for number, (label, heights) in enumerate(groups.items()):
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(
            places,
            [heights.get(n, 0.0) for n in names],
            width,
            color=_STAND_IN[colours[number % len(colours)]],
            label=label,
        )
    every = -(-sum(map(len, names)) // 40)  # as many names as fit
    axes.set_xticks(range(0, len(names), every), names[::every])
    if len(groups) > 1:
        _legend(figure, axes, len(groups))
    rows = tuple((label, n, heights[n]) for label, heights in groups.items() for n in heights)
    most = max(rows, key=lambda row: row[2], default=("", "", 0.0))
    description = f"{title}. Bars of {y_label} by {x_label}; the highest is {most[2]:.3g} at {most[1]} ({most[0]})."
    return Figure(name, title, note, _svg(figure, description), ("series", x_label, y_label), rows)


def intervals(name: str, title: str, note: str, x_label: str, dots: Sequence[Dot]) -> Figure:
    """Draw dots with their 95% intervals, one line each."""
    figure, axes = _axes(x_label, "", height=0.9 + 0.32 * len(dots))
    for place, dot in enumerate(reversed(dots)):
        if dot.estimate.interval is not None:
            axes.plot(dot.estimate.interval, [place, place], color=_STAND_IN[dot.colour], linewidth=2)
        axes.plot([dot.estimate.value], [place], "o", color=_STAND_IN[dot.colour], markersize=6)
    axes.set_yticks(range(len(dots)), [dot.label for dot in reversed(dots)])
    axes.set_ylim(-0.6, len(dots) - 0.4)
    axes.grid(False, axis="y")
    rows = tuple((dot.label, dot.estimate.value, *(dot.estimate.interval or (None, None))) for dot in dots)
    description = f"{title}: {x_label}. " + "; ".join(f"{dot.label}: {dot.estimate.value:.3g}" for dot in dots)
    return Figure(name, title, note, _svg(figure, description), ("model", x_label, "low", "high"), rows)


def _axes(x_label: str, y_label: str, height: float = HEIGHT_INCHES) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    ink, muted, line = (_STAND_IN[name] for name in (INK, MUTED, LINE))
    with rc_context(
        {
            **{"font.size": 9, "axes.edgecolor": line, "axes.labelcolor": muted, "text.color": ink},
            **{"xtick.color": muted, "ytick.color": muted, "axes.spines.top": False, "axes.spines.right": False},
            **{"axes.grid": True, "grid.color": line, "grid.linewidth": 0.6, "axes.axisbelow": True},
            **{"xtick.major.size": 0, "ytick.major.size": 0},
        }
    ):
        figure = Canvas(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(False, axis="x")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _legend(figure: Any, axes: Any, entries: int) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(entries, 3),
        frameon=False,
        fontsize=8.5,
        labelcolor=_STAND_IN[INK],
    )


def _svg(figure: Any, description: str) -> str:
    from xml.sax.saxutils import quoteattr

    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", text)
    for variable, stand_in in _STAND_IN.items():
        text = text.replace(stand_in, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)
