"""This module is what an operator does with a federation besides running its server: found it,
invite clients, revoke them, look.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from comigs.config import BaseSection, ClientEntry
from comigs.errors import UserError
from comigs.federation.bundle import new_bundle, write_bundle
from comigs.federation.operator import flwr_cli
from comigs.federation.operator.folder import Entry, Federation, require_new
from comigs.federation.pinned_base import PinnedBase
from comigs.federation.security import pki
from comigs.text import Table

DEFAULT_BASE = BaseSection()  # a config's


def found(
    path: Path, hosts: tuple[str, ...], port: int, base: BaseSection = DEFAULT_BASE
) -> Federation:
    """Make a federation: its authority, its server's certificate, its settings, and the base that
    its devices will load. Raises UserError.
    """
    require_new(path)
    return Federation.create(path, hosts, port, flwr_cli.app_hash(), pin(base))


def pin(section: BaseSection) -> PinnedBase:
    """Load a base, and return what devices are to hold a server to. Raises UserError."""
    # It imports torch, which whoever invites or looks must not wait for.
    from comigs.bases.load import load_base

    base = load_base(section)
    return PinnedBase(
        name=base.title,
        dtype=str(base.dtype).removeprefix("torch."),
        tokenizer=section.tokenizer,
        weights=section.weights,
        fingerprint=base.fingerprint,
    )


def invite(path: Path, name: str, out: Path | None = None) -> Path:
    """Make a client's key and bundle, and register the key where the server runs; return where the
    bundle is. Raises UserError.
    """
    federation = Federation.open(path)
    # A name that no config could hold would be found out only by the first run.
    try:
        ClientEntry(name=name)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f'the name "{name}" cannot be a client\'s: {problem}') from None

    # The private key is in the bundle and nowhere else; the federation keeps the public one.
    private, public = pki.new_device_key()
    bundle = new_bundle(federation.settings, federation.read("ca.pem"), name, private)
    file = out if out is not None else Path(f"{name}.bundle.toml")

    def enter(clients: dict[str, Entry]) -> None:
        if name.lower() in (known.lower() for known in clients):
            raise UserError(
                f'{path}: "{name}" was invited already; choose another name, or: '
                f"comigs federation revoke {path} {name}"
            )
        write_bundle(file, bundle)
        now = datetime.now(UTC).replace(microsecond=0)
        clients[name] = Entry(node_id=None, public_key=public, invited=now)

    federation.change_clients(enter)
    if federation.running:
        flwr_cli.register(federation, [name])
    return file


def revoke(path: Path, name: str) -> None:
    """Refuse a client from now on, and forget it. Raises UserError."""
    federation = Federation.open(path)
    entry = federation.client_named(name)

    def remove(clients: dict[str, Entry]) -> None:
        del clients[name]

    federation.change_clients(remove)
    if federation.running and entry.node_id is not None:  # else the server's next start does it
        flwr_cli.unregister(federation, [entry.node_id])


def status(path: Path) -> Table:
    """Return a table with a line for each client: invited, registered, online, last seen, runs.
    Raises UserError.
    """
    federation = Federation.open(path)
    # Only a running server knows who is online; all else is in the folder.
    running = federation.running
    nodes = flwr_cli.nodes(federation) if running else {}
    runs = federation.runs().values()
    rows = []
    for name, entry in federation.clients().items():
        node = nodes.get(entry.node_id or 0, {})
        invited = f"{entry.invited:%Y-%m-%d %H:%M}"
        registered = "yes" if entry.node_id is not None else "at the next start"
        online, seen = _presence(node)
        count = sum(name in run["clients"] for run in runs)
        rows.append((name, invited, registered, online if running else "?", seen, str(count)))
    headers = ("client", "invited (UTC)", "registered", "online", "last seen (UTC)", "runs")
    return Table(headers, tuple(rows), names=5)


def _presence(node: Mapping[str, Any]) -> tuple[str, str]:
    """Return whether a node is online, and when it was seen last, in words."""
    if node.get("status") == "online":
        return "yes", "now"
    when = str(node.get("offline-at", ""))
    return "no", when[:16] if when[:1].isdigit() else "-"
