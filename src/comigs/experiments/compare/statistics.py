"""The comparison as numbers: per dataset and setting the scores over seeds, the difference to the
baseline, costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from comigs.errors import UserError, nearest
from comigs.experiments.compare.baseline import Baseline
from comigs.experiments.compare.costs import Costs, costs
from comigs.experiments.compare.settings import Dataset, Setting
from comigs.experiments.compare.stats import Paired, Spread, paired, spread
from comigs.runs.report.read import Score

Metric = Literal["perplexity", "nats_per_token", "bits_per_byte"]
METRICS: tuple[Metric, ...] = ("perplexity", "nats_per_token", "bits_per_byte")


@dataclass(frozen=True)
class Row:
    """One setting on one dataset. scores: the mean over clients of each metric, over seeds;
    clients: each client's.
    """

    setting: Setting
    scores: Mapping[str, Spread | None]
    perplexity_of_mean: Spread | None  # exp of the clients' mean nats per token
    clients: Mapping[str, Mapping[str, Spread | None]]  # client -> metric -> over seeds
    is_baseline: bool
    baseline: (
        Setting | None
    )  # what it is compared against; None where that was not run, and for a baseline
    difference: (
        Paired | None
    )  # to the baseline, in Comparison.scale; None without a common seed as well
    costs: Costs
    baseline_costs: Costs | None  # None without a baseline


@dataclass(frozen=True)
class Results:
    """One dataset. base: the untouched base, mean over clients; base_of: each client's."""

    name: str
    clients: tuple[str, ...]
    rows: tuple[Row, ...]
    base: Score
    base_of: Mapping[str, Score]

    @property
    def has_baseline(self) -> bool:
        """Whether there is anything to compare against."""
        return any(row.is_baseline for row in self.rows)

    @property
    def same_seeds(self) -> bool:
        """Whether all settings were measured on the same seeds. Else none is called better than
        another.
        """
        return len({frozenset(_by_client(row.setting, "nats_per_token")) for row in self.rows}) == 1

    def row(self, setting: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.setting.name == setting), None)


@dataclass(frozen=True)
class Comparison:
    """Everything a page or table shows. metric: the one shown first, by which best and second best
    are marked.
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
        return "bits_per_byte" if self.metric == "bits_per_byte" else "nats_per_token"


def compare(
    datasets: Sequence[Dataset], metric: Metric = "perplexity", baseline: Baseline | None = None
) -> Comparison:
    """All figures."""
    empty = Comparison(metric, baseline, ())
    return Comparison(metric, baseline, tuple(_results(d, baseline, empty.scale) for d in datasets))


def metric_named(name: str) -> Metric:
    """Raises UserError where there is no such metric."""
    for metric in METRICS:
        if metric == name.replace("-", "_"):
            return metric
    raise UserError(
        f'--metric: given "{name}"; must be {", ".join(METRICS)}.{nearest(name, list(METRICS))}'
    )


def unmeasured(setting: Setting, metric: str) -> list[int]:
    """Seeds whose test figure is missing for a client, so that they count nowhere."""
    return [seed for seed in setting.runs if seed not in _by_client(setting, metric)]


def mean_by_round(setting: Setting, metric: str) -> dict[int, Spread]:
    """Round -> mean over clients on the valid text, over seeds; rounds that every seed and client
    has measured.
    """
    seeds: list[dict[int, float]] = []
    for run in setting.runs.values():
        rounds: dict[int, dict[str, float]] = {}
        for e in run.evaluations:
            value = getattr(e.score, metric)
            if (e.split, e.model) == ("valid", "personal") and value is not None:
                rounds.setdefault(e.round, {})[e.client] = value
        seeds.append(
            {r: fmean(c.values()) for r, c in rounds.items() if len(c) == len(run.clients)}
        )
    common = set.intersection(*(set(rounds) for rounds in seeds)) if seeds else set()
    spreads = {r: spread([rounds[r] for rounds in seeds]) for r in sorted(common)}
    return {r: s for r, s in spreads.items() if s is not None}


def ranks(comparison: Comparison) -> dict[str, float]:
    """Setting -> its mean rank over datasets (1: best; ties share), among the settings that are
    measured on all.

    Empty where settings of a dataset have different seeds.
    """
    metric, datasets = comparison.metric, comparison.datasets
    if not comparison.same_seeds:
        return {}
    scores = {name: [_score(d.row(name), metric) for d in datasets] for name in comparison.settings}
    whole = {
        name: [v for v in values if v is not None]
        for name, values in scores.items()
        if None not in values
    }
    return {
        name: fmean(
            _rank(value, [other[i] for other in whole.values()]) for i, value in enumerate(values)
        )
        for name, values in whole.items()
    }


def mean_difference(comparison: Comparison, setting: str) -> float | None:
    """Mean over datasets of the difference to the baseline; None unless it is known on all of
    them.
    """
    rows = [results.row(setting) for results in comparison.datasets]
    known = [row.difference.difference.mean for row in rows if row and row.difference]
    return fmean(known) if len(known) == len(rows) else None


def _rank(value: float, values: Sequence[float]) -> float:
    return 1 + sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2


def _score(row: Row | None, metric: str) -> float | None:
    score = row.scores[metric] if row else None
    return score.mean if score else None


def _results(dataset: Dataset, baseline: Baseline | None, scale: Metric) -> Results:
    rows = tuple(_row(s, dataset.settings, baseline, scale) for s in dataset.settings)
    run = dataset.runs[0]
    assert run.summary is not None  # finished runs only
    return Results(
        name=dataset.name,
        clients=tuple(run.summary.clients),
        rows=rows,
        base=run.summary.base_test,
        base_of={name: client.base_test for name, client in run.summary.clients.items()},
    )


def _row(
    setting: Setting, settings: Sequence[Setting], baseline: Baseline | None, scale: Metric
) -> Row:
    values = {metric: _by_client(setting, metric) for metric in METRICS}
    clients = next(iter(values["nats_per_token"].values()), {})
    nats = [fmean(c.values()) for c in values["nats_per_token"].values()]
    against = baseline.among(settings, setting) if baseline else None
    return Row(
        setting=setting,
        scores={m: spread([fmean(c.values()) for c in values[m].values()]) for m in METRICS},
        perplexity_of_mean=spread([math.exp(min(n, 700)) for n in nats]),
        clients={
            c: {m: spread([v[c] for v in values[m].values()]) for m in METRICS} for c in clients
        },
        is_baseline=baseline is not None and baseline.is_baseline(setting),
        baseline=against,
        difference=paired(values[scale], _by_client(against, scale)) if against else None,
        costs=costs(setting),
        baseline_costs=costs(against) if against else None,
    )


def _by_client(setting: Setting, metric: str) -> dict[int, dict[str, float]]:
    """Seed -> client -> test figure; only seeds in which every client has one."""
    table: dict[int, dict[str, float]] = {}
    for seed, run in setting.runs.items():
        assert run.summary is not None
        values = {name: getattr(c.test, metric) for name, c in run.summary.clients.items()}
        if None not in values.values():
            table[seed] = values
    return table
