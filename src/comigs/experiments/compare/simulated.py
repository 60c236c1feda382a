"""This module says what runs with simulated devices took: seconds, and work that was lost."""

from __future__ import annotations

from statistics import fmean

import pandas as pd

from comigs.experiments.compare.settings import Setting
from comigs.experiments.compare.t_test import Spread, spread
from comigs.experiments.run_data import RunData

HOUR = 3600.0


def simulated_costs(setting: Setting) -> dict[str, float | None]:
    """Return the simulated seconds of a setting's runs and the share of work that was lost, means
    over seeds; None where nothing was simulated.
    """
    seconds, lost = [], []
    for run in setting.runs.values():
        ends = _ends(run)
        rows = [row for row in run.rounds if row.get("worked_tokens")]
        if ends and rows:
            seconds.append(max(ends.values()))
            worked = sum(row["worked_tokens"] for row in rows)
            lost.append(sum(row["lost_tokens"] for row in rows) / worked)
    if not seconds:
        return {"simulated_seconds": None, "work_lost": None}
    return {"simulated_seconds": fmean(seconds), "work_lost": fmean(lost)}


def mean_by_hour(setting: Setting, metric: str) -> list[tuple[float, Spread]]:
    """Return (hours, mean over clients on the valid text, over seeds) of each round.

    A client that was not measured in a round, as it was away, counts as it was last measured, and
    as the base until it was. Hours are means over seeds.
    """
    hours: dict[int, list[float]] = {}
    means: dict[int, list[float]] = {}
    for run in setting.runs.values():
        cells = [row for row in run.rounds if row["client"] is not None]
        frame = pd.DataFrame(
            [(row["round"], row["client"], row.get(f"valid_{metric}")) for row in cells],
            columns=["round", "client", "value"],
        )
        known = frame.pivot(index="round", columns="client", values="value").ffill()
        if len(known.columns) < len(run.config.clients):
            continue
        ends = _ends(run)
        for round, value in known.dropna().mean(axis=1).items():
            if round in ends:
                hours.setdefault(int(round), []).append(ends[round] / HOUR)
                means.setdefault(int(round), []).append(float(value))
    # A round that some seeds lack would make the mean jump.
    points = []
    for round, values in sorted(means.items()):
        of_all = spread(values)
        if of_all is not None and len(values) == len(setting.runs):
            points.append((fmean(hours[round]), of_all))
    return points


def hours_to(setting: Setting, metric: str, goal: float | None) -> float | None:
    """Return the simulated hours after which a setting's valid is first as low as a goal."""
    for hours, value in mean_by_hour(setting, metric):
        if goal is not None and value.mean <= goal:
            return hours
    return None


def final_valid(setting: Setting, metric: str) -> float | None:
    """Return what valid came to in the last round; None where nothing was simulated."""
    points = mean_by_hour(setting, metric)
    return points[-1][1].mean if points else None


def _ends(run: RunData) -> dict[int, float]:
    """Return round -> the simulated second at which it ended."""
    known = [row for row in run.rounds if row.get("simulated_seconds") is not None]
    return {row["round"]: row["simulated_seconds"] for row in known}
