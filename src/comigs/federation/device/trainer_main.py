"""This module is the resident trainer as a program: it prints what its owner should know, and
answers until it is stopped.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from comigs.errors import UserError
from comigs.federation.device.device_service import Device, Trainer
from comigs.federation.device.trainer_socket import key_beside, serve
from comigs.federation.security.private_files import make_private
from comigs.runs.metrics import Event, Step

EVERY = 10.0  # seconds between lines about steps
DEVICES: TypeAdapter[Device] = TypeAdapter(Device)


def main() -> None:
    """Serve `SOCKET FILE`: a Trainer at this socket, of the device that the file describes (as
    JSON).
    """
    socket, device = Path(sys.argv[1]), DEVICES.validate_json(Path(sys.argv[2]).read_bytes())
    steps = Steps()
    # What libraries write for themselves, as torch does, stays in the device's folder, too.
    scratch = device.home / "tmp"
    make_private(scratch)
    os.environ["TMPDIR"], tempfile.tempdir = str(scratch), str(scratch)
    try:
        answer = Trainer(device, say=print, report=steps.show).answer
        serve(socket, key_beside(socket), answer, lambda: device.limits.message)
    except UserError as error:
        print(error, flush=True)
        sys.exit(os.EX_NOPERM)  # our last line is for people


@dataclass
class Steps:
    """Steps are shown now and then, not each of them."""

    shown: float = 0.0

    def show(self, event: Event) -> None:
        """Print an event of the trainer where it is a step, and the last line is a while ago."""
        if isinstance(event, Step) and time.monotonic() > self.shown + EVERY:
            self.shown = time.monotonic()
            nats = f"{event.nats_per_token:.3f} nats/token"
            print(f"round {event.round}, step {event.step}: {event.level} {nats}", flush=True)
