"""This module draws the comparison: as inline SVG for the page, and as one figure with a panel per
dataset for a paper.
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
from comigs.experiments.compare.simulated import mean_by_hour
from comigs.experiments.compare.statistics import Comparison, Row, mean_by_round
from comigs.experiments.compare.t_test import Spread
from comigs.experiments.compare.tables import WORDS
from comigs.runs.report.plots import COLOUR, MAX_COLOURS, bare, svg

PLOTS = ("by-round", "by-bytes", "by-parameters", "by-hours")
SHAPES = "os^Dvp*X"  # matplotlib's; a shape for each eight colours
GLYPHS = "●■▲◆▼⬟★✖"  # the same for people
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
WIDE, HIGH = 3.5, 2.7  # inches of a panel: a paper's column
ACROSS = 3  # panels in a row


@dataclass(frozen=True)
class Series:
    """A setting in one panel: its points, by x. `number` is the setting's place among all settings
    of the comparison, which gives colour and shape.
    """

    name: str
    number: int
    points: tuple[tuple[float, Spread], ...]


@dataclass(frozen=True)
class Panel:
    """One dataset in one plot."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Plot:
    """What is drawn: panels, what the axes say, and how x is written. Settings are lines by round,
    and single points by any cost. log: y may be logarithmic.
    """

    name: str
    panels: tuple[Panel, ...]
    x: str
    y: str
    ticks: Literal["round", "size", "count", "hours"]
    log: bool = False

    @property
    def lines(self) -> bool:
        """Whether settings are lines."""
        return self.ticks in ("round", "hours")


def all_plots(c: Comparison) -> list[Plot]:
    """Return the plots, without those that have nothing to show."""
    metric = WORDS[c.metric]

    def scored(row: Row, cost: float | None) -> Sequence[tuple[float, Spread]]:
        score = row.scores[c.metric]
        if score is None or cost is None:
            return []
        return [(cost, score)]

    def uploaded(row: Row) -> float | None:
        per_round: float | None = row.costs["uploaded_bytes_per_round"]
        return per_round and per_round * row.setting.config.rounds

    # By round is on the valid text; what a run came to is on test.
    curves = _panels(c, 1, lambda row: list(mean_by_round(row.setting, c.metric).items()))
    by_bytes = _panels(c, 2, lambda row: scored(row, uploaded(row)))
    by_parameters = _panels(c, 2, lambda row: scored(row, row.costs["trained_parameters"]))
    by_hours = _panels(c, 1, lambda row: mean_by_hour(row.setting, c.metric))
    log, test = c.metric == "perplexity", f"test {metric}"
    made = [
        Plot(PLOTS[0], curves, "round", f"valid {metric}", "round", log),
        Plot(PLOTS[1], by_bytes, "uploaded per client", test, "size"),
        Plot(PLOTS[2], by_parameters, "trained parameters", test, "count"),
        Plot(PLOTS[3], by_hours, "simulated hours", f"valid {metric}", "hours", log),
    ]
    return [plot for plot in made if plot.panels]


def panel_svg(plot: Plot, panel: Panel) -> str:
    """Return one panel for the page, in the page's own colours, without legend."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    _draw(figure.add_subplot(), plot, panel, COLOUR)
    return svg(figure, f"{plot.y} by {plot.x}, {panel.title}. {_told(plot, panel)}")


def figure_file(
    plot: Plot, settings: Sequence[str], colours: Mapping[str, str], kind: Literal["svg", "pdf"]
) -> bytes:
    """Return all panels with a legend as a file, fonts inside; equal input gives equal bytes."""
    # Room for the panels, and below them for the lines of the legend.
    across = min(ACROSS, len(plot.panels))
    down = math.ceil(len(plot.panels) / across)
    below = math.ceil(len(settings) / (2 * across)) * 0.19 + 0.1
    figure = Figure(figsize=(WIDE * across, HIGH * down + below), layout="constrained")
    for number, panel in enumerate(plot.panels):
        axes = figure.add_subplot(down, across, number + 1)
        _draw(axes, plot, panel, colours)
        if len(plot.panels) > 1:
            axes.set_title(
                panel.title, fontsize=9, color=colours["--ink"], loc="left", parse_math=False
            )

    # The legend names all settings of the comparison, whichever panel has them.
    looks = [_look(number, colours, plot.lines) for number in range(len(settings))]
    keys = [Line2D([], [], label=n, **look) for n, look in zip(settings, looks, strict=True)]
    legend = figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=2 * across,
        frameon=False,
        fontsize=8,
        labelcolor=colours["--ink"],
        handlelength=2.2,
        columnspacing=1.2,
    )
    for name in legend.get_texts():  # which is no formula, whatever is in it
        name.set_parse_math(False)

    # Neither a date nor a random name may make equal figures differ.
    file = io.BytesIO()
    metadata = {"Date" if kind == "svg" else "CreationDate": None}
    with mpl.rc_context({"svg.hashsalt": plot.name, "svg.fonttype": "path", "pdf.fonttype": 42}):
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def key(number: int) -> tuple[str, str]:
    """Return how the page writes a setting's mark: a CSS variable and a character."""
    return f"--client-{number % MAX_COLOURS}", GLYPHS[number // MAX_COLOURS % len(GLYPHS)]


def _panels(
    c: Comparison, least: int, points: Callable[[Row], Sequence[tuple[float, Spread]]]
) -> tuple[Panel, ...]:
    """Return a panel for each dataset that has at least so many settings to show."""
    panels = []
    for results in c.datasets:
        series = []
        for row in results.rows:
            if own := points(row):
                name = row.setting.name
                series.append(Series(name, c.settings.index(name), tuple(own)))
        if len(series) >= least:
            panels.append(Panel(results.name, tuple(series)))
    return tuple(panels)


def _draw(axes: Axes, plot: Plot, panel: Panel, colours: Mapping[str, str]) -> None:
    """Draw a panel into its axes."""
    bare(axes, colours)
    for series in panel.series:
        if plot.lines:
            _line(axes, series, colours)
        else:
            _mark(axes, series, colours)
    # Bytes and parameters are written as people write them.
    if plot.ticks == "size":
        _cost_axis(axes, panel, f.size)
    elif plot.ticks == "count":
        _cost_axis(axes, panel, f.count)
    if plot.log:
        _log_axis(axes, panel)
    axes.set_xlabel(plot.x, fontsize=9, color=colours["--muted"])
    axes.set_ylabel(plot.y, fontsize=9, color=colours["--muted"])


def _line(axes: Axes, series: Series, colours: Mapping[str, str]) -> None:
    """Draw a line, and around it one standard deviation to each side."""
    rounds, spreads = [r for r, _ in series.points], [s for _, s in series.points]
    look = _look(series.number, colours, True)
    if len(rounds) > 25:
        look |= {"marker": None}
    axes.plot(rounds, [s.mean for s in spreads], clip_on=False, zorder=3, **look)
    if all(s.sd is not None for s in spreads):
        low = [s.mean - (s.sd or 0) for s in spreads]
        high = [s.mean + (s.sd or 0) for s in spreads]
        axes.fill_between(rounds, low, high, color=look["color"], alpha=0.16, linewidth=0)


def _mark(axes: Axes, series: Series, colours: Mapping[str, str]) -> None:
    """Draw a point, with one standard deviation up and down."""
    ((x, y),) = series.points
    look = _look(series.number, colours, False)
    drawn: ErrorbarContainer = axes.errorbar(
        x, y.mean, yerr=y.sd, capsize=2, elinewidth=1, capthick=1, zorder=3, **look
    )
    for part in (drawn[0], *drawn[1]):
        part.set_clip_on(False)


def _look(number: int, colours: Mapping[str, str], line: bool) -> dict[str, Any]:
    """Return how a setting looks. Settings are told apart by colour, and from the ninth on by shape
    and dashes as well.
    """
    beyond = number // MAX_COLOURS
    look = {
        "color": colours[f"--client-{number % MAX_COLOURS}"],
        "marker": SHAPES[beyond % len(SHAPES)],
        "markersize": 6,
        "linestyle": "none",
        "linewidth": 1.6,
    }
    if line:
        look |= {"markersize": 3.5, "linestyle": DASHES[beyond % len(DASHES)]}
    return look


def _cost_axis(axes: Axes, panel: Panel, text: Callable[[float | None], str]) -> None:
    """Begin the axis at 0, so that equal budgets look equal; make it logarithmic above 0 where they
    are far apart.
    """
    costs = [series.points[0][0] for series in panel.series]
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
    """Make y logarithmic where it spans more than a factor of two: first rounds fall far."""
    values = [s.mean for series in panel.series for _, s in series.points]
    if min(values) > 0 and max(values) / min(values) > 2:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())


def _told(plot: Plot, panel: Panel) -> str:
    """Return a panel in words, for those who cannot see it."""
    lines = []
    for series in panel.series:
        (x, first), (end, last) = series.points[0], series.points[-1]
        if plot.lines:
            unit = "round" if plot.ticks == "round" else "hour"
            said = f"{first.mean:.4g} at {unit} {x:.4g}, {last.mean:.4g} at {unit} {end:.4g}"
        else:
            said = f"{first.mean:.4g} at {x:,.0f}"
        lines.append(f"{series.name}: {said}.")
    return " ".join(lines)
