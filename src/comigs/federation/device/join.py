"""This module runs a device's processes: the resident trainer, and the SuperNode that fetches the
server's messages for it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import NoReturn

import psutil

from comigs.config import DataSection, Text, folder_or_name
from comigs.data.partition import list_text
from comigs.data.sources import open_source
from comigs.errors import UserError
from comigs.federation.bundle import Bundle, read_bundle, write_bundle
from comigs.federation.device.connectivity import check_server
from comigs.federation.operator import flwr_cli
from comigs.federation.security.private_files import make_private, write_private
from comigs.federation.supervisor import Supervisor, keep, wait_until
from comigs.files import command, writing
from comigs.processes import locked
from comigs.text import Say


@dataclass(frozen=True)
class Owner:
    """An owner decides what a device takes part with.

    text: see `text_of`. home: the device's own folder; None: one in ~/.comigs. base, accelerator,
    threads, specialists: as in Device (device_service.py). memory, minutes, only_sums, epsilon: as
    in Limits (limits.py).
    """

    text: tuple[str, ...]
    home: Path | None = None
    base: str | None = None
    accelerator: str = "auto"
    threads: int | None = None
    memory: float | None = None
    minutes: float = 120
    specialists: int | None = None
    only_sums: bool = False
    epsilon: float | None = None


def join(file: Path, owner: Owner, say: Say) -> None:
    """Take part in a federation until stopped. Raises UserError where that cannot be (any more)."""
    # What is wrong with the bundle or the text is said before anything is made.
    bundle, text = read_bundle(file), text_of(owner.text)
    if bundle.base is not None and owner.base is None and not bundle.base.has_public_name:
        raise UserError(
            f'--base: missing; the federation\'s base "{bundle.base.name}" is a folder at its '
            "operator's, so give the folder of your copy"
        )
    home = (owner.home or Path.home() / ".comigs" / bundle.federation / bundle.client).absolute()
    make_private(home)
    with locked(home / ".lock", f"{home}: in use: this client runs already"):
        _unpack(bundle, home)
        check_server(bundle)

        # The trainer reads the owner's part from a file: others could read an argument.
        device = {
            "name": bundle.client,
            "home": str(home),
            "root": str(Path.cwd()),
            "text": text if isinstance(text, str) else text.model_dump(),
            "base": owner.base and folder_or_name(owner.base, Path()),
            "accelerator": owner.accelerator,
            "threads": owner.threads,
            "pinned": bundle.base and bundle.base.model_dump(),
            "limits": {
                "memory": owner.memory,
                "minutes": owner.minutes,
                "only_sums": owner.only_sums,
                "epsilon": owner.epsilon,
            },
            "specialists": owner.specialists,
        }
        write_private(home / "device.json", json.dumps(device))

        # A socket's path may have 107 bytes only, so it is not in the home.
        with tempfile.TemporaryDirectory(prefix="comigs-") as short:
            _run(bundle, home, Path(short) / "trainer", owner.memory, say)


def _run(bundle: Bundle, home: Path, socket: Path, memory: float | None, say: Say) -> NoReturn:
    environment = flwr_cli.environment(home / "flwr")
    with Supervisor(home / "log", environment, home) as programs:
        # The trainer is there before anybody can be asked anything.
        trainer = ["comigs.federation.device.trainer_main:main", str(socket), "device.json"]
        programs.start("trainer", trainer, say)
        wait_until(socket.exists, "trainer", programs)

        # The SuperNode says that it is online when the server has let it in.
        online = Event()

        def look(line: str) -> None:
            if "online as node" in line:
                online.set()

        # What it takes for messages is beside the trainer's, and may be no more than that.
        most = int(memory or psutil.virtual_memory().available)
        words = ["comigs.federation.flower.supernode:main", bundle.app, "online", str(socket)]
        programs.start("supernode", [*words, bundle.address, str(most)], look)
        wait_until(online.is_set, "supernode", programs)
        say(f'"{bundle.client}" is online in federation {bundle.federation} at {bundle.address}')
        say(f"its own part stays in {home}; logs in {home / 'log'}; stop with Ctrl-C")
        generate = command("generate", home / "runs" / "RUN")
        say(f"its own model, after a run: {generate} --client {bundle.client}")
        keep(programs)


def text_of(given: Sequence[str]) -> str | Text:
    """Return a client's text as its owner gave it: one path or source, or one for each of train=,
    valid= and test=. Raises UserError where it is neither, or not there.
    """
    # A path may have an equals sign, so only these three words before it count.
    splits = {}
    for one in given:
        split, equals, spec = one.partition("=")
        if equals and split in Text.model_fields:
            splits[split] = spec
    whole = len(given) == 1 and not splits
    if not whole and (len(splits) != len(given) or splits.keys() != Text.model_fields.keys()):
        raise UserError(
            f"--text: given {', '.join(given) or 'nothing'}; give one path or source, to be split, "
            "or all of --text train=PATH --text valid=PATH --text test=PATH"
        )
    for spec in [given[0]] if whole else splits.values():
        if next(open_source(spec, Path.cwd()), None) is None:
            raise UserError(f"--text: {spec} has no documents")
    text = given[0] if whole else Text(**splits)
    # Too few documents would be seen by nobody but the server, three rounds later.
    try:
        list_text(text, DataSection(root=Path.cwd()))
    except UserError as error:
        raise UserError(f"--text: {error}") from None
    return text


def _unpack(bundle: Bundle, home: Path) -> None:
    """Put the bundle's parts where Flower reads them. Raises UserError where the folder is somebody
    else's.
    """
    # The folder has this device's own model, so another client's bundle must not take it over.
    kept = home / "bundle.toml"
    if kept.exists() and (owner := read_bundle(kept)) != bundle:
        if (owner.federation, owner.client) != (bundle.federation, bundle.client):
            raise UserError(
                f'{home}: belongs to "{owner.client}" of federation {owner.federation}; '
                "choose another with --home"
            )
        kept.unlink()
    with writing(home, "choose another folder with --home"):
        if not kept.exists():
            write_bundle(kept, bundle)
        write_private(home / "ca.pem", bundle.authority)
        write_private(home / "key", bundle.key)
