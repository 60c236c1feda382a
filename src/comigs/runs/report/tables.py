"""The results of a run as tables of text, for the page and for the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest

from comigs import text as f
from comigs.runs.metrics import Amount, Timing
from comigs.runs.report.held_tensors import held_by_role
from comigs.runs.report.read import Run
from comigs.runs.report.results import ClientResult, Results, mean, results
from comigs.text import Table

ROLES = {
    "generalist": "generalists",
    "attention": "attention LoRA",
    "specialist": "specialists",
    "rest": "the others' expert",
    "router": "routers",
}
BRIEF = (0, 2, 3, 4, 6, 12)  # the columns of the clients' table that fit a terminal


def headline(run: Run) -> str:
    """Return the result in one sentence.

    The sentence says clients, mean perplexity before and after, rounds, and bytes uploaded.
    """
    # What was not measured is said, and not left to be inferred from a figure.
    r = results(run)
    clients = f.plural(len(r.clients), "client")
    if 0 < r.measured < len(r.clients):
        clients += f" ({r.measured} measured)"
    sent = "nothing uploaded"
    if r.uploaded_per_client_and_round:
        sent = f"{f.size(r.uploaded_per_client_and_round)} uploaded per client and round"
    if r.base.perplexity is None or r.personal.perplexity is None:
        return f"{clients}, {state(run)}; no result yet; {sent}."

    # A perplexity means little by itself; beside the base's it says what training was good for.
    base, personal = f.perplexity(r.base.perplexity), f.perplexity(r.personal.perplexity)
    change = ""
    if r.gain is not None:
        direction = "lower" if r.gain >= 0 else "higher"
        change = f" ({abs(100 * r.gain):.0f} % {direction})"
    mean_ = "mean " if len(r.clients) > 1 else ""
    result = f"{mean_}{r.split} perplexity {base} \N{RIGHTWARDS ARROW} {personal}{change}"
    return f"{clients}, {result}, {state(run)}; {sent}."


def state(run: Run) -> str:
    """Return how far a run is: 'in 10 rounds', or 'unfinished: round 3 of 10'."""
    if run.summary is None:
        return f"unfinished: round {run.last_round} of {run.config.rounds}"
    return f"in {f.plural(run.summary.rounds, 'round')}"


def client_table(run: Run, brief: bool = False) -> Table:
    """Return one row per client: its base and personal model, the gain, what it holds and sends.

    brief: only the columns that fit a terminal.
    """
    # Whoever has a result is in the mean, and the row says over how many the mean is.
    r = results(run)
    words = (
        "client, text, base perplexity, personal perplexity, gain, base bits/byte, "
        f"personal bits/byte, {r.split} tokens, trained tokens, experts, rank, "
        "trained parameters, upload / round"
    )
    headers = tuple(words.split(", "))
    rows = [_client_row(client, r) for client in r.clients]
    last = _mean_row(r)
    if not brief:
        return Table(headers, tuple(rows), last, names=2)
    short = [_picked(row) for row in rows]
    return Table(_picked(headers), tuple(short), _picked(last), names=1)


def _picked(row: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(row[column] for column in BRIEF)


def _client_row(client: ClientResult, r: Results) -> tuple[str, ...]:
    rank = f.count(client.rank)
    if client.specialist_rank not in (None, client.rank):
        rank += f" / {client.specialist_rank}"
    amounts = (
        f.count(client.tokens),
        f.count(client.trained_tokens),
        f"{f.count(client.generalists)} + {f.count(client.specialists)}",
        rank,
        f.count(client.trained_parameters),
        # A division by no rounds would say nothing of a run that has just begun.
        f.size(client.uploaded_bytes / max(1, r.rounds)),
    )
    return client.name, client.text, *_scores(client), *amounts


def _mean_row(r: Results) -> tuple[str, ...]:
    # Amounts are of all clients, scores of those that were measured, as the name says.
    name = "mean"
    if r.measured not in (0, len(r.clients)):
        name = f"mean of {r.measured}"
    amounts = (
        f.count(mean(client.tokens for client in r.clients)),
        f.count(mean(client.trained_tokens for client in r.clients)),
        "",
        "",
        f.count(mean(client.trained_parameters for client in r.clients)),
        f.size(sum(c.uploaded_bytes for c in r.clients) / max(1, r.rounds * len(r.clients))),
    )
    return name, "", *_scores(r), *amounts


def _scores(of: ClientResult | Results) -> tuple[str, ...]:
    return (
        f.perplexity(of.base.perplexity),
        f.perplexity(of.personal.perplexity),
        f.percent(of.gain),
        f.decimal(of.base.bits_per_byte),
        f.decimal(of.personal.bits_per_byte),
    )


def cost_table(run: Run) -> Table:
    """Return one row per client: bytes over the whole run, and speed and memory.

    A dash stands where speed and memory were not measured. The time of all is the sum of theirs,
    whether they worked at once or in turn.
    """
    r = results(run)
    rows = []
    for client in r.clients:
        timings = [timing for timing in run.timings if timing.client == client.name]
        speed = f.count(mean(timing.tokens_per_second for timing in timings))
        sent, received = f.size(client.uploaded_bytes), f.size(client.downloaded_bytes)
        time, peak = f.duration(_seconds(timings)), f.size(_peak(timings))
        rows.append((client.name, sent, received, time, speed, peak))
    # Clients may have worked at once, so that all together have no speed. Runs of before have lines
    # of whole rounds, too.
    of_clients = [timing for timing in run.timings if timing.client is not None]
    last = (
        "all",
        f.size(sum(client.uploaded_bytes for client in r.clients)),
        f.size(sum(client.downloaded_bytes for client in r.clients)),
        f.duration(_seconds(of_clients)),
        f.NONE,
        f.size(_peak(run.timings)),
    )
    headers = ("client", "uploaded", "downloaded", "time", "tokens per second", "peak memory")
    return Table(headers, tuple(rows), last)


def _seconds(timings: Sequence[Timing]) -> float | None:
    known = [timing.seconds for timing in timings if timing.seconds is not None]
    return sum(known) if known else None


def _peak(timings: Sequence[Timing]) -> int | None:
    known = [t.peak_memory_bytes for t in timings if t.peak_memory_bytes is not None]
    return max(known, default=None)


def role_table(run: Run) -> Table | None:
    """Return what clients hold and what left them, by role of the tensor, all clients together.

    It is None where neither is known.
    """
    held, left = held_by_role(run.folder), _uploaded_by_role(run)
    if not held and left is None:
        return None

    # A role that left devices and is not known here is shown all the same, under its own name.
    uploaded = left or {}
    roles = [role for role in ROLES if role in held or role in uploaded]
    roles += sorted(uploaded.keys() - ROLES.keys())
    rows = []
    for role in roles:
        sent, verdict = None, ""
        if left is not None:
            sent = left.get(role, Amount())
            verdict = "left the device" if sent.bytes else "never left"
        rows.append((ROLES.get(role, role), *_amount(held.get(role)), *_amount(sent), verdict))
    headers = ("what", "tensors held", "bytes held", "tensors uploaded", "bytes uploaded", "")
    return Table(headers, tuple(rows))


def _amount(amount: Amount | None) -> tuple[str, str]:
    if amount is None:
        return f.NONE, f.NONE
    return f.count(amount.slots), f.size(amount.bytes)


def roles_apart(run: Run) -> tuple[str, str] | None:
    """Return the roles that left the devices and those that did not, as words.

    It is None where the run does not say what left.
    """
    left = _uploaded_by_role(run)
    if left is None:
        return None
    held = held_by_role(run.folder)
    gone = [role for role in left if left[role].bytes]
    stayed = [ROLES[role] for role in ROLES if role in held and role not in gone]
    return " and ".join(ROLES.get(role, role) for role in gone), " and ".join(stayed)


def _uploaded_by_role(run: Run) -> dict[str, Amount] | None:
    """Return the amounts of the whole run; None unless every round of every client says them."""
    if not run.train:
        return None
    totals: dict[str, Amount] = defaultdict(Amount)
    for line in run.train:
        if line.uploaded_by_role is None:
            return None
        for role, sent in line.uploaded_by_role.items():
            totals[role] += sent
    return dict(totals)


def expert_share_table(run: Run) -> Table | None:
    """Return the mean routing weight of each expert and client, and how far the client adopted.

    It is None where nothing was weighed and nobody has more than two experts.
    """
    # Later rounds overwrite earlier ones: what is shown is how a run ended.
    shares: dict[str, list[float | None]] = {}
    adopted: dict[str, float] = {}
    for line in run.train:
        if line.expert_share_by_layer:
            layers = zip_longest(*line.expert_share_by_layer)
            shares[line.client] = [mean(expert) for expert in layers]
        if line.adopted_share is not None:
            adopted[line.client] = line.adopted_share
    most = max(map(len, shares.values()), default=0)
    if most < 3 and not adopted:
        return None

    # Beside everybody's generalists, which are the last, experts are a client's own.
    first, shared = run.config.experts.generalists, most > 0 and run.beside_others
    names = [f"generalist {number}" for number in range(most)]
    names[first:] = [f"specialist {number}" for number in range(most - first)]
    if shared:
        names = [*(f"its own {number}" for number in range(most - 1)), "everybody's"]

    # Clients may have unequal numbers of experts: a dash stands where one has none.
    rows = []
    for client in {**shares, **adopted}:
        own = shares.get(client, [])
        missing = [None] * (most - len(own))
        row = [*own, *missing]
        if shared:
            row = [*own[:-1], *missing, *own[-1:]]
        if adopted:
            row.append(adopted.get(client))
        rows.append((client, *map(f.share, row)))
    if adopted:
        names.append("adopted of the last download")
    return Table(("client", *names), tuple(rows))


def absence_table(run: Run) -> Table | None:
    """Return who was asked and gave nothing usable, when, and why the last time.

    It is None where everybody always answered.
    """
    # The exchange after the last round has no number that people know.
    rows, last = [], run.config.rounds
    for client in dict.fromkeys(line.client for line in run.absent):
        of_client = [line for line in run.absent if line.client == client]
        when = []
        if rounds := f.rounds(line.round for line in of_client if line.round <= last):
            when.append(rounds)
        if any(line.round > last for line in of_client):
            when.append("at the end")
        rows.append((client, ", ".join(when), of_client[-1].reason))
    if not rows:
        return None
    return Table(("client", "rounds", "why, the last time"), tuple(rows), names=3)
