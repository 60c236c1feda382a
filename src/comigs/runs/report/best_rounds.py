"""Which round each personal model is of, where a run keeps the best rounds."""

from __future__ import annotations

from comigs import text as f
from comigs.runs.report.read import Run
from comigs.text import Table


def kept_table(run: Run) -> Table | None:
    """Return one row per client: the round kept, what it comes to on test, and the last round.

    It is None where the run is not finished, or kept the last round of everybody.
    """
    rows = []
    for name, client in run.summary.clients.items() if run.summary else ():
        if client.kept_round is not None:
            last = client.last_test or client.test
            perplexities = f.perplexity(client.test.perplexity), f.perplexity(last.perplexity)
            rows.append((name, f"{client.kept_round} of {run.config.rounds}", *perplexities))
    headers = ("client", "best round on valid", "its test perplexity", "the last round's")
    return Table(headers, tuple(rows)) if rows else None


def went_back(run: Run) -> str:
    """Return how many clients keep an earlier round than the last, as words; "" for none."""
    clients = run.summary.clients.values() if run.summary else ()
    back = sum(client.last_test is not None for client in clients)
    if back == 0:
        return ""
    return f"{back} of {f.plural(len(clients), 'client')} best on valid in an earlier round"
