"""What has to be said before a comparison's figures are believed: what is apart, missing, unequal
or too few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from comigs import text as f
from comigs.experiments.compare.settings import Dataset, taken_as_equal, text_of
from comigs.experiments.compare.statistics import METRICS, Comparison, unmeasured
from comigs.files import command
from comigs.runs.report.read import Run

_MADE_WITH = {
    "comigs": ("versions", "comigs"), "torch": ("versions", "torch"), "commit": ("commit",),
    "processor": ("machine", "processor"), "device": ("device",),
}  # fmt: skip


def notes(
    comparison: Comparison, datasets: Sequence[Dataset], unfinished: Sequence[Run]
) -> list[str]:
    """One line each, the gravest first."""
    lines = _apart(datasets)
    if unfinished:
        named = [
            f"{run.folder} (round {run.last_round} of {run.config.rounds})" for run in unfinished
        ]
        go_on = f"go on with: {command('resume', unfinished[0].folder)}"
        lines.append(f"left out, not finished: {f.listed(named)}; {go_on}")
    lines += [*_seeds(datasets), *(line for dataset in datasets for line in _missing(dataset))]
    return [*lines, *_baseline(comparison), *_power(comparison)]


def remarks(datasets: Sequence[Dataset]) -> list[str]:
    """What differs between runs though it should not change a result, but may change its cost."""
    runs = [run for dataset in datasets for run in dataset.runs]
    lines = [
        f"taken as equal: {name} = {f.listed(values)}"
        for name, values in taken_as_equal(runs).items()
    ]
    for what, path in _MADE_WITH.items():
        values = dict.fromkeys(
            str(v) for run in runs if (v := _at(run.environment, path)) is not None
        )
        if len(values) > 1:
            lines.append(
                f"made with {len(values)} kinds of {what}: {f.listed([_cut(v) for v in values])}"
            )
    return lines


def _apart(datasets: Sequence[Dataset]) -> list[str]:
    """Why there is more than one table."""
    if len(datasets) < 2:
        return []
    facts = [_facts(dataset.runs[0]) for dataset in datasets]
    differ = [what for what in facts[0] if len({str(fact[what]) for fact in facts}) > 1]
    if "their clients" not in differ and "their text" in differ:
        texts = [fact["their text"] for fact in facts]
        changed = [name for name in texts[0] if len({str(text.get(name)) for text in texts}) > 1]
        differ[differ.index("their text")] = f"the text of {f.listed(changed)}"
    names = ", ".join(dataset.name for dataset in datasets)
    return [
        f"these runs are of {len(datasets)} kinds ({names}), kept apart and never averaged: "
        f"they differ in {f.listed(differ)}"
    ]


def _facts(run: Run) -> dict[str, Any]:
    """What makes figures comparable, in words."""
    return {
        "the base": run.environment.get("base_fingerprint", run.config.base.name),
        "their clients": sorted(run.clients),
        "their text": text_of(run),
        "data.distribution": run.config.data.distribution,
        "data.sequence_length": run.config.data.sequence_length,
    }


def _seeds(datasets: Sequence[Dataset]) -> list[str]:
    """Settings with other seeds than most."""
    every = [
        (tuple(setting.runs), setting.name, d.name) for d in datasets for setting in d.settings
    ]
    usual, _ = Counter(seeds for seeds, _, _ in every).most_common(1)[0]
    odd: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for seeds, setting, dataset in every:
        if seeds != usual:
            odd.setdefault((seeds, setting), []).append(dataset)
    if not odd:
        return []
    where = len(datasets) > 1
    named = [
        f"{setting}{f' ({f.listed(homes)})' if where else ''} has {f.rounds(seeds)}"
        for (seeds, setting), homes in odd.items()
    ]
    return [
        f"not every setting has the same seeds: most have {f.rounds(usual)}, {f.listed(named)}. "
        "Differences use only seeds that both have; nothing is marked best or ranked where seeds differ"
    ]


def _missing(dataset: Dataset) -> list[str]:
    """Runs whose test figures are not all there, as after a loss that is not finite."""
    lines = []
    for setting in dataset.settings:
        seeds = sorted({seed for metric in METRICS for seed in unmeasured(setting, metric)})
        if seeds:
            which = f"{setting.name} on {dataset.name}, seed {f.rounds(seeds)}"
            lines.append(f"{which}: a client has no finite test figure, so the run is not counted")
    return lines


def _baseline(comparison: Comparison) -> list[str]:
    """Where the baseline is missing."""
    if comparison.baseline is None:
        more = len(comparison.settings) > 1
        return ["no baseline: name one with --baseline for paired differences"] if more else []
    name, lines = comparison.baseline.words, []
    without = [results.name for results in comparison.datasets if not results.has_baseline]
    if without:
        lines.append(
            f"no finished run of the baseline ({name}) on {f.listed(without)}: no differences there"
        )
    for results in comparison.datasets:
        alone = [r.setting.name for r in results.rows if r.baseline is None and not r.is_baseline]
        if alone and results.has_baseline:
            lines.append(f"{results.name}: no baseline ({name}) for {f.listed(alone)}")
        apart = [r.setting.name for r in results.rows if r.baseline and not r.difference]
        if apart:
            lines.append(f"{results.name}: no seed in common with the baseline: {f.listed(apart)}")
    return lines


def _power(comparison: Comparison) -> list[str]:
    """What the number of seeds allows to be said."""
    counts = [
        row.difference.difference.n for d in comparison.datasets for row in d.rows if row.difference
    ]
    if not counts:
        return []
    if max(counts) < 2:
        return ["one common seed: no deviation and no test; a difference this size may be chance"]
    least, most = min(counts), max(counts)
    lines = []
    if least < 5:
        few = str(least) if least == most else f"{least} to {most}"
        lines.append(
            f"{few} common seeds give a paired test little power: a large p is no sign that settings are equal"
        )
    if len(counts) > 1:
        lines.append(f"p values are not corrected for {len(counts)} comparisons")
    return lines


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _cut(value: str) -> str:
    """Enough of a commit to find it."""
    return value[:12] + value[40:] if len(value) >= 40 and value[:40].isalnum() else value[:40]
