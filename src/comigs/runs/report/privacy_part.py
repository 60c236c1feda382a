"""What a run's page says of privacy: what was bounded, and what each client has spent of it, as far
as the server knows.
"""

from __future__ import annotations

from comigs import text as f
from comigs.runs.report.read import Run
from comigs.text import Table

NOT_PRIVATE = (
    "The noise of this run can be drawn again (privacy.noise_seed), or there is none: nothing "
    "bounds what can be learnt from what its clients sent."
)


def privacy_note(run: Run) -> str:
    """Return a paragraph on what is bounded; "" where nothing was to be."""
    privacy = run.config.privacy
    if not privacy.is_on:
        return ""
    # Epsilon is counted where noise is added: by the server for clients, by clients for documents.
    lines = run.ends if privacy.by_client else run.train
    if not lines:
        return ""  # nothing was sent yet
    spent = [line.epsilon for line in lines if line.epsilon is not None]
    if not spent:
        return f"Not private. {NOT_PRIVATE}"
    if privacy.by_client:
        return (
            f"Private by client: what the server gave back is ({max(spent):.3g}, "
            f"{privacy.delta:g})-differentially private for each client of the run. The server "
            "itself saw every upload, and this page has figures that were measured on text."
        )
    return (
        f"Private by document: whatever counted is ({max(spent):.3g}, {privacy.delta:g})"
        "-differentially private for each document of a client's train text, so that nobody who "
        "has it can tell much better than before whether a document was there. What was sent later "
        "and did not count has spent more, which only a client's own privacy.json tells. Personal "
        "models, and figures that were measured on text, are not private."
    )


def privacy_table(run: Run) -> Table | None:
    """Return one row per client with the epsilon it has spent; None where nobody has any."""
    spent: dict[str, float] = {}
    for line in run.train:
        if line.epsilon is not None:
            spent[line.client] = max(line.epsilon, spent.get(line.client, 0.0))
    rows = [(name, f.decimal(epsilon)) for name, epsilon in spent.items()]
    return Table(("client", "epsilon spent"), tuple(rows)) if rows else None
