"""One device of a run, and what a server may ask of it: a trainer without a socket."""

from __future__ import annotations

import json
import re
import struct

from comigs.bases.load import load_base
from comigs.federation.device.device_service import Device, Trainer
from comigs.federation.messages import ANSWERS, Refusal, Request, config_for, our_version
from comigs.server import wire
from comigs.slots import Slot
from tests.conftest import run_config

RUN = "run-0123456789ab"
ROOM = 1 << 24


DEPENDS_ON_TEXT = (  # figures of a line that a device keeps to itself
    "train_nats_per_token", "train_nats_per_token_by_step", "router_nats_per_token", "balance_loss",
    "trained_tokens", "generalist_share_by_layer", "expert_share_by_layer", "nats_per_token",
    "perplexity", "bits_per_byte", "tokens", "bytes", "seconds", "tokens_per_second",
    "peak_memory_bytes", "sent_nats_per_token", "sent_tokens",
)  # fmt: skip


class Setting:
    """One device of a run, and a server's requests to it."""

    def __init__(self, root, home="device", report=lambda event: None, device=None, **tree):
        self.root, self.said = root, []
        self.config = run_config(root, **tree)
        self.fingerprint = load_base(self.config.base).fingerprint
        given = {
            "name": "ada",
            "text": "ada",
            "home": root / home,
            "root": root,
            "accelerator": "cpu",
            "threads": 1,
        }
        self.device = Device(**{**given, **(device or {})})
        self.report = report
        self.trainer = self.restarted()

    def restarted(self):
        """The trainer as it is after its process was killed."""
        return Trainer(self.device, self.said.append, self.report)

    @property
    def folder(self):
        return self.device.home / "runs" / RUN

    def request(self, round=1, download=None, kind="exchange", **changes):
        last = round > self.config.rounds
        task = {
            "evaluate": ("valid", "test") if last else (),
            "evaluate_base": ("valid", "test") if round == 1 else (),
        }
        before = {"after": round - 1, "since": round - 1}
        told = {
            "config": config_for(self.config, "ada"),
            "comigs": our_version(),
            "base": self.fingerprint,
        }
        values = {"run": RUN, "round": round, "train": not last, **before, **task, **told}
        encoded = wire.encode_download(download or {}, self.config.upload.format)
        return wire.pack(Request(kind=kind, **{**values, **changes}), encoded)

    def ask(self, *given, **changes):
        return opened(self.trainer.answer(self.request(*given, **changes)))

    def refused(self, *given, **changes):
        """The code, after having seen that nothing else went out."""
        raw = self.trainer.answer(self.request(*given, **changes))
        refusal, tensors = opened(raw)
        assert isinstance(refusal, Refusal) and not tensors
        assert str(self.root).encode() not in raw and len(raw) < 250
        return refusal.code

    def finish(self):
        """The rest of the run, each download the upload before."""
        given = {}
        for round in range(1, self.config.rounds + 2):
            head, given = self.ask(round, {Slot.parse(s): t for s, t in given.items()})
        return head


def opened(raw):
    return wire.unpack(raw, ANSWERS, ROOM)


def lying(raw, **fields):
    """A request with other values in its head, which our own Request would not hold."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    head = json.loads(header["__metadata__"]["comigs"])
    header["__metadata__"]["comigs"] = json.dumps(head | fields)
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + raw[8 + length :]


def require_unsaid(folder, wire):
    """Find none of the figures that a device keeps of its run in these bytes, however written."""
    kept = []
    for name in ("metrics.jsonl", "timings.jsonl"):
        kept += [json.loads(line) for line in (folder / name).read_text().splitlines()]
    figures = set()
    for line in kept:
        values = json.dumps([line.get(name) for name in DEPENDS_ON_TEXT])
        figures |= set(re.findall(r"[0-9.e-]{4,}", values))  # as they would be written
    assert len(figures) > 20, len(figures)  # its owner has them all
    for figure in figures:
        assert figure[:7].encode() not in wire, figure
        assert struct.pack("<d", float(figure)) not in wire
        assert struct.pack("<f", float(figure)) not in wire
