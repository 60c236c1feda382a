"""This module measures what the base alone scores on a text, once, and keeps it in the cache beside
the text's tokens.

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

from comigs import __version__, csrc
from comigs.client.client import Client
from comigs.client.evaluate import Measurement
from comigs.config import Split
from comigs.engines.client_task import measure_base
from comigs.files import write_whole


def cached_base_evaluation(client: Client, split: Split) -> Measurement:
    """Return what the base alone scores on a client's text, from the cache where it was measured in
    the same way on this machine.
    """
    # A file that cannot be read, or is damaged, is as good as none.
    path = client.config.data.cache / "base" / f"{_key(client, split)}.json"
    with suppress(OSError, ValueError, TypeError):
        nats, tokens, num_bytes = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(float(nats), int(tokens), int(num_bytes), None)

    # Where the cache cannot be written, it is measured again the next time.
    measured = measure_base(client, split)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([measured.nats, measured.tokens, measured.bytes])
        write_whole(path, lambda unfinished: Path(unfinished).write_text(text, encoding="utf-8"))
    return measured


def _key(client: Client, split: Split) -> str:
    """Return a hash of everything that the last bit of a measurement depends on."""
    base, config = client.base, client.config
    attention = base.model.config._attn_implementation
    device = str(base.device)
    if base.device.type == "cuda":
        device = torch.cuda.get_device_name(base.device)
    how = (device, attention, torch.get_num_threads(), csrc.way(base.device))
    versions = (torch.__version__, __version__)
    windows = (config.data.sequence_length, config.evaluation.batch_size)
    text = [store.tokens_sha256 for store in getattr(client.data, split)]
    everything = json.dumps([platform.node(), base.fingerprint, how, versions, windows, text])
    return hashlib.sha256(everything.encode()).hexdigest()
