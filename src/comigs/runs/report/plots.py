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

from comigs.runs.report.curves import Curve, LossCurves, Points
from comigs.runs.report.timeline import Timeline

MAX_COLOURS = 8  # clients told apart by colour; more are drawn grey, with their mean on top
_CLIENTS = [f"--client-{number}" for number in range(MAX_COLOURS)]
_NAMES = ("--ink", "--muted", "--grid", "--personal", "--train", *_CLIENTS, "--bad")
# A variable of the page's style sheet -> the colour that stands in for it while it is drawn.
COLOUR = {name: f"#fe00{number:02x}" for number, name in enumerate(_NAMES)}
DASHED = (0, (4, 3))
OUTCOMES = {"counted": "--personal", "late": "--train", "refused": "--ink", "lost": "--bad"}


def loss_plot(curves: LossCurves, rounds: int, limits: tuple[float, float]) -> str:
    """Draw the losses of one client: train by step and by round, valid by round, the base dashed.

    rounds: end of the horizontal axis. limits: of the vertical axis, the same for all clients.
    Returns SVG.
    """
    # Steps are noise around the mean of their round, so they are thin and pale; what counts is
    # valid, which is drawn last and strongest.
    figure, axes = _axes(2.9, 2.1)
    axes.plot(*_xy(curves.by_step), color=COLOUR["--train"], linewidth=0.8, alpha=0.55)
    rounds_look = _marked(curves.by_round, ".")
    axes.plot(*_xy(curves.by_round), color=COLOUR["--train"], linewidth=1.4, **rounds_look)
    valid_look = _marked(curves.valid, "o")
    axes.plot(*_xy(curves.valid), color=COLOUR["--personal"], linewidth=1.9, **valid_look)
    if curves.base is not None:
        axes.axhline(curves.base, color=COLOUR["--ink"], linewidth=1, linestyle=DASHED)
    axes.set(xlim=(0, max(1, rounds)), ylim=limits)
    _label(axes, "round", "nats per token")
    return svg(figure, f"Loss of client {curves.client} by round. {_ends('Valid', curves.valid)}")


def curves_plot(curves: Sequence[Curve], rounds: int, what: str, top: float | None = None) -> str:
    """Draw one curve per client over rounds, and return SVG.

    top: fixes the vertical axis to 0..top; None: it only starts at 0.
    """
    # Eyes tell few colours apart: many clients are a grey cloud around their mean.
    figure, axes = _axes(4.6, 2.5)
    if len(curves) <= MAX_COLOURS:
        for curve, name in zip(curves, _CLIENTS, strict=False):
            look = _marked(curve.points, "o")
            axes.plot(*_xy(curve.points), color=COLOUR[name], linewidth=1.7, **look)
        told = [_ends(curve.client, curve.points) for curve in curves]
    else:
        for curve in curves:
            axes.plot(*_xy(curve.points), color=COLOUR["--muted"], linewidth=0.6, alpha=0.5)
        middle = _mean_points(curves)
        axes.plot(*_xy(middle), color=COLOUR["--personal"], linewidth=2.4)
        told = [_ends("Mean", middle)]

    # A share has a middle, from which it leans to either side.
    if top == 1:
        axes.axhline(0.5, color=COLOUR["--muted"], linewidth=1, linestyle=DASHED)
    axes.set(xlim=(0, max(1, rounds)), ylim=(0, top))
    _label(axes, "round", what)
    return svg(figure, f"{what} by round. " + " ".join(told))


def timeline_plot(shown: Timeline) -> str:
    """Draw a row per client and a bar per attempt over simulated time, and return SVG."""
    # A short run is told in minutes, a long one in hours.
    unit, seconds = ("hour", 3600.0) if max(shown.ends) > 2 * 3600 else ("minute", 60.0)
    figure, axes = _axes(9.2, 0.6 + 0.24 * len(shown.clients))
    rows = {client: number for number, client in enumerate(reversed(shown.clients))}
    for span in shown.spans:
        bar = [(span.begins / seconds, max(span.ends - span.begins, 0) / seconds)]
        row = (rows[span.client] - 0.32, 0.64)
        axes.broken_barh(bar, row, facecolors=COLOUR[OUTCOMES[span.outcome]], linewidth=0)
    for client, moment in shown.away:
        axes.plot([moment / seconds], [rows[client]], "x", color=COLOUR["--muted"], markersize=5)
    for end in shown.ends:
        axes.axvline(end / seconds, color=COLOUR["--grid"], linewidth=0.8, zorder=0)
    axes.set_yticks(list(rows.values()), [*rows], parse_math=False)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _label(axes, f"simulated {unit}s", "")
    outcomes: list[str] = [span.outcome for span in shown.spans]
    told = ", ".join(f"{outcomes.count(name)} {name}" for name in OUTCOMES)
    return svg(figure, f"Attempts of clients: {told}; away {len(shown.away)} times.")


def limits(curves: Sequence[LossCurves]) -> tuple[float, float]:
    """Return vertical limits that hold every curve, with a little air."""
    values = [value for of_client in curves for value in of_client.values]
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or 0.5
    return max(0.0, low - air), high + air


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a bare plot of that size, in inches, in the page's colours."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, COLOUR)
    return figure, axes


def bare(axes: Axes, colours: Mapping[str, str]) -> None:
    """Remove the frame and draw a light grid, in these colours (COLOUR for a page)."""
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
    """Mark points while there are few; a single one would be invisible without."""
    if len(points) > 25:
        return {}
    return {"marker": marker, "markersize": 4, "clip_on": False}


def _mean_points(curves: Sequence[Curve]) -> Points:
    by_round: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve.points:
            by_round.setdefault(x, []).append(y)
    return tuple((x, sum(ys) / len(ys)) for x, ys in sorted(by_round.items()))


def _ends(name: str, points: Points) -> str:
    """Say where a curve starts and ends, for those who cannot see the plot."""
    if not points:
        return f"{name}: not measured."
    (first, start), (last, end) = points[0], points[-1]
    return f"{name}: {start:.2f} at round {first:g}, {end:.2f} at round {last:g}."


def svg(figure: Figure, alt: str) -> str:
    """Return the figure as an <svg> element with its alternative text.

    The element is free of dates, fixed colours and outside links.
    """
    # Equal runs give equal bytes: matplotlib would write dates and random names of its own, which
    # would also clash between the plots of one page.
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
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    for name, colour in COLOUR.items():
        text = text.replace(colour, f"var({name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
