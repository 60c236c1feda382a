"""This module makes the figures of a comparison: per dataset and setting the scores over seeds, and
the difference to the baseline. All come from one frame with a row for each client of each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import pandas as pd

from comigs.errors import UserError, nearest
from comigs.experiments.compare.baseline import Baseline
from comigs.experiments.compare.costs import Costs, costs, with_ratios
from comigs.experiments.compare.settings import Dataset, Setting
from comigs.experiments.compare.t_test import Paired, Spread, mean_over_clients, paired, spread
from comigs.experiments.run_data import METRICS, Metric
from comigs.perplexity import perplexity_of


@dataclass(frozen=True)
class Row:
    """A row is one setting on one dataset.

    figures: metric -> the test figures as a table of seeds and clients, without seeds in which a
    client has none. scores: metric -> their mean over clients, over seeds. perplexity_of_mean: the
    same of exp of the clients' mean nats per token. clients: client -> metric -> over seeds.
    baseline: what the setting is compared against; None where that was not run, and for a baseline.
    difference: to the baseline, in Comparison.scale; None without a common seed as well. costs:
    with their ratios to the baseline's, where there is one.
    """

    setting: Setting
    figures: Mapping[str, pd.DataFrame]
    scores: Mapping[str, Spread | None]
    perplexity_of_mean: Spread | None
    clients: Mapping[str, Mapping[str, Spread | None]]
    costs: Costs
    is_baseline: bool = False
    baseline: Setting | None = None
    difference: Paired | None = None

    def unmeasured(self, metric: str) -> list[int]:
        """Return the seeds whose test figure is missing for a client, so that they count
        nowhere.
        """
        return [seed for seed in self.setting.runs if seed not in self.figures[metric].index]


@dataclass(frozen=True)
class Results:
    """The results of one dataset. base: what the untouched base has on test, metric -> mean over
    clients, and perplexity_of_mean; base_of: client -> metric -> its own.
    """

    name: str
    clients: tuple[str, ...]
    rows: tuple[Row, ...]
    base: Mapping[str, float | None]
    base_of: Mapping[str, Mapping[str, float | None]]

    @property
    def has_baseline(self) -> bool:
        """Whether there is anything to compare against."""
        return any(row.is_baseline for row in self.rows)

    @property
    def same_seeds(self) -> bool:
        """Whether all settings were measured on the same seeds. Else none is called better than
        another.
        """
        return len({frozenset(row.figures["nats_per_token"].index) for row in self.rows}) == 1

    def row(self, setting: str) -> Row | None:
        """Return the row of that name."""
        return next((row for row in self.rows if row.setting.name == setting), None)


@dataclass(frozen=True)
class Comparison:
    """A comparison is everything that a page or table shows. metric: the one shown first, by which
    best and second best are marked.
    """

    metric: Metric
    baseline: Baseline | None
    datasets: tuple[Results, ...]

    @property
    def same_seeds(self) -> bool:
        """Whether that holds on every dataset."""
        return all(results.same_seeds for results in self.datasets)

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of all settings; one that the first dataset does not have comes after its neighbour
        in another.
        """
        names: list[str] = []
        for results in self.datasets:
            place = 0
            for row in results.rows:
                if row.setting.name not in names:
                    names.insert(place, row.setting.name)
                place = names.index(row.setting.name) + 1
        return tuple(names)

    @property
    def scale(self) -> Metric:
        """What differences are taken of: a logarithmic measure; equal steps are equal factors of
        perplexity.
        """
        return scale_of(self.metric)


def compare(
    datasets: Sequence[Dataset], metric: Metric = "perplexity", baseline: Baseline | None = None
) -> Comparison:
    """Return all figures of finished runs."""
    frame = tidy(datasets)
    results = []
    for dataset in datasets:
        own = frame[frame["dataset"] == dataset.name]
        rows = [_row(s, own[own["setting"] == s.name]) for s in dataset.settings]
        if baseline is not None:
            rows = [_against(baseline, rows, row, scale_of(metric)) for row in rows]
        results.append(_results(dataset, rows))
    return Comparison(metric, baseline, tuple(results))


def tidy(datasets: Sequence[Dataset]) -> pd.DataFrame:
    """Return one frame with a row for each client of each run: dataset, setting, seed and the
    columns of a packed runs.csv. Cells stay as they were read, None where nothing was measured.
    """
    rows = []
    for dataset in datasets:
        for setting in dataset.settings:
            for seed, run in setting.runs.items():
                head = {"dataset": dataset.name, "setting": setting.name, "seed": seed}
                rows += [head | row for row in run.clients]
    return pd.DataFrame(rows, dtype=object)


def scale_of(metric: Metric) -> Metric:
    """Return what differences are taken of."""
    return "bits_per_byte" if metric == "bits_per_byte" else "nats_per_token"


def metric_named(name: str) -> Metric:
    """Return the metric of that name. Raises UserError where there is none."""
    for metric in METRICS:
        if metric == name.replace("-", "_"):
            return metric
    known: list[str] = list(METRICS)
    raise UserError(f'--metric: given "{name}"; must be {", ".join(known)}.{nearest(name, known)}')


def mean_by_round(setting: Setting, metric: str) -> dict[int, Spread]:
    """Return round -> mean over clients on the valid text, over seeds, for the rounds that every
    seed and client has measured.
    """
    # Round 0 measures the base; a row without a client is the server's.
    lines = []
    for seed, run in setting.runs.items():
        own = [row for row in run.rounds if row["round"] > 0 and row["client"] is not None]
        lines += [(seed, row["round"], row["client"], row.get(f"valid_{metric}")) for row in own]
        lines += [(seed, 0, name, None) for name in run.config.names]
    frame = pd.DataFrame(lines, columns=["seed", "round", "client", "value"])

    # A mean over some of the clients only would jump from round to round.
    whole = frame.pivot(index=["round", "seed"], columns="client", values="value").dropna()
    means = mean_over_clients(whole).groupby("round")
    spreads = {int(r): spread(of.tolist()) for r, of in means if len(of) == len(setting.runs)}
    return {r: s for r, s in spreads.items() if s is not None}


def ranks(comparison: Comparison) -> dict[str, float]:
    """Return setting -> its mean rank over datasets (1: best; ties share), among the settings that
    are measured on all. Empty where settings of a dataset have different seeds.
    """
    if not comparison.same_seeds:
        return {}
    scores = {}
    for results in comparison.datasets:
        of = {row.setting.name: row.scores[comparison.metric] for row in results.rows}
        scores[results.name] = pd.Series({n: s.mean for n, s in of.items() if s is not None})
    whole = pd.DataFrame(scores).reindex(comparison.settings).dropna().rank()
    return dict(zip(whole.index, map(fmean, whole.to_numpy().tolist()), strict=True))


def mean_difference(comparison: Comparison, setting: str) -> float | None:
    """Return the mean over datasets of the difference to the baseline; None unless it is known on
    all of them.
    """
    rows = [results.row(setting) for results in comparison.datasets]
    known = [row.difference.difference.mean for row in rows if row and row.difference]
    return fmean(known) if len(known) == len(rows) else None


def _row(setting: Setting, own: pd.DataFrame) -> Row:
    """Return the figures of a setting by itself. own: its rows of the frame."""
    # A run counts for a metric only where each of its clients has a figure.
    figures: dict[str, pd.DataFrame] = {}
    scores: dict[str, Spread | None] = {}
    for metric in METRICS:
        table = own.pivot(index="seed", columns="client", values=f"test_{metric}")
        figures[metric] = table.astype(float).dropna()
        scores[metric] = spread(mean_over_clients(figures[metric]).tolist())
    nats = mean_over_clients(figures["nats_per_token"])
    clients: dict[str, dict[str, Spread | None]] = {}
    for client in own["client"].unique():
        clients[client] = {m: spread(table[client].tolist()) for m, table in figures.items()}
    return Row(
        setting=setting,
        figures=figures,
        scores=scores,
        perplexity_of_mean=spread([perplexity_of(n) for n in nats.tolist()]),
        clients=clients,
        costs=costs(setting, own),
    )


def _against(baseline: Baseline, rows: Sequence[Row], row: Row, scale: Metric) -> Row:
    """Return a row with its difference to the baseline."""
    against = baseline.among([r.setting for r in rows], row.setting)
    other = next((r for r in rows if r.setting is against), None)
    if other is None:
        return replace(row, is_baseline=baseline.is_baseline(row.setting))
    return replace(
        row,
        baseline=against,
        difference=paired(row.figures[scale], other.figures[scale]),
        costs=with_ratios(row.costs, other.costs),
    )


def _results(dataset: Dataset, rows: Sequence[Row]) -> Results:
    """Return the results of a dataset. The base is the same in every run of it."""
    clients = dataset.runs[0].clients
    base_of: dict[str, dict[str, float | None]] = {}
    for row in clients:
        base_of[row["client"]] = {metric: row[f"base_test_{metric}"] for metric in METRICS}
    # A client that was gone at the end has no tokens, and counts in no mean.
    present = [base_of[row["client"]] for row in clients if row["test_tokens"] is not None]
    base: dict[str, float | None] = {}
    for metric in METRICS:
        values = [figures[metric] for figures in present]
        known = [value for value in values if value is not None]
        base[metric] = sum(known) / len(known) if known else None
    nats = base["nats_per_token"]
    base["perplexity_of_mean"] = None if nats is None else perplexity_of(nats)
    return Results(dataset.name, tuple(base_of), tuple(rows), base, base_of)
