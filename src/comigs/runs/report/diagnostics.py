"""Failure signs of a run, gathered for the page: one entry per sign, one line per client that
showed it.
"""

from __future__ import annotations

from dataclasses import dataclass

from comigs import text as f
from comigs.runs.report.read import Run

MEANING = {
    "collapsed-router": "The router sends nearly every token to one expert: the others are not used.",
    "drifting-generalists": "The clients' generalists move apart from round to round; their mean says less and less.",
    "left-out": "A client was asked several times in a row and gave nothing usable: the run goes on without it.",
    "overfitting": "Training loss still falls while valid loss rises: the model learns its training text by heart.",
}


@dataclass(frozen=True)
class Sign:
    """`lines` are (who, in which rounds, the last message)."""

    name: str
    meaning: str
    lines: tuple[tuple[str, str, str], ...]


def diagnoses(run: Run) -> tuple[Sign, ...]:
    """What the run has warned about, in the order of first appearance."""
    signs = []
    for name in dict.fromkeys(w.sign for w in run.warnings):
        warned = [w for w in run.warnings if w.sign == name]
        lines = []
        for client in dict.fromkeys(w.client for w in warned):
            of_client = [w for w in warned if w.client == client]
            rounds = [w.round for w in of_client]
            when = ("round " if len(set(rounds)) == 1 else "rounds ") + f.rounds(rounds)
            lines.append((client or "server", when, of_client[-1].message))
        signs.append(Sign(name.replace("-", " "), MEANING.get(name, ""), tuple(lines)))
    return tuple(signs)
