"""What each personal model is: of which round, how much of it is shared, and if it is one part."""

from __future__ import annotations

from collections import Counter

from comigs import text as f
from comigs.runs.metrics import Score
from comigs.runs.report.read import Run
from comigs.text import Table


def kept_table(run: Run) -> Table | None:
    """Return a row per client with what is known of its personal model in this run.

    That is the round kept, what it and the last round come to on test, how much it adopted of its
    download, and which part it is alone. It is None where nothing of that is known.
    """
    # Methods and settings differ in what there is to say, and older runs say less. A client that
    # was gone at the end says nothing.
    known = run.summary.clients if run.summary else {}
    clients = {name: client for name, client in known.items() if client.test != Score()}
    columns: dict[str, list[str]] = {}
    if any(client.kept_round is not None for client in clients.values()):
        rounds = [f"{f.count(c.kept_round)} of {run.config.rounds}" for c in clients.values()]
        columns["best round on valid"] = rounds
        columns["its test perplexity"] = [f.perplexity(c.test.perplexity) for c in clients.values()]
        last = [client.last_test or client.test for client in clients.values()]
        columns["the last round's"] = [f.perplexity(score.perplexity) for score in last]
    if any(client.adopted_share is not None for client in clients.values()):
        columns["adopted of its download"] = [f.percent(c.adopted_share) for c in clients.values()]
    if any(client.kept_part is not None for client in clients.values()):
        columns["the one part that it is"] = [c.kept_part or f.NONE for c in clients.values()]
    if not columns:
        return None
    rows = zip(clients, *columns.values(), strict=True)
    return Table(("client", *columns), tuple(rows))


def kept_lines(run: Run) -> list[str]:
    """Return lines on personal models that are not the last round's, or not whole, or not own."""
    # Each line is about some of the clients, and says of how many.
    clients = list(run.summary.clients.values()) if run.summary else []
    everyone, lines = f.plural(len(clients), "client"), []
    if back := sum(client.last_test is not None for client in clients):
        best = f"{back} of {everyone} best on valid in an earlier round"
        lines.append(f"{best}; each one's own model is of that round")
    if parts := Counter(client.kept_part for client in clients if client.kept_part):
        named = ", ".join(f"{part} ({number})" for part, number in parts.items())
        lines.append(f"{parts.total()} of {everyone} with one part of the model alone: {named}")
    if whole := sum(client.adopted_share == 1 for client in clients):
        lines.append(f"{whole} of {everyone} with a model that adopted all of its download")
    return lines
