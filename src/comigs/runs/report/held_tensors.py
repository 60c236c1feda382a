"""How many tensors of each role clients hold, from the headers of their safetensors files.

No tensor is loaded.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from comigs.errors import UserError
from comigs.runs.metrics import Amount
from comigs.slots import Slot


def held_by_role(run_folder: Path) -> dict[str, Amount]:
    """Return role -> what all clients together hold by now; it is empty where there is no file.

    Raises UserError that names a file that cannot be read.
    """
    totals: dict[str, Amount] = defaultdict(Amount)
    for client in sorted((run_folder / "clients").glob("*")):
        # The personal model of a finished run goes before what is left of its rounds.
        files = sorted(client.glob("round-*.experts.safetensors"))
        files += client.glob("personal.safetensors")
        if not files:
            continue
        for name, amount in _header(files[-1]).items():
            try:
                totals[Slot.parse(name).role] += amount
            except ValueError as error:
                raise UserError(f"{files[-1]}: {error}") from None
    return dict(totals)


def _header(path: Path) -> dict[str, Amount]:
    """Return tensor name -> its amount."""
    # The file starts with 8 bytes of length (little endian), then that much JSON.
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        amounts = {}
        for name, tensor in header.items():
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                amounts[name] = Amount(slots=1, bytes=end - start)
        return amounts
    except FileNotFoundError:
        return {}  # a live run has just replaced it by the next round's
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
