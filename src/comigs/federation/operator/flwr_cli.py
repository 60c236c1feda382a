"""This module is what the operator's side tells the SuperLink and asks it, through Flower's own
command line on the loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import tomli_w

from comigs.errors import UserError
from comigs.federation.operator.folder import Entry, Federation
from comigs.federation.security.private_files import make_private, write_private
from comigs.processes import call

QUIET = {  # nobody is told that we run, and nothing is fetched
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
END = "\x1e"  # ASCII's record separator
IN_USE = "Public key already in use"  # Flower's words; a key stays so when its node is gone
CONNECTION = "federation"  # our name in Flower's config.toml
# All of the app that is sent to devices: which functions of the installed comigs to call, and no
# code. Devices have pinned its hash, so not a character of it may change.
APP = {
    "project": {
        "name": "comigs",
        "version": "1.0.0",  # of this text, so that devices' pins outlive our releases
        "description": "Runs the comigs that is installed on each side.",
        "license": "Apache-2.0",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "comigs",
                "components": {
                    "serverapp": "comigs.engines.flower.apps:server",
                    "clientapp": "comigs.engines.flower.apps:client",
                },
                "config": {"run-folder": "", "federation": ""},
            }
        }
    },
}


def environment(flwr_home: Path) -> dict[str, str]:
    """Return the environment of every program of Flower: private, offline, with its files in
    `flwr_home`.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    # Flower starts programs of its own by their names.
    scripts = dict.fromkeys((sysconfig.get_path("scripts"), str(Path(sys.executable).parent)))
    # The loopback is never reached through a proxy.
    direct = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    no_proxy = ",".join([*([direct] if direct else []), "127.0.0.1", "localhost"])
    own = {
        "FLWR_HOME": str(flwr_home),
        "PATH": os.pathsep.join([*scripts, os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "PYTHONUNBUFFERED": "1",
    }
    return inherited | QUIET | own


def connect(federation: Federation, port: int) -> None:
    """Tell Flower's command line where this federation's SuperLink is."""
    here = {"address": f"127.0.0.1:{port}", "root-certificates": str(federation.path / "ca.pem")}
    make_private(federation.path / "flwr")
    text = tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: here}})
    write_private(federation.path / "flwr" / "config.toml", text)


def write_app(scratch: str) -> Path:
    """Write the app as Flower wants it, and return where: a folder (whose name it checks, too)
    with a pyproject.
    """
    folder = Path(scratch) / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(tomli_w.dumps(APP), encoding="utf-8")
    return folder


def app_hash() -> str:
    """Return the sha256 of the app bundle that Flower makes of our app here; it names the app
    wherever it arrives. Raises UserError where Flower cannot make it.
    """
    with tempfile.TemporaryDirectory(prefix="comigs-app-") as scratch:
        build = ["build", "--app", str(write_app(scratch))]
        (said,) = _flwr(Path(scratch), Path(scratch) / "flwr", [build])
        made = list(Path(scratch).glob("*.fab"))
        if len(made) != 1:
            raise UserError(f"Flower cannot build the app: {_last_line(said)}")
        return sha256(made[0].read_bytes()).hexdigest()


def register(federation: Federation, names: Collection[str]) -> None:
    """Let clients' devices in, and note their node ids. Who was revoked meanwhile is left out."""
    # One after the other: Flower takes a key once, and what is interrupted here has noted the rest.
    for name in names:
        if (entry := federation.clients().get(name)) is not None:
            _note_node(federation, name, entry.public_key, _register(federation, name, entry))


def _register(federation: Federation, name: str, entry: Entry) -> int:
    """Let a client's device in; return its node id. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="comigs-keys-") as scratch:
        key = Path(scratch) / f"{name}.pub"
        key.write_text(entry.public_key, encoding="utf-8")
        try:
            line = ["supernode", "register", str(key), CONNECTION, "--name", name]
            (answer,) = ask(federation, line)
        except UserError as error:
            if IN_USE not in str(error):
                raise
            raise UserError(
                f"{federation.path / 'state.db'}: has the key of {name} already, from when "
                "registering it was interrupted; stop the server, remove state.db, state.db-shm "
                "and state.db-wal, and start it again: it then registers all clients anew"
            ) from None
    return int(answer["node-id"])


def _note_node(federation: Federation, name: str, public_key: str, node_id: int) -> None:
    def note(clients: dict[str, Entry]) -> None:
        if name in clients and clients[name].public_key == public_key:
            clients[name] = clients[name].model_copy(update={"node_id": node_id})

    federation.change_clients(note)


def unregister(federation: Federation, node_ids: Collection[int]) -> None:
    """Refuse devices from now on."""
    ask(federation, *(["supernode", "unregister", str(node), CONNECTION] for node in node_ids))


def let_in(federation: Federation) -> None:
    """Make the SuperLink accept exactly the clients of clients.json, whatever happened while it did
    not run.
    """
    clients, known = federation.clients(), nodes(federation)
    unregister(federation, known.keys() - {entry.node_id for entry in clients.values()})
    register(federation, [name for name, entry in clients.items() if entry.node_id not in known])


def nodes(federation: Federation) -> dict[int, Mapping[str, Any]]:
    """Return the registered devices by node id, each with "status" ("online", ...), "online-at"
    and "offline-at".
    """
    (answer,) = ask(federation, ["supernode", "list", CONNECTION])
    registered = [node for node in answer["nodes"] if node["status"] != "unregistered"]
    return {int(node["node-id"]): node for node in registered}


def submit(federation: Federation, run_folder: Path) -> int:
    """Start a run; return Flower's run id."""
    folder, own = json.dumps(str(run_folder)), json.dumps(str(federation.path))
    settings = f"run-folder={folder} federation={own}"
    with tempfile.TemporaryDirectory(prefix="comigs-app-") as scratch:
        line = ["run", str(write_app(scratch)), CONNECTION, "--run-config", settings]
        (answer,) = ask(federation, line)
        return int(answer["run-id"])


def run_status(federation: Federation, run_id: int) -> tuple[str, str]:
    """Return (status, details) of a run. A status is pending, starting, running,
    finished:completed, finished:failed or finished:stopped.
    """
    (answer,) = ask(federation, ["ls", CONNECTION, "--run-id", str(run_id)])
    (run,) = answer["runs"]
    return run["status"], "" if run["status-details"] == "N/A" else run["status-details"]


def stop_run(federation: Federation, run_id: int) -> None:
    """Stop a run."""
    ask(federation, ["stop", str(run_id), CONNECTION])


def ask(federation: Federation, *lines: list[str]) -> list[dict[str, Any]]:
    """Ask Flower's command line each of these lines; return what it answers, line by line. Raises
    UserError where one is no success.
    """
    if not lines:
        return []
    federation.require_running()
    # A line that fails prints no JSON, or JSON that says why; either way one line is passed on.
    asked = [[*line, "--format", "json"] for line in lines]
    answers = []
    for said in _flwr(federation.path, federation.path / "flwr", asked):
        try:
            answer = json.loads(said)
        except ValueError:
            answer = {"error-message": _last_line(said)}
        if not answer.get("success"):
            problem = " ".join(answer.get("error-message", "").split())
            raise UserError(f"{federation.path}: the server refused: {problem}")
        answers.append(answer)
    return answers


def _flwr(folder: Path, home: Path, lines: list[list[str]]) -> list[str]:
    """Return what each line prints. One process does all: to import Flower takes a while."""
    # A process of its own, which has no part in our signal handlers, threads and imports.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "comigs.federation.operator.flwr_cli"],
        input=json.dumps(lines),
        cwd=folder,
        env=environment(home),
        text=True,
        capture_output=True,
    )
    *said, rest = done.stdout.split(END)
    if len(said) != len(lines):
        raise UserError(f"Flower's command line failed: {_last_line(rest + done.stderr)}")
    return said


def call_each() -> None:
    """Call Flower's command line for each line of words, which come as JSON on the standard input,
    and print END after the output of each.
    """
    for words in json.load(sys.stdin):
        with suppress(SystemExit):
            call("flwr", words)
        print(END, flush=True)


def _last_line(text: str) -> str:
    for line in reversed(text.splitlines()):
        if said := line.strip(" │╰╭─╯╮"):
            return said
    return "no answer"


if __name__ == "__main__":
    call_each()
