"""A client's tensors as a forward pass of many clients wants them: stacked once, scales multiplied
in.

`Attachment.bind` says what the experts of a client are; this file only lays them out. The tensors
that a client was read from are not kept, so a client takes as much memory as its tensors do.

D model width, I MLP width, E experts, R the LoRA ranks of all experts together, S inputs of the MLP
(up, or gate and up).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.experts.attach import Attachment
from comigs.experts.lora import LoraLinear
from comigs.experts.mixture import Mixture
from comigs.methods.loading import load_method
from comigs.personal.model import client_tensors
from comigs.runs.folder import RunFolder


@dataclass(frozen=True)
class PackedExperts:
    """The experts and the router of one client in one block.

    ranks: of each expert, or their sum where all are one expert (`BlockExperts.summed`).
    A_in_RD: of all inputs and experts, (S * R, D). B_SRI and B_RD have the scale of their
    expert in them. W_ED: the router, None: every expert weighs 1/E. gate, top_k, routed_by and
    merged are as in `BlockExperts`.
    """

    ranks: tuple[int, ...]
    A_in_RD: Tensor
    B_SRI: Tensor
    A_RI: Tensor
    B_RD: Tensor
    W_ED: Tensor | None
    gate: Tensor | None
    merged: Mapping[str, Tensor]
    top_k: int
    routed_by: str


@dataclass(frozen=True)
class PackedLora:
    """The LoRA of one client on one attention linear: A (R, in), B (R, out) with the scale in it;
    both may be None.
    """

    A: Tensor | None
    B: Tensor | None
    merged: Tensor | None


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
    summed = load_method(config).mixing == "sum"
    with Attachment(base.model, base.architecture, config.experts, summed) as attachment:
        attachment.bind(client_tensors(folder, client, base, attachment))
        return pack(attachment, name, number, base.dtype)


def pack(attachment: Attachment, name: str, number: int, dtype: torch.dtype) -> PackedClient:
    """Lay out the client that `attachment` is bound to. dtype: of the base."""
    blocks = []
    for mixture, adapted in zip(attachment.mixtures, attachment.attention, strict=True):
        loras = {site: _packed_lora(lora, dtype) for site, lora in adapted.items()}
        blocks.append(PackedBlock(_packed_experts(mixture, dtype), loras))
    return PackedClient(name, number, tuple(blocks))


def _packed_experts(mixture: Mixture, dtype: torch.dtype) -> PackedExperts:
    # What is trained and element-wise is computed in float32 (float64 where the base is), as in
    # `Mixture`.
    precise = torch.promote_types(dtype, torch.float32)
    own, inputs = mixture.bound, mixture.inputs
    ranks = tuple(expert.rank for expert in own.experts)
    A_in = torch.cat([expert.A[site] for site in inputs for expert in own.experts])
    B_in = torch.cat([expert.scale * expert.B[site].T for site in inputs for expert in own.experts])
    A_down = torch.cat([expert.A["down"] for expert in own.experts])
    B_down = torch.cat([expert.scale * expert.B["down"].T for expert in own.experts])
    return PackedExperts(
        ranks=(sum(ranks),) if own.summed else ranks,
        A_in_RD=A_in.to(dtype).contiguous(),
        B_SRI=B_in.to(precise).contiguous().unflatten(0, (len(inputs), -1)),
        A_RI=A_down.to(precise).contiguous(),
        B_RD=B_down.to(dtype).contiguous(),
        W_ED=_copy(own.W_ED),
        gate=_copy(own.gate),
        top_k=own.top_k,
        routed_by=own.routed_by,
        merged={site: tensor.to(dtype, copy=True) for site, tensor in own.merged.items()},
    )


def _packed_lora(lora: LoraLinear, dtype: torch.dtype) -> PackedLora:
    merged = None if lora.merged is None else lora.merged.to(dtype, copy=True)
    if lora.A is None or lora.B is None:
        return PackedLora(None, None, merged)
    return PackedLora(
        lora.A.to(dtype, copy=True), (lora.scale * lora.B.T).to(dtype).contiguous(), merged
    )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _tensors(block: PackedBlock) -> list[Tensor]:
    experts = block.experts
    found = [experts.A_in_RD, experts.B_SRI, experts.A_RI, experts.B_RD, experts.W_ED, experts.gate]
    found += experts.merged.values()
    for lora in block.attention.values():
        found += [lora.A, lora.B, lora.merged]
    return [tensor for tensor in found if tensor is not None]
