"""This module runs the server's processes: SuperLink and its executor on the loopback, and the
gateway that devices reach.
"""

from __future__ import annotations

import random
import re
import socket
import ssl
from contextlib import closing, suppress
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from comigs.errors import UserError
from comigs.federation.operator import flwr_cli
from comigs.federation.operator.folder import Federation
from comigs.federation.security import pki
from comigs.federation.supervisor import OnLine, Supervisor, keep, wait_until
from comigs.processes import locked
from comigs.text import Say

# By which we reach ourselves where all addresses are listened on.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
PORTS = range(20000, 32768)  # of programs that ask for any
NODE = re.compile(r"\[Fleet\.(Activate|Deactivate)Node\] \w+ node_id=(\d+)")


def serve(path: Path, say: Say) -> None:
    """Run a federation's server until it is stopped. Raises UserError where a part of it cannot
    run, or runs no more.
    """
    federation = Federation.open(path)
    settings = federation.settings
    with locked(federation.lock, f"{path}: its server is running already"):
        # What would keep a part from starting is said before anything is started.
        require_free_port(settings.listen, settings.port)
        if federation.certify():
            say("made a new server certificate")
        inner = free_port()
        flwr_cli.connect(federation, inner)
        logs, environment = federation.path / "log", flwr_cli.environment(federation.path / "flwr")
        with Supervisor(logs, environment, federation.path) as programs:
            programs.start("superlink", _superlink(inner), _tell_nodes(federation, say))
            wait_until(lambda: _answers(federation, "127.0.0.1", inner), "superlink", programs)
            programs.start("superexec", _superexec(inner))

            # The door opens last, when it is known who may come in.
            flwr_cli.let_in(federation)
            here = LOOPBACK.get(settings.listen, settings.listen)
            words = [str(federation.path), settings.listen, str(settings.port), str(inner)]
            programs.start("gateway", ["comigs.federation.security.gateway:main", *words])
            wait_until(lambda: _answers(federation, here, settings.port), "gateway", programs)

            until = f"{pki.valid_until(federation.read('server.pem')):%Y-%m-%d}"
            opened = f"federation {settings.id} is open at {settings.address}"
            say(f"{opened}; certificate valid until {until}")
            invited = ", ".join(federation.clients()) or "nobody yet"
            say(f"invited: {invited}; logs in {logs}; stop with Ctrl-C")
            keep(programs)


def require_free_port(listen: str, port: int) -> None:
    """Raise UserError where another program has the port."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except (OSError, UnicodeError) as error:  # a name is encoded before it is sought
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"port {port} of {listen}: {why}; stop what uses it or change `port` "
                "and `listen` in federation.toml (invite clients again when the port changes)"
            ) from None


def free_port() -> int:
    """Return a port of the loopback that nobody uses now.

    It is none of those that systems give to connections (Linux: from 32768 on). Who knocks at such
    a port before its server is there may be given that very port, and then holds it, connected with
    itself, so that the server finds it taken. Raises UserError where none is free.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise UserError(f"ports {PORTS[0]} to {PORTS[-1]} of 127.0.0.1: none is free")


def _superlink(port: int) -> list[str]:
    return [
        *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem"),
        *("--ssl-keyfile", "server.key", "--enable-supernode-auth", "--database", "state.db"),
        *("--disable-runtime-dependency-installation", "--isolation", "process"),
        *("--superexec-auth-secret-file", "superexec.secret"),
    ]


def _superexec(port: int) -> list[str]:
    return [
        *("flower-superexec", "--root-certificates", "ca.pem"),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
        *("--superexec-auth-secret-file", "superexec.secret"),
    ]


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
    """Return what reads the SuperLink's log and says who comes and goes."""
    words = {"Activate": "is online", "Deactivate": "has left"}

    def on_line(line: str) -> None:
        if found := NODE.search(line):
            node_id = int(found[2])
            names = {entry.node_id: name for name, entry in federation.clients().items()}
            say(f"{names.get(node_id, f'node {node_id}')} {words[found[1]]}")

    return on_line
