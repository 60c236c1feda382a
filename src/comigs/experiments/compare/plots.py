"""The comparison's plots: as inline SVG for the page, and as one figure with a panel per dataset
for a paper.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from comigs import text as f
from comigs.experiments.compare.points import Mark, Panel, Track
from comigs.runs.report.plots import COLOUR, MAX_COLOURS, bare, svg

SHAPES = "os^Dvp*X"  # matplotlib's; a shape for each eight colours
GLYPHS = "●■▲◆▼⬟★✖"  # the same for people
_DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_WIDE, _HIGH = 3.5, 2.7  # inches of a panel: a paper's column
_ACROSS = 3  # panels in a row


@dataclass(frozen=True)
class Plot:
    """What is drawn: panels, what the axes say, and how x is written. log: y may be logarithmic."""

    name: str
    panels: tuple[Panel, ...]
    x: str
    y: str
    ticks: Literal["round", "size", "count"]
    log: bool = False


def panel_svg(plot: Plot, panel: Panel) -> str:
    """One panel for the page, in the page's own colours, without legend."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    _draw(figure.add_subplot(), plot, panel, COLOUR)
    return svg(figure, f"{plot.y} by {plot.x}, {panel.title}. {_told(panel)}")


def figure_file(
    plot: Plot, settings: Sequence[str], colours: Mapping[str, str], kind: Literal["svg", "pdf"]
) -> bytes:
    """All panels with a legend, fonts inside; equal input gives equal bytes."""
    across = min(_ACROSS, len(plot.panels))
    down = math.ceil(len(plot.panels) / across)
    legend = math.ceil(len(settings) / (2 * across)) * 0.19 + 0.1
    figure = Figure(figsize=(_WIDE * across, _HIGH * down + legend), layout="constrained")
    for number, panel in enumerate(plot.panels):
        axes = figure.add_subplot(down, across, number + 1)
        _draw(axes, plot, panel, colours)
        if len(plot.panels) > 1:
            axes.set_title(panel.title, fontsize=9, color=colours["--ink"], loc="left")
    line = bool(plot.panels[0].tracks)
    keys = [
        Line2D([], [], label=name, **_look(i, colours, line)) for i, name in enumerate(settings)
    ]
    figure.legend(
        handles=keys, loc="outside lower center", ncols=2 * across, frameon=False, fontsize=8,
        labelcolor=colours["--ink"], handlelength=2.2, columnspacing=1.2,
    )  # fmt: skip
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "path", "pdf.fonttype": 42}):
        figure.savefig(
            file, format=kind, metadata={"Date": None} if kind == "svg" else {"CreationDate": None}
        )
    return file.getvalue()


def key(number: int) -> tuple[str, str]:
    """How the page writes a setting's mark: a CSS variable and a character."""
    return f"--client-{number % MAX_COLOURS}", GLYPHS[number // MAX_COLOURS % len(GLYPHS)]


def _draw(axes: Axes, plot: Plot, panel: Panel, colours: Mapping[str, str]) -> None:
    bare(axes, colours)
    for track in panel.tracks:
        _track(axes, track, colours)
    for mark in panel.marks:
        _mark(axes, mark, colours)
    if plot.ticks != "round":
        _cost_axis(axes, panel, f.size if plot.ticks == "size" else f.count)
    if plot.log:
        _log_axis(axes, panel)
    axes.set_xlabel(plot.x, fontsize=9, color=colours["--muted"])
    axes.set_ylabel(plot.y, fontsize=9, color=colours["--muted"])


def _track(axes: Axes, track: Track, colours: Mapping[str, str]) -> None:
    """A line, and around it one standard deviation to each side."""
    rounds, spreads = [r for r, _ in track.points], [s for _, s in track.points]
    look = _look(track.number, colours, True)
    if len(rounds) > 25:
        look |= {"marker": None}
    axes.plot(rounds, [s.mean for s in spreads], clip_on=False, zorder=3, **look)
    if all(s.sd is not None for s in spreads):
        low, high = ([s.mean + side * (s.sd or 0) for s in spreads] for side in (-1, 1))
        axes.fill_between(rounds, low, high, color=look["color"], alpha=0.16, linewidth=0)


def _mark(axes: Axes, mark: Mark, colours: Mapping[str, str]) -> None:
    """A point, with one standard deviation up and down."""
    look = _look(mark.number, colours, False)
    drawn: ErrorbarContainer = axes.errorbar(
        mark.x, mark.y.mean, yerr=mark.y.sd, capsize=2, elinewidth=1, capthick=1, zorder=3, **look
    )
    for part in (drawn[0], *drawn[1]):
        part.set_clip_on(False)


def _look(number: int, colours: Mapping[str, str], line: bool) -> dict[str, Any]:
    """Settings are told apart by colour, and from the ninth on by shape and dashes as well."""
    beyond = number // MAX_COLOURS
    return {
        "color": colours[f"--client-{number % MAX_COLOURS}"],
        "marker": SHAPES[beyond % len(SHAPES)],
        "markersize": 3.5 if line else 6,
        "linestyle": _DASHES[beyond % len(_DASHES)] if line else "none",
        "linewidth": 1.6,
    }


def _cost_axis(axes: Axes, panel: Panel, text: Callable[[float | None], str]) -> None:
    """From 0, so that equal budgets look equal; logarithmic above 0 where they are far apart."""
    costs = [mark.x for mark in panel.marks]
    least, most = min((x for x in costs if x), default=1.0), max(costs) or 1.0
    if most / least > 30:
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-0.1 * least, most * 2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlim(-0.04 * most, most * 1.08)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))


def _log_axis(axes: Axes, panel: Panel) -> None:
    """Logarithmic where the values span more than a factor of two: first rounds fall far."""
    values = [s.mean for track in panel.tracks for _, s in track.points]
    if min(values) > 0 and max(values) / min(values) > 2:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _told(panel: Panel) -> str:
    """For those who cannot see the plot."""
    ends = [(t.name, *t.points[0], *t.points[-1]) for t in panel.tracks]
    lines = [
        f"{name}: {a.mean:.4g} at round {i}, {b.mean:.4g} at round {j}."
        for name, i, a, j, b in ends
    ]
    return " ".join([*lines, *(f"{m.name}: {m.y.mean:.4g} at {m.x:,.0f}." for m in panel.marks)])
