"""What Flower starts: one ServerApp per run on the server, one ClientApp per message on a device.

The FAB is a pyproject alone that names `server` and `client` here. A ClientApp lives for one
message, so it imports no
torch: it hands the bytes to the resident trainer and its answer back.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from comigs.federation.device.trainer_socket import ask
from comigs.federation.flower.grid import envelope, failure, opened
from comigs.processes import GRACE, end_with_parent

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """A run, from its last commit to its end. run_config: "run-folder" and "federation", paths on
    the server.
    """
    _end_with_superexec()
    from comigs.federation.flower.server import (
        go_on,  # torch, which the ClientApp in this file must not wait for
    )

    go_on(
        grid,
        Path(str(context.run_config["run-folder"])),
        Path(str(context.run_config["federation"])),
    )


@client.train()
def train(message: Message, context: Context) -> Message:
    """Every request goes to the trainer, whose socket is node_config["trainer"]. Of an error only
    its type leaves.
    """
    _end_with_superexec()
    try:
        reply = envelope(ask(Path(str(context.node_config["trainer"])), opened(message.content)))
    except Exception as error:
        reply = failure(type(error).__name__)
    return Message(reply, reply_to=message)


def _end_with_superexec() -> None:
    """End this process soon after the SuperExec that started it.

    Flower only interrupts it, and its threads then try for ten minutes and more to reach a server
    that is gone, while nobody else may go on with the run.
    """
    end_with_parent(os.getppid(), before=lambda: time.sleep(GRACE))
