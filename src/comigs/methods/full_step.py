"""A server's step on attention LoRA that is as long as its clients' own steps are on average.

The mean of steps that differ is shorter than they are: of n that have nothing in common by sqrt(n).
Attention LoRA, which every client takes whole, then learns as much more slowly than at home. Ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Download, Memory, RoundContext, Upload
from comigs.slots import Slot


def mean_with_full_attention(
    uploads: Mapping[str, Upload], memory: Memory, context: RoundContext
) -> tuple[dict[str, Download], Memory]:
    """Return the mean of uploads, where B of attention LoRA goes on to the length of own steps.

    The direction is the mean's. A stays the mean, as its start is unknown here. memory: each B of
    attention LoRA as it was sent last; before that, it was zero.
    """
    means, _ = mean_of_uploads(uploads, {}, context)
    if not uploads:
        return means, memory
    # The direction is that of the mean, from what everybody was sent last.
    download = dict(means[context.clients[0]])
    steps, last = {}, {}
    for slot, mean in download.items():
        if slot.role == "attention" and slot.matrix == "B":
            last[slot] = memory.get(str(slot), torch.zeros_like(mean)).to(mean)
            steps[slot] = (mean - last[slot]).to(torch.float64)

    # How far each client went by itself, slot by slot: uploads are looked at one after the other.
    lengths = dict[Slot, list[float]]((slot, []) for slot in steps)
    for upload in uploads.values():
        for slot, sent_last in last.items():
            step = (upload[slot] - sent_last).to(torch.float64)
            lengths[slot].append(float(step.norm()))
    # The mean step is made as long as theirs; where they agree, it is that already.
    for slot, step in steps.items():
        short = float(step.norm())
        if short > 0:
            further = math.fsum(lengths[slot]) / len(uploads) / short - 1
            download[slot] = (download[slot] + further * step).to(download[slot])
    sent = {str(slot): download[slot] for slot in steps}
    return dict.fromkeys(context.clients, download), sent
