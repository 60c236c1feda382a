"""This module says what has to be known before a comparison's figures are believed: what is apart,
missing, unequal or too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from comigs import text as f
from comigs.experiments.compare.baseline import Baseline
from comigs.experiments.compare.fields import taken_as_equal
from comigs.experiments.compare.settings import Dataset, text_of
from comigs.experiments.compare.statistics import Comparison, Results
from comigs.experiments.compare.task_scores import left_out
from comigs.experiments.run_data import METRICS, RunData
from comigs.files import command

MADE_WITH = {  # what -> where env.json says it
    "comigs": ("versions", "comigs"),
    "torch": ("versions", "torch"),
    "commit": ("commit",),
    "processor": ("machine", "processor"),
    "device": ("device",),
}


def notes(
    comparison: Comparison, datasets: Sequence[Dataset], unfinished: Sequence[RunData]
) -> list[str]:
    """Return what to know about a comparison, one line each, the gravest first."""
    lines = _apart(datasets)
    if unfinished:
        named = [f"{r.folder} (round {r.last_round} of {r.config.rounds})" for r in unfinished]
        go_on = command("resume", unfinished[0].folder)
        lines.append(f"left out, not finished: {f.listed(named)}; go on with: {go_on}")
    lines += _seeds(datasets)
    for results in comparison.datasets:
        lines += _missing(results)
        lines += left_out(results)
    return [*lines, *_baseline(comparison), *_power(comparison)]


def remarks(datasets: Sequence[Dataset]) -> list[str]:
    """Return what differs between runs though it should not change a result, but may change its
    cost.
    """
    runs = [run for dataset in datasets for run in dataset.runs]
    equal = taken_as_equal(runs)
    lines = [f"taken as equal: {name} = {f.listed(values)}" for name, values in equal.items()]
    for what, path in MADE_WITH.items():
        found = [_at(run.environment, path) for run in runs]
        values = list(dict.fromkeys(str(value) for value in found if value is not None))
        if len(values) > 1:
            named = f.listed([_cut(value) for value in values])
            lines.append(f"made with {len(values)} kinds of {what}: {named}")
    return lines


def _apart(datasets: Sequence[Dataset]) -> list[str]:
    """Return why there is more than one table."""
    if len(datasets) < 2:
        return []
    facts = [_facts(dataset.runs[0]) for dataset in datasets]
    differ = _different(facts)
    # Where the clients are the same, it helps to know whose text is another.
    if "their clients" not in differ and "their text" in differ:
        changed = _different([fact["their text"] for fact in facts])
        differ[differ.index("their text")] = f"the text of {f.listed(changed)}"
    names = ", ".join(dataset.name for dataset in datasets)
    return [
        f"these runs are of {len(datasets)} kinds ({names}), kept apart and never averaged: "
        f"they differ in {f.listed(differ)}"
    ]


def _facts(run: RunData) -> dict[str, Any]:
    """Return what makes figures comparable, in words."""
    seen = run.config.names + [row["client"] for row in run.rounds if row["client"] is not None]
    return {
        "the base": run.environment.get("base_fingerprint", run.config.base.name),
        "their clients": sorted(set(seen)),
        "their text": text_of(run),
        "data.distribution": run.config.data.distribution,
        "data.sequence_length": run.config.data.sequence_length,
    }


def _different(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the facts that are not the same everywhere."""
    found = []
    for name in facts[0]:
        values = {str(fact.get(name)) for fact in facts}
        if len(values) > 1:
            found.append(name)
    return found


def _seeds(datasets: Sequence[Dataset]) -> list[str]:
    """Return which settings have other seeds than most."""
    every = []
    for dataset in datasets:
        every += [(tuple(setting.runs), setting.name, dataset.name) for setting in dataset.settings]
    usual, _ = Counter(seeds for seeds, _, _ in every).most_common(1)[0]
    odd: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for seeds, setting, home in every:
        if seeds != usual:
            odd.setdefault((seeds, setting), []).append(home)
    if not odd:
        return []
    # With one dataset only there is no need to name it.
    named = []
    for (seeds, setting), homes in odd.items():
        where = f" ({f.listed(homes)})" * (len(datasets) > 1)
        named.append(f"{setting}{where} has {f.rounds(seeds)}")
    return [
        f"not every setting has the same seeds: most have {f.rounds(usual)}, {f.listed(named)}. "
        "Differences use only seeds that both have; "
        "nothing is marked best or ranked where seeds differ"
    ]


def _missing(results: Results) -> list[str]:
    """Return the runs whose test figures are not all there, as after a loss that is not finite."""
    lines = []
    for row in results.rows:
        seeds = sorted({seed for metric in METRICS for seed in row.unmeasured(metric)})
        if seeds:
            which = f"{row.setting.name} on {results.name}, seed {f.rounds(seeds)}"
            lines.append(f"{which}: a client has no finite test figure, so the run is not counted")
    return lines


def _baseline(comparison: Comparison) -> list[str]:
    """Return where the baseline is missing."""
    if comparison.baseline is None:
        if len(comparison.settings) < 2:
            return []
        return ["no baseline: name one with --baseline for paired differences"]
    name, lines = comparison.baseline.words, []
    without = [results.name for results in comparison.datasets if not results.has_baseline]
    if without:
        where = f.listed(without)
        lines.append(f"no finished run of the baseline ({name}) on {where}: no differences there")
    # A baseline may be there and not be every setting's, or have other seeds.
    for results in comparison.datasets:
        alone = [r.setting.name for r in results.rows if r.baseline is None and not r.is_baseline]
        if alone and results.has_baseline:
            lines.append(f"{results.name}: no baseline ({name}) for {f.listed(alone)}")
        lines += _unlike(comparison.baseline, results)
        apart = [r.setting.name for r in results.rows if r.baseline and not r.difference]
        if apart:
            lines.append(f"{results.name}: no seed in common with the baseline: {f.listed(apart)}")
    return lines


def _unlike(baseline: Baseline, results: Results) -> list[str]:
    """Return which settings differ from their baselines in more than they are compared by."""
    named: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        if row.baseline and (axes := baseline.also_different(row.setting, row.baseline)):
            named.setdefault((row.baseline.name, f.listed(axes)), []).append(row.setting.name)
    lines = []
    for (against, different), settings in named.items():
        lines.append(
            f"{results.name}: {f.listed(settings)}: compared against {against}, "
            f"which differs in {different}, too"
        )
    return lines


def _power(comparison: Comparison) -> list[str]:
    """Return what the number of seeds allows to be said."""
    rows = [row for results in comparison.datasets for row in results.rows]
    counts = [row.difference.difference.n for row in rows if row.difference]
    if not counts:
        return []
    least, most = min(counts), max(counts)
    if most < 2:
        return ["one common seed: no deviation and no test; a difference this size may be chance"]
    # A large p of few seeds is easily mistaken for a sign that settings are equal.
    lines = []
    if least < 5:
        few = str(least) if least == most else f"{least} to {most}"
        lines.append(
            f"{few} common seeds give a paired test little power: "
            "a large p is no sign that settings are equal"
        )
    if len(counts) > 1:
        lines.append(f"p values are not corrected for {len(counts)} comparisons")
    return lines


def _at(tree: Any, path: Sequence[str]) -> Any:
    """Return what a tree holds at a path, and None where it has no such place."""
    for name in path:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(name)
    return tree


def _cut(value: str) -> str:
    """Return enough of a commit to find it."""
    is_commit = len(value) >= 40 and value[:40].isalnum()
    return value[:12] + value[40:] if is_commit else value[:40]
