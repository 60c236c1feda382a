"""The report's tables as rows of text, for the page and for the terminal. Pure functions of a
run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from comigs import text as f
from comigs.config import dotted
from comigs.runs.metrics import Amount, Timing
from comigs.runs.report.held import held_by_role
from comigs.runs.report.read import Run
from comigs.runs.report.results import ClientResult, Results, mean, results
from comigs.text import Table

ROLES = {
    "generalist": "generalists", "attention": "attention LoRA", "specialist": "specialists",
    "rest": "the rest of the world", "router": "routers",
}  # fmt: skip


def headline(run: Run) -> str:
    """The result in one sentence: clients, mean perplexity before and after, rounds, bytes
    uploaded.
    """
    r = results(run)
    clients = f.plural(len(r.clients), "client")
    if 0 < r.measured < len(r.clients):
        clients += f" ({r.measured} measured)"
    sent = f"{f.size(r.uploaded_per_client_and_round)} uploaded per client and round"
    if not r.uploaded_per_client_and_round:
        sent = "nothing uploaded"
    if r.base.perplexity is None or r.personal.perplexity is None:
        return f"{clients}, {state(run)}; no result yet; {sent}."
    change = ""
    if r.gain is not None:
        change = f" ({abs(100 * r.gain):.0f} % {'lower' if r.gain >= 0 else 'higher'})"
    mean_ = "mean " if len(r.clients) > 1 else ""
    return (
        f"{clients}, {mean_}{r.split} perplexity {f.perplexity(r.base.perplexity)} \N{RIGHTWARDS ARROW} "
        f"{f.perplexity(r.personal.perplexity)}{change}, {state(run)}; {sent}."
    )


def state(run: Run) -> str:
    """'in 10 rounds', or 'unfinished: round 3 of 10'."""
    if run.summary is None:
        return f"unfinished: round {run.last_round} of {run.config.rounds}"
    return f"in {f.plural(run.summary.rounds, 'round')}"


def client_table(run: Run, brief: bool = False) -> Table:
    """One row per client: its base and personal model, the gain, and what it holds and sends.

    brief: only the columns that fit a terminal.
    """
    r = results(run)
    table = Table(
        headers=(
            "client", "text", "base perplexity", "personal perplexity", "gain", "base bits/byte", "personal bits/byte",
            f"{r.split} tokens", "trained tokens", "experts", "rank", "trained parameters", "upload / round",
        ),
        rows=tuple(_client_row(c, r) for c in r.clients),
        last=_mean_row(r),
        names=2,
    )  # fmt: skip
    return _columns(table, (0, 2, 3, 4, 6, 12), names=1) if brief else table


def cost_table(run: Run) -> Table:
    """One row per client: bytes over the whole run, and speed and memory where they were
    measured.
    """
    r = results(run)
    rows = tuple(_cost_row(c, [t for t in run.timings if t.client == c.name]) for c in r.clients)
    whole = [t for t in run.timings if t.client is None]
    last = (
        "all",
        f.size(sum(c.uploaded_bytes for c in r.clients)),
        f.size(sum(c.downloaded_bytes for c in r.clients)),
        f.duration(_sum(whole or run.timings)),
        f.count(mean(t.tokens_per_second for t in whole)),
        f.size(
            max(
                (t.peak_memory_bytes for t in run.timings if t.peak_memory_bytes is not None),
                default=None,
            )
        ),
    )
    return Table(
        ("client", "uploaded", "downloaded", "time", "tokens per second", "peak memory"), rows, last
    )


def role_table(run: Run) -> Table | None:
    """What clients hold and what left them, by role of the tensor, all clients together; None where
    unknown.
    """
    held, left = held_by_role(run.folder), _uploaded_by_role(run)
    if not held and left is None:
        return None
    roles = [role for role in ROLES if role in held or role in (left or {})]
    roles += sorted(set(left or {}) - set(ROLES))

    def row(role: str) -> tuple[str, ...]:
        has, sent = held.get(role), None if left is None else left.get(role, Amount())
        verdict = "" if sent is None else "left the device" if sent.bytes else "never left"
        return (ROLES.get(role, role), *_amount(has), *_amount(sent), verdict)

    headers = ("what", "tensors held", "bytes held", "tensors uploaded", "bytes uploaded", "")
    return Table(headers, tuple(map(row, roles)))


def roles_apart(run: Run) -> tuple[str, str] | None:
    """The roles that left the devices and those that did not, as words; None where the run does not
    say.
    """
    left = _uploaded_by_role(run)
    if left is None:
        return None
    gone = [role for role in left if left[role].bytes]
    stayed = [
        ROLES[role] for role in ROLES if role in held_by_role(run.folder) and role not in gone
    ]
    return " and ".join(ROLES.get(role, role) for role in gone), " and ".join(stayed)


def expert_share_table(run: Run) -> Table | None:
    """Mean routing weight of each expert and client over blocks, and how far the client adopted.

    None where nothing was weighed and nobody has more than two experts.
    """
    shares = _last_expert_shares(run)
    adopted = {t.client: t.adopted_share for t in run.train if t.adopted_share is not None}
    most = max((len(s) for s in shares.values()), default=0)
    if most < 3 and not adopted:
        return None
    first = run.config.shape_of(run.config.clients[0]).generalists
    names = [f"generalist {i}" if i < first else f"specialist {i - first}" for i in range(most)]
    if adopted and not run.config.numbers_experts:
        names = ["its own", "rest of the world"][:most]
    rows = []
    for name in {**shares, **adopted}:
        row = [*shares.get(name, ())] + [None] * most
        rows.append((name, *map(f.share, [*row[:most], *([adopted.get(name)] if adopted else [])])))
    return Table(
        ("client", *names, *(["adopted of the last download"] if adopted else [])), tuple(rows)
    )


def absence_table(run: Run) -> Table | None:
    """Who was asked and gave nothing usable, when, and why the last time; None where nobody was."""
    rows, last = [], run.config.rounds
    for client in dict.fromkeys(a.client for a in run.absent):
        of_client = [a for a in run.absent if a.client == client]
        rounds = [f.rounds(a.round for a in of_client if a.round <= last)]
        when = ", ".join(
            [r for r in rounds if r] + ["at the end"] * any(a.round > last for a in of_client)
        )
        rows.append((client, when, of_client[-1].reason))
    return Table(("client", "rounds", "why, the last time"), tuple(rows), names=3) if rows else None


def data_table(run: Run) -> Table | None:
    """Per client and split: how much text, and its fingerprint; None where env.json does not
    say.
    """
    data = run.environment.get("data")
    if not isinstance(data, Mapping):
        return None
    rows = []
    for client, splits in data.items():
        for split, facts in splits.items() if isinstance(splits, Mapping) else ():
            if isinstance(facts, Mapping):
                numbers = (facts.get(k) for k in ("tokens", "bytes", "documents"))
                cells = (f.count(n) if isinstance(n, int) else f.NONE for n in numbers)
                rows.append((str(client), str(split), *cells, _words(facts.get("sha256"))))
    return (
        Table(("client", "split", "tokens", "bytes", "documents", "sha256"), tuple(rows), names=2)
        if rows
        else None
    )


def environment_table(run: Run) -> Table:
    """Versions, commit and machine, whatever env.json holds beside the data; nested names joined by
    dots.
    """
    rest = {k: v for k, v in run.environment.items() if k != "data" or data_table(run) is None}
    return Table(
        ("what", "value"), tuple((name, _words(value)) for name, value in dotted(rest)), names=2
    )


def settings(run: Run) -> tuple[tuple[str, str], ...]:
    """The settings people ask for first, as (name, value)."""
    c = run.config
    steps = f"{c.client.steps} a round, {c.client.steps * c.rounds} in all"
    merge = run.summary.weights if run.summary else None
    weights = (("weight of a client", merge),) if merge else ()
    options = tuple((f"options.{name}", str(value)) for name, value in c.options.items())
    wanted = c.participation.clients_per_round
    asked = (("clients in a round", f"{wanted} of {len(c.clients)}"),) if wanted else ()
    merge_ = (("upload.merge", c.upload.merge),) if c.upload.merge != "mean" else ()
    return (
        ("method", c.method),
        *options,
        *weights,
        *merge_,
        *asked,
        ("base", c.base.name),
        ("rounds", str(c.rounds)),
        ("local steps", steps),
        ("batch", f"{c.client.batch_size} windows of {c.data.sequence_length} tokens"),
        ("experts per token", str(c.experts.top_k)),
        (
            "router steps",
            f"{c.client.router_steps} after every {c.client.router_every} local steps",
        ),
        ("seed", str(c.seed)),
    )


def _client_row(c: ClientResult, r: Results) -> tuple[str, ...]:
    rank = f.count(c.rank) + (
        f" / {c.specialist_rank}" if c.specialist_rank not in (None, c.rank) else ""
    )
    return (
        c.name, c.text,
        f.perplexity(c.base.perplexity), f.perplexity(c.personal.perplexity),
        f.percent(c.gain),
        f.decimal(c.base.bits_per_byte), f.decimal(c.personal.bits_per_byte),
        f.count(c.tokens), f.count(c.trained_tokens), f"{f.count(c.generalists)} + {f.count(c.specialists)}",
        rank, f.count(c.trained_parameters), f.size(c.uploaded_bytes / max(1, r.rounds)),
    )  # fmt: skip


def _mean_row(r: Results) -> tuple[str, ...]:
    base, personal, clients = r.base, r.personal, r.clients
    name = "mean" if r.measured in (0, len(clients)) else f"mean of {r.measured}"
    return (
        name, "", f.perplexity(base.perplexity), f.perplexity(personal.perplexity),
        f.percent(r.gain), f.decimal(base.bits_per_byte), f.decimal(personal.bits_per_byte),
        f.count(mean(c.tokens for c in clients)), f.count(mean(c.trained_tokens for c in clients)), "", "",
        f.count(mean(c.trained_parameters for c in clients)), f.size(r.uploaded_per_client_and_round),
    )  # fmt: skip


def _cost_row(c: ClientResult, timings: list[Timing]) -> tuple[str, ...]:
    memory = max(
        (t.peak_memory_bytes for t in timings if t.peak_memory_bytes is not None), default=None
    )
    sent = f.size(c.uploaded_bytes), f.size(c.downloaded_bytes)
    speed = f.count(mean(t.tokens_per_second for t in timings))
    return (c.name, *sent, f.duration(_sum(timings)), speed, f.size(memory))


def _sum(timings: Sequence[Timing]) -> float | None:
    known = [t.seconds for t in timings if t.seconds is not None]
    return sum(known) if known else None


def _uploaded_by_role(run: Run) -> dict[str, Amount] | None:
    """Over the whole run; None unless every round of every client says it."""
    lines = [t.uploaded_by_role for t in run.train]
    if not lines or any(line is None for line in lines):
        return None
    totals: dict[str, Amount] = defaultdict(Amount)
    for line in lines:
        for role, sent in (line or {}).items():
            totals[role] += sent
    return dict(totals)


def _amount(amount: Amount | None) -> tuple[str, str]:
    return (f.count(amount.slots), f.size(amount.bytes)) if amount else (f.NONE, f.NONE)


def _last_expert_shares(run: Run) -> dict[str, tuple[float | None, ...]]:
    """Client -> mean over blocks of each expert's routing weight, in its last training round."""
    shares = {}
    for line in run.train:  # later rounds overwrite earlier ones
        layers = [layer for layer in line.expert_share_by_layer or () if layer]
        if layers:
            shares[line.client] = tuple(mean(expert) for expert in zip_longest(*layers))
    return shares


def _columns(table: Table, kept: Sequence[int], names: int) -> Table:
    def pick(row: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(row[i] for i in kept)

    return Table(
        pick(table.headers), tuple(map(pick, table.rows)), table.last and pick(table.last), names
    )


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f.NONE if value is None else str(value)
