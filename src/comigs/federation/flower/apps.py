"""This module has the ServerApp, which Flower starts for a run on the server.

What Flower sends to devices is a pyproject alone, which names `server` and `client` here. Devices
pin it and load neither: a device's own SuperNode hands messages to the resident trainer.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from comigs.processes import GRACE, end_with_parent

server = ServerApp()
client = ClientApp()  # no app of Flower is without one


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run a run from its last commit to its end. Its run_config has "run-folder" and "federation",
    paths on the server.
    """
    end_with_superexec()
    # They import torch and more, which nobody needs who only looks for the apps.
    from comigs.federation.flower.pieces import take_answers_one_by_one
    from comigs.federation.flower.server import go_on

    settings = context.run_config
    federation = Path(str(settings["federation"]))
    take_answers_one_by_one(federation)
    go_on(grid, Path(str(settings["run-folder"])), federation)


def end_with_superexec() -> None:
    """End this process soon after the SuperExec that started it.

    Flower only interrupts it, and its threads then try for ten minutes and more to reach a server
    that is gone, while nobody else may go on with the run.
    """
    end_with_parent(os.getppid(), before=lambda: time.sleep(GRACE))
