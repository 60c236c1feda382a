"""Who is asked in a round, who failed to answer, and who is left out: all of it from the config and
metrics.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from comigs.config import Config
from comigs.seeds import generator

Line = Mapping[str, Any]  # of metrics.jsonl


def participants(config: Config, round: int, out: Collection[str]) -> list[str]:
    """The clients of a round, in the config's order: all, or as many as wanted, drawn by the run's
    seed.

    out: clients that are left out. Each round draws an order of all clients and takes its first, so
    that leaving one out asks the next one and changes nobody else.
    """
    names, wanted = [c.name for c in config.clients], config.participation.clients_per_round
    if wanted is None:
        return [name for name in names if name not in out]
    order = generator(config.seed, "participants", round).permutation(len(names))
    drawn = [number for number in map(int, order) if names[number] not in out][:wanted]
    return [names[number] for number in sorted(drawn)]


def absent_line(round: int, client: str, reason: str) -> dict[str, Any]:
    """The "absent" line: the client was asked in that round, and nothing usable came."""
    return {"kind": "absent", "round": round, "client": client, "reason": reason}


def late_line(round: int, client: str, now: int, why: str) -> dict[str, Any]:
    """The "absent" line of an answer to `round` that came in round `now` and does not count."""
    return absent_line(round, client, f"too late, in round {now}: {why}")


def left_out_line(round: int, client: str, failures: int, reason: str) -> dict[str, Any]:
    """The "warning" line that leaves a client out of the rest of the run."""
    times = "once" if failures == 1 else f"{failures} times in a row"
    message = f"asked {times} and nothing usable came (last: {reason}); it is left out of the rest of the run"
    return {
        "kind": "warning",
        "round": round,
        "client": client,
        "sign": "left-out",
        "message": message,
    }


def left_out(history: Iterable[Line]) -> set[str]:
    """The clients that were left out so far."""
    return {
        line["client"]
        for line in history
        if line["kind"] == "warning" and line["sign"] == "left-out"
    }


def failures(history: Iterable[Line]) -> Counter[str]:
    """How many rounds in a row, up to the last, each client was asked in and gave nothing usable.

    A round ends with its "server" line. A late upload that was used has a "train" line and counts
    as an answer.
    """
    row: Counter[str] = Counter()
    absent: list[tuple[int, str]] = []
    answered: set[str] = set()
    for line in history:
        if line["kind"] == "absent":
            absent.append((line["round"], line["client"]))
        elif line["kind"] == "train":
            answered.add(line["client"])
        elif line["kind"] == "server":
            failed = {client for round, client in absent if round == line["round"]} - answered
            asked = line.get("asked")
            for client in list(row):
                if client not in failed and (asked is None or client in asked):
                    del row[client]
            row.update(failed)
            absent, answered = [], set()
    return row


def has_trained(history: Iterable[Line], client: str, round: int) -> bool:
    """What the client learnt in that round has counted."""
    return any(
        x["kind"] == "train" and x["client"] == client and x["round"] == round for x in history
    )


def measured_base(history: Iterable[Line]) -> set[str]:
    """The clients whose text the base was measured on."""
    return {
        line["client"]
        for line in history
        if line["kind"] == "evaluation" and line["model"] == "base"
    }
