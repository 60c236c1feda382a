"""The server's processes: SuperLink and its executor on the loopback, and the front that devices
reach.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from comigs.errors import UserError
from comigs.federation.operator import flwr_cli
from comigs.federation.operator.folder import Federation
from comigs.federation.security import pki
from comigs.federation.supervisor import OnLine, Supervisor, keep, wait_until
from comigs.processes import locked

Say = Callable[[str], None]
LOOPBACK = {
    "0.0.0.0": "127.0.0.1",
    "::": "::1",
}  # by which we reach ourselves where all addresses are listened on
NODE = re.compile(r"\[Fleet\.(Activate|Deactivate)Node\] \w+ node_id=(\d+)")


def serve(path: Path, say: Say) -> None:
    """Run a federation's server until it is stopped. Raises UserError where a part of it cannot run
    (any more).
    """
    federation = Federation.open(path)
    settings = federation.settings
    with locked(federation.lock, f"{path}: its server is running already"):
        require_free_port(settings.listen, settings.port)
        if federation.certify():
            say("made a new server certificate")
        inner = free_port()
        flwr_cli.connect(federation, inner)
        logs = federation.path / "log"
        with Supervisor(
            logs, flwr_cli.environment(federation.path / "flwr"), federation.path
        ) as children:
            children.start("superlink", _superlink(federation, inner), _tell_nodes(federation, say))
            wait_until(lambda: _answers(federation, "127.0.0.1", inner), "superlink", children)
            children.start("superexec", _superexec(federation, inner))
            flwr_cli.let_in(federation)
            here = LOOPBACK.get(settings.listen, settings.listen)
            words = [str(federation.path), settings.listen, str(settings.port), str(inner)]
            children.start("front", ["comigs.federation.security.gateway:main", *words])
            wait_until(lambda: _answers(federation, here, settings.port), "front", children)
            until = pki.valid_until(federation.read("server.pem"))
            say(
                f"federation {settings.id} is open at {settings.address}; certificate valid until {until:%Y-%m-%d}"
            )
            say(
                f"invited: {', '.join(federation.clients()) or 'nobody yet'}; logs in {logs}; stop with Ctrl-C"
            )
            keep(children)


def require_free_port(listen: str, port: int) -> None:
    """Raises UserError where another program has the port."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except OSError as error:
            raise UserError(
                f"port {port} of {listen}: {error.strerror}; stop what uses it or change `port` and `listen` in "
                "federation.toml (invite clients again when the port changes)"
            ) from None


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _superlink(federation: Federation, port: int) -> list[str]:
    return [
        "flower-superlink", "--host", "127.0.0.1", "--port", str(port),
        "--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key",
        "--enable-supernode-auth", "--database", "state.db", "--disable-runtime-dependency-installation",
        "--isolation", "process", "--superexec-auth-secret-file", "superexec.secret",
    ]  # fmt: skip


def _superexec(federation: Federation, port: int) -> list[str]:
    return [
        "flower-superexec", "--root-certificates", "ca.pem", "--runtime-api-address", f"127.0.0.1:{port}",
        "--superexec-auth-secret-file", "superexec.secret",
    ]  # fmt: skip


def _answers(federation: Federation, host: str, port: int) -> bool:
    context = ssl.create_default_context(cafile=federation.path / "ca.pem")
    context.check_hostname = False  # `listen` need not be one of `hosts`
    try:
        with closing(HTTPSConnection(host, port, timeout=5, context=context)) as connection:
            connection.request("GET", "/")
            return connection.getresponse().status < 500
    except (OSError, HTTPException):
        return False


def _tell_nodes(federation: Federation, say: Say) -> OnLine:
    """Say who comes and goes, as the SuperLink's log has it."""

    def on_line(line: str) -> None:
        if found := NODE.search(line):
            come, node_id = found[1] == "Activate", int(found[2])
            names = [
                name for name, entry in federation.clients().items() if entry.node_id == node_id
            ]
            say(f"{names[0] if names else f'node {node_id}'} {'is online' if come else 'has left'}")

    return on_line
