"""Plots as inline SVG: matplotlib draws, the page's style sheet colours and sets the type (light
and dark alike).

Colours are drawn as stand-ins and replaced by CSS variables; text stays text; equal input gives
equal bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from comigs.runs.report.curves import Line, LossCurves, Points

MAX_COLOURS = 8  # clients told apart by colour; more are drawn grey, with their mean on top
_NAMES = (
    "--ink",
    "--muted",
    "--grid",
    "--personal",
    "--train",
    *(f"--client-{i}" for i in range(MAX_COLOURS)),
)
COLOUR = {
    name: f"#fe00{i:02x}" for i, name in enumerate(_NAMES)
}  # a page's variable -> what stands in for it


def loss_plot(curves: LossCurves, rounds: int, limits: tuple[float, float]) -> str:
    """One client: training loss by step and by round, valid loss by round, the base's valid loss as
    a dashed line.

    rounds: end of the horizontal axis. limits: of the vertical axis, the same for all clients.
    """
    figure, axes = _axes(2.9, 2.1)
    axes.plot(*_xy(curves.by_step), color=COLOUR["--train"], linewidth=0.8, alpha=0.55)
    axes.plot(
        *_xy(curves.by_round),
        color=COLOUR["--train"],
        linewidth=1.4,
        **_marked(curves.by_round, "."),
    )
    axes.plot(
        *_xy(curves.valid), color=COLOUR["--personal"], linewidth=1.9, **_marked(curves.valid, "o")
    )
    if curves.base is not None:
        axes.axhline(curves.base, color=COLOUR["--ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, max(1, rounds)), ylim=limits)
    _label(axes, "round", "nats per token")
    return svg(figure, f"Loss of client {curves.client} by round. {_ends('Valid', curves.valid)}")


def lines_plot(lines: Sequence[Line], rounds: int, what: str, top: float | None = None) -> str:
    """One line per client over rounds; `top` fixes the vertical axis to 0..top, else it starts at
    0.
    """
    figure, axes = _axes(4.6, 2.5)
    few = len(lines) <= MAX_COLOURS
    for i, line in enumerate(lines):
        if few:
            axes.plot(
                *_xy(line.points),
                color=COLOUR[f"--client-{i}"],
                linewidth=1.7,
                **_marked(line.points, "o"),
            )
        else:
            axes.plot(*_xy(line.points), color=COLOUR["--muted"], linewidth=0.6, alpha=0.5)
    if not few:
        axes.plot(*_xy(_mean_points(lines)), color=COLOUR["--personal"], linewidth=2.4)
    if top == 1:
        axes.axhline(0.5, color=COLOUR["--muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, max(1, rounds)), ylim=(0, top))
    _label(axes, "round", what)
    told = (
        [_ends(line.client, line.points) for line in lines]
        if few
        else [_ends("Mean", _mean_points(lines))]
    )
    return svg(figure, f"{what} by round. " + " ".join(told))


def limits(curves: Sequence[LossCurves]) -> tuple[float, float]:
    """Vertical limits that hold every curve, with a little air."""
    values = [v for c in curves for v in c.values]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.5
    return max(0.0, low - air), high + air


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A bare plot in inches, in the page's colours."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, COLOUR)
    return figure, axes


def bare(axes: Axes, colours: Mapping[str, str]) -> None:
    """No frame, a light grid, in these colours (COLOUR for a page)."""
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=colours["--grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=colours["--muted"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _label(axes: Axes, horizontal: str, vertical: str) -> None:
    axes.set_xlabel(horizontal, fontsize=9, color=COLOUR["--muted"])
    axes.set_ylabel(vertical, fontsize=9, color=COLOUR["--muted"])


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _marked(points: Points, marker: str) -> dict[str, Any]:
    """Points are marked while there are few; a single one would be invisible without."""
    return {"marker": marker, "markersize": 4, "clip_on": False} if len(points) <= 25 else {}


def _mean_points(lines: Sequence[Line]) -> Points:
    by_round: dict[float, list[float]] = {}
    for line in lines:
        for x, y in line.points:
            by_round.setdefault(x, []).append(y)
    return tuple((x, sum(ys) / len(ys)) for x, ys in sorted(by_round.items()))


def _ends(name: str, points: Points) -> str:
    """For those who cannot see the plot: where a line starts and ends."""
    if not points:
        return f"{name}: not measured."
    return f"{name}: {points[0][1]:.2f} at round {points[0][0]:g}, {points[-1][1]:.2f} at round {points[-1][0]:g}."


def svg(figure: Figure, alt: str) -> str:
    """The figure as an <svg> element with its alternative text, free of dates, fixed colours and
    outside links.
    """
    file = io.StringIO()
    figure.patch.set_visible(False)
    with mpl.rc_context({"svg.hashsalt": alt, "svg.fonttype": "none"}):
        figure.savefig(
            file,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(
        r'<g id="[^"]*"', "<g", text
    )  # unused names, which would clash between plots of one page
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    for name, colour in COLOUR.items():
        text = text.replace(colour, f"var({name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
