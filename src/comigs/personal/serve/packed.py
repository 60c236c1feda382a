"""A client without its base, as a forward pass of many clients wants it.

`Attachment.bind` says what the experts of a client are; they are packed here, block by block. The
tensors that a client was read from are not kept, so a client takes as much memory as its tensors
do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.workplace import attach
from comigs.experts.attach import Attachment
from comigs.experts.packed import PackedExperts, PackedLora
from comigs.methods.loading import load_method
from comigs.personal.model import client_tensors
from comigs.runs.folder import RunFolder


@dataclass(frozen=True)
class PackedBlock:
    """One client in one block. attention: site -> LoRA."""

    experts: PackedExperts
    attention: Mapping[str, PackedLora]


@dataclass(frozen=True, eq=False)
class PackedClient:
    """One client's model without its base. number: of the client in its server, by which rows are
    ordered.
    """

    name: str
    number: int
    blocks: tuple[PackedBlock, ...]

    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size()
            for block in self.blocks
            for tensor in _tensors(block)
        )


def read_client(folder: RunFolder, client: str, base: Base, name: str, number: int) -> PackedClient:
    """Read a client's model from a run. The base must be free of other experts. Raises
    UserError.
    """
    config = folder.config()
    with attach(config, load_method(config), base) as attachment:
        attachment.bind(client_tensors(folder, client, base, attachment))
        return pack(attachment, name, number, base.dtype)


def pack(attachment: Attachment, name: str, number: int, dtype: torch.dtype) -> PackedClient:
    """Lay out the client that `attachment` is bound to. dtype: of the base."""
    blocks = []
    for mixture, adapted in zip(attachment.mixtures, attachment.attention, strict=True):
        loras = {site: lora.packed(dtype) for site, lora in adapted.items()}
        blocks.append(PackedBlock(mixture.packed(dtype), loras))
    return PackedClient(name, number, tuple(blocks))


def _tensors(block: PackedBlock) -> list[Tensor]:
    experts = block.experts
    found = [experts.A_in_RD, experts.B_SRI, experts.A_RI, experts.B_RD, experts.W_ED, experts.gate]
    found += experts.merged.values()
    for lora in block.attention.values():
        found += [lora.A, lora.B, lora.merged]
    return [tensor for tensor in found if tensor is not None]
