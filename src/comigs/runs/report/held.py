"""How many tensors of each role a client holds: the headers of its safetensors files, without
loading any tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from comigs.errors import UserError
from comigs.runs.metrics import Amount
from comigs.slots import Slot


def held_by_role(run_folder: Path) -> dict[str, Amount]:
    """Role -> what all clients together hold by now; empty where there is no such file."""
    totals: dict[str, Amount] = defaultdict(Amount)
    for client in sorted((run_folder / "clients").glob("*")):
        files = [
            *sorted(client.glob("round-*.experts.safetensors")),
            *client.glob("personal.safetensors"),
        ]
        for name, amount in _header(files[-1]).items() if files else ():
            try:
                totals[Slot.parse(name).role] += amount
            except ValueError as error:
                raise UserError(f"{files[-1]}: {error}") from None
    return dict(totals)


def _header(path: Path) -> dict[str, Amount]:
    """Tensor name -> its amount. The file starts with 8 bytes of length (little endian), then that
    much JSON.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        offsets = {
            name: tensor["data_offsets"]
            for name, tensor in header.items()
            if name != "__metadata__"
        }
        return {name: Amount(slots=1, bytes=end - start) for name, (start, end) in offsets.items()}
    except FileNotFoundError:
        return {}  # a live run has just replaced it by the next round's
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
