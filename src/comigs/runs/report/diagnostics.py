"""What a run has warned about, gathered for the page."""

from __future__ import annotations

from dataclasses import dataclass

from comigs import text as f
from comigs.runs.report.read import Run

MEANING = {
    "collapsed-router": "The router sends nearly every token to one expert: "
    "the others are not used.",
    "drifting-generalists": "The clients' generalists move apart from round to round; "
    "their mean says less and less.",
    "privacy-budget-spent": "Too few clients had any privacy left to train on: "
    "the run ended before its last round.",
    "left-out": "A client was asked several times in a row and gave nothing usable: "
    "the run goes on without it.",
    "overfitting": "Training loss still falls while valid loss rises: "
    "the model learns its training text by heart.",
}


@dataclass(frozen=True)
class Diagnosis:
    """One sign of going wrong, and who showed it: (who, in which rounds, the last message)."""

    name: str
    meaning: str
    lines: tuple[tuple[str, str, str], ...]


def diagnoses(run: Run) -> tuple[Diagnosis, ...]:
    """Return what the run has warned about, in the order of first appearance."""
    found = []
    for sign in dict.fromkeys(warning.sign for warning in run.warnings):
        warned = [warning for warning in run.warnings if warning.sign == sign]
        # A client that shows a sign in many rounds is one line of the page.
        lines = []
        for client in dict.fromkeys(warning.client for warning in warned):
            of_client = [warning for warning in warned if warning.client == client]
            rounds = {warning.round for warning in of_client}
            word = "round" if len(rounds) == 1 else "rounds"
            message = of_client[-1].message
            lines.append((client or "server", f"{word} {f.rounds(rounds)}", message))
        found.append(Diagnosis(sign.replace("-", " "), MEANING.get(sign, ""), tuple(lines)))
    return tuple(found)
