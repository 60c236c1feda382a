"""These are the two apps that Flower starts: one ServerApp for a run on the server, one ClientApp
for a message on a device.

What Flower sends to devices is a pyproject alone, which names `server` and `client` here. A
ClientApp lives for one message, so it imports no torch: it hands the bytes to the resident trainer,
and the trainer's answer back.
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
    """Run a run from its last commit to its end. Its run_config has "run-folder" and "federation",
    paths on the server.
    """
    end_with_superexec()
    # It imports torch, which the ClientApp in this file must not wait for.
    from comigs.federation.flower.server import go_on

    settings = context.run_config
    go_on(grid, Path(str(settings["run-folder"])), Path(str(settings["federation"])))


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send a request to the trainer, whose socket is node_config["trainer"]; return its answer. Of
    an error only the type leaves the device.
    """
    end_with_superexec()
    try:
        reply = envelope(ask(Path(str(context.node_config["trainer"])), opened(message.content)))
    except Exception as error:
        reply = failure(type(error).__name__)
    return Message(reply, reply_to=message)


def end_with_superexec() -> None:
    """End this process soon after the SuperExec that started it.

    Flower only interrupts it, and its threads then try for ten minutes and more to reach a server
    that is gone, while nobody else may go on with the run.
    """
    end_with_parent(os.getppid(), before=lambda: time.sleep(GRACE))
