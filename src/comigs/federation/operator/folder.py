"""This module is a federation's folder on the server: its settings (federation.toml), its authority
(ca.pem, ca.key), its certificate (server.pem, server.key), who was invited (clients.json), which
runs there were (runs.json), how large an answer may be (answer-bytes), what is Flower's
(superexec.secret, state.db, flwr/), and log/.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, ValidationError, field_validator

from comigs.config import Section, read_toml
from comigs.config.errors import one_line
from comigs.errors import UserError, nearest
from comigs.federation.pinned_base import PinnedBase
from comigs.federation.security import pki
from comigs.federation.security.private_files import make_private, write_private
from comigs.files import command, writing
from comigs.processes import is_locked, locked

# Hosts that every server certificate names: the server's own parts use them.
ALWAYS = ("127.0.0.1", "localhost")
RESTORE = "restore it from your copy of the folder"


class Settings(Section):
    """The settings are what federation.toml says.

    id: the federation's; bundles name it. hosts: names and addresses of the server; bundles say the
    first one. listen: the address of this machine that devices reach; 0.0.0.0: all of them. port:
    the one that devices reach. app: sha256 of the app bundle; devices run no other. base: the one
    base of its runs, which bundles pin; None in federations from before there were pins.
    """

    id: str
    hosts: tuple[str, ...]
    listen: str
    port: int = Field(ge=1, le=65535)
    app: str
    base: PinnedBase | None = None

    @field_validator("hosts")
    @classmethod
    def _hosts_fit_a_certificate(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if not pki.is_host(host):
                raise ValueError(
                    f'"{host}" is neither a host name nor an address; give no port and no https://'
                )
        if not value:
            raise ValueError("name at least one host")
        return value

    @property
    def address(self) -> str:
        """Where devices reach the server."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class Entry(Section):
    """An entry is one client in clients.json.

    node_id: what Flower calls its device; None until its key is registered. invited: when, in UTC.
    """

    node_id: int | None
    public_key: str
    invited: datetime


@dataclass(frozen=True)
class Federation:
    """A federation is its folder and what federation.toml says."""

    path: Path
    settings: Settings

    @classmethod
    def create(
        cls,
        path: Path,
        hosts: tuple[str, ...],
        port: int,
        app: str,
        base: PinnedBase | None = None,
    ) -> Federation:
        """Make a federation with its own authority. Raises UserError."""
        require_new(path)
        # Without hosts it is for this machine only, and nobody else can reach it.
        identity = secrets.token_hex(8)
        named = tuple(dict.fromkeys((*hosts, *ALWAYS)))
        listen = "0.0.0.0" if hosts else "127.0.0.1"
        tree = {"id": identity, "hosts": named, "listen": listen, "port": port, "app": app}
        settings = _parse(tree | {"base": base}, "federation init")
        authority, key = pki.new_authority(identity)
        files = {
            "ca.pem": authority,
            "ca.key": key,
            "superexec.secret": secrets.token_hex(24),
            "federation.toml": tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)),
        }

        # It appears whole, so whoever is killed meanwhile leaves no half of one.
        with writing(path, "choose another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
                made = cls(Path(scratch) / "federation", settings)
                make_private(made.path)
                for name, text in files.items():
                    write_private(made.path / name, text)
                made.certify()
                made.path.rename(path)
        return cls(path, settings)

    @classmethod
    def open(cls, path: Path) -> Federation:
        """Return an existing federation. Raises UserError where it is none."""
        file = path / "federation.toml"
        if not file.is_file():
            found = "not a federation (it has no federation.toml)"
            what = found if path.exists() else "no such folder"
            raise UserError(f"{path}: {what}; make one with: comigs federation init DIR")
        make_private(path)
        return cls(path.resolve(), _parse(read_toml(file, "settings"), str(file)))

    @property
    def lock(self) -> Path:
        """The lock file that the server's process holds."""
        return self.path / ".server.lock"

    @property
    def running(self) -> bool:
        """Whether its server runs, on this machine."""
        return is_locked(self.lock)

    def require_running(self) -> None:
        """Raise UserError where the server does not run."""
        if not self.running:
            start = command("federation server", self.path)
            raise UserError(f"{self.path}: its server is not running; start it with: {start}")

    def read(self, name: str) -> str:
        """Return the text of a file of the folder. Raises UserError where it is missing."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{self.path / name}: missing or damaged; {RESTORE}") from None

    def certify(self) -> bool:
        """Make the server's certificate where there is none, it ends soon or its hosts have
        changed; return whether one was made. Raises UserError where a file is damaged, or none can
        be written.
        """
        # The hosts in federation.toml may be changed by hand, between two starts of the server.
        authority, key = self.read("ca.pem"), self.read("ca.key")
        try:
            file = self.path / "server.pem"
            hosts = tuple(dict.fromkeys((*self.settings.hosts, *ALWAYS)))
            if file.exists() and pki.certificate_fits(self.read("server.pem"), hosts):
                return False
            certificate, certificate_key = pki.new_server_certificate(authority, key, hosts)
        except ValueError:
            raise UserError(
                f"{self.path}: ca.pem, ca.key or server.pem is damaged; {RESTORE}"
            ) from None
        with writing(self.path, "allow writing, then start the server again"):
            write_private(self.path / "server.key", certificate_key)
            write_private(file, certificate)
        return True

    def clients(self) -> dict[str, Entry]:
        """Return who was invited, by name. Raises UserError where clients.json is damaged."""
        tree = self._json("clients.json", {})
        try:
            return {n: Entry.model_validate_json(json.dumps(entry)) for n, entry in tree.items()}
        except (ValidationError, AttributeError):
            raise UserError(f"{self.path / 'clients.json'}: damaged; {RESTORE}") from None

    def client_named(self, name: str) -> Entry:
        """Return a client. Raises UserError where it was not invited, naming who was."""
        clients = self.clients()
        if name not in clients:
            known = ", ".join(clients) or "nobody yet"
            raise UserError(
                f'{self.path}: "{name}" was not invited; invited are: {known}.'
                f"{nearest(name, list(clients))}"
            )
        return clients[name]

    def change_clients(self, change: Callable[[dict[str, Entry]], None]) -> None:
        """Read, change and write clients.json, one process at a time. What `change` raises leaves
        it as it was.
        """
        with locked(self.path / ".clients.lock"):
            clients = self.clients()
            change(clients)
            tree = {name: entry.model_dump(mode="json") for name, entry in clients.items()}
            self._write_json("clients.json", tree)

    def runs(self) -> dict[str, Any]:
        """Return the runs that were submitted here: folder -> {"clients": names, "began": UTC}."""
        return dict(self._json("runs.json", {}))

    def note_run(self, folder: Path, clients: list[str]) -> None:
        """Keep note of a run that was submitted here."""
        began = datetime.now(UTC).isoformat(timespec="seconds")
        run = {"clients": clients, "began": began}
        with locked(self.path / ".runs.lock"):
            self._write_json("runs.json", {**self.runs(), str(folder): run})

    def _json(self, name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
        if not (self.path / name).exists():
            return default
        try:
            tree = json.loads(self.read(name))
        except ValueError:
            tree = None
        if not isinstance(tree, dict):
            raise UserError(f"{self.path / name}: damaged; {RESTORE}")
        return tree

    def _write_json(self, name: str, tree: Mapping[str, Any]) -> None:
        with writing(self.path, "make room or allow writing, then try again"):
            write_private(self.path / name, json.dumps(tree, indent=1) + "\n")


def require_new(path: Path) -> None:
    """Raise UserError where there is something at `path` already."""
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{path}: exists already; nothing was changed. "
            "Choose another folder for a new federation"
        )


def _parse(tree: Mapping[str, Any], source: str) -> Settings:
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(error, tree, {'': Settings})}") from None
