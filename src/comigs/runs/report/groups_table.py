"""What the devices of each simulated group did and came to, as a table for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from comigs import text as f
from comigs.runs.report.read import Run
from comigs.runs.report.results import ClientResult, gain, mean_score, results
from comigs.runs.report.timeline import work_lost


def groups_table(run: Run) -> f.Table | None:
    """Return a row for each group of [conditions.groups], and one for whoever is in none.

    It is None where there are no groups, or nothing was simulated.
    """
    conditions = run.config.conditions
    if not conditions.groups or not run.exchanges:
        return None
    members: dict[str, list[ClientResult]] = {name: [] for name in (*conditions.groups, f.NONE)}
    for client in results(run).clients:
        members[conditions.group_of(client.name, run.config.seed) or f.NONE].append(client)
    rows = [_row(run, group, clients) for group, clients in members.items() if clients]
    headers = (
        *("group", "clients", "rounds of a client", "work lost"),
        *("base perplexity", "personal perplexity", "gain"),
    )
    return f.Table(headers, tuple(rows))


def _row(run: Run, group: str, clients: Sequence[ClientResult]) -> tuple[str, ...]:
    names = [client.name for client in clients]
    took_part = {(line.client, line.round) for line in run.train}
    times = Counter(client for client, _ in took_part)
    rounds = [times[name] for name in names]
    part = f"{median(rounds):g} ({min(rounds)} to {max(rounds)})"
    # means over different clients would compare nothing, so both are of those that have both
    measured = [client for client in clients if client.gain is not None]
    base = mean_score([client.base for client in measured])
    personal = mean_score([client.personal for client in measured])
    return (
        *(group, f.count(len(names)), part, f.percent(work_lost(run, names))),
        *(f.perplexity(base.perplexity), f.perplexity(personal.perplexity)),
        f.percent(gain(base, personal)),
    )
