"""What the base alone scores on a text: measured once, and kept in the cache beside the text's
tokens.

The base does not change, so clients with the same text, and all runs of a sweep, share one
measurement.
"""

from __future__ import annotations

import hashlib
import json
import platform
from contextlib import suppress
from pathlib import Path

import torch

from comigs.client.client import Client
from comigs.client.evaluate import Measurement
from comigs.config import Split
from comigs.engines.client_task import of_the_base
from comigs.files import write_whole


def base_figures(client: Client, split: Split) -> Measurement:
    """The base alone on a client's text, from the cache where it was measured in the same way on
    this machine.
    """
    path = client.config.data.cache / "base" / f"{_key(client, split)}.json"
    with suppress(OSError, ValueError, TypeError):
        nats, tokens, num_bytes = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(float(nats), int(tokens), int(num_bytes), None)
    measured = of_the_base(client, split)
    with suppress(OSError):  # then it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([measured.nats, measured.tokens, measured.bytes])
        write_whole(path, lambda unfinished: Path(unfinished).write_text(text, encoding="utf-8"))
    return measured


def _key(client: Client, split: Split) -> str:
    """Everything that the last bit of it depends on."""
    base, config = client.base, client.config
    how = (
        str(base.device),
        base.model.config._attn_implementation,
        torch.get_num_threads(),
        torch.__version__,
    )
    windows = (config.data.sequence_length, config.evaluation.batch_size)
    text = [store.tokens_sha256 for store in getattr(client.data, split)]
    return hashlib.sha256(
        json.dumps([platform.node(), base.fingerprint, how, windows, text]).encode()
    ).hexdigest()
