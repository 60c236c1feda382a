"""Who is asked in a round, who failed to answer, and who is left out.

All of it follows from the config and metrics.jsonl, so that a resumed run goes on as it would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from comigs.config import Config
from comigs.privacy.budget import SPENT
from comigs.runs.metrics import Absent, Evaluation, Line, RoundEnd, Train, Warned
from comigs.seeds import generator


def participants(config: Config, round: int, out: Collection[str]) -> list[str]:
    """Return the clients of a round, in the config's order.

    They are all, or as many as wanted, drawn by the run's seed. out: clients that are left out.
    Each round draws an order of all clients and takes its first, so that leaving one out asks the
    next one and changes nobody else.
    """
    names = config.names
    if config.participation.clients_per_round is None:
        return [name for name in names if name not in out]
    order = generator(config.seed, "participants", round).permutation(len(names))
    drawn = [number for number in map(int, order) if names[number] not in out][: config.asked]
    return [names[number] for number in sorted(drawn)]


def late_line(round: int, client: str, now: int, why: str) -> Absent:
    """Return the line of an answer to `round` that came in round `now` and does not count."""
    return Absent(round=round, client=client, reason=f"too late, in round {now}: {why}")


def left_out_line(round: int, client: str, failures: int, reason: str) -> Warned:
    """Return the line that leaves a client out of the rest of the run."""
    times = "once" if failures == 1 else f"{failures} times in a row"
    return Warned(
        round=round,
        client=client,
        sign="left-out",
        message=f"nothing usable came from it {times} (last: {reason}); "
        "it is left out of the rest of the run",
    )


def left_out(history: Iterable[Line]) -> set[str]:
    """Return the clients that were left out so far."""
    return {
        line.client
        for line in history
        if isinstance(line, Warned) and line.sign == "left-out" and line.client is not None
    }


def budget_spent(history: Iterable[Line]) -> set[str]:
    """Return the clients that have spent their privacy and train no more."""
    return {line.client for line in history if isinstance(line, Absent) and line.reason == SPENT}


def stopped_line(config: Config, history: Iterable[Line]) -> Warned | None:
    """Return the line of a run whose rounds ended early, None where all were done."""
    done = max((line.round for line in history if isinstance(line, RoundEnd)), default=0)
    if done == config.rounds:
        return None
    return Warned(
        round=done,
        sign="privacy-budget-spent",
        message=f"too few clients had privacy left to train after round {done} of {config.rounds}; "
        f"what clients share is that of round {done}",
    )


def failures(history: Iterable[Line]) -> Counter[str]:
    """Count the rounds in a row, up to the last, in which each client gave nothing usable.

    Only rounds count in which the client was asked. A late upload that was used has a train line,
    and counts as an answer.
    """
    in_a_row: Counter[str] = Counter()
    absent: list[tuple[int, str]] = []
    answered: set[str] = set()
    for line in history:
        if isinstance(line, Absent):
            absent.append((line.round, line.client))
        elif isinstance(line, Train):
            answered.add(line.client)
        elif isinstance(line, RoundEnd):
            # A line of an earlier round tells of an answer that came too late, not of a failure.
            failed = {client for round, client in absent if round == line.round} - answered
            for client in list(in_a_row):
                if client not in failed and (line.asked is None or client in line.asked):
                    del in_a_row[client]
            in_a_row.update(failed)
            absent, answered = [], set()
    return in_a_row


def has_trained(history: Iterable[Line], client: str, round: int) -> bool:
    """Return whether what the client learnt in that round has counted."""
    return any(
        isinstance(line, Train) and line.client == client and line.round == round
        for line in history
    )


def measured_base(history: Iterable[Line]) -> set[str]:
    """Return the clients whose text the base was measured on.

    A client does so in the first exchange that it answers, and may keep to itself what came of it.
    """
    measured = set()
    for line in history:
        if isinstance(line, Train) or (isinstance(line, Evaluation) and line.model == "base"):
            measured.add(line.client)
    return measured
