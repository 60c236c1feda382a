"""Experts put on a frozen base from outside, pointed at any client's tensors, and taken off leaving
it identical.

The base stays an untouched `transformers` model: its own forward pass and `generate()` with KV
cache run through the mixtures. One attachment serves all clients of a process: `bind` moves
references, it copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from comigs.bases.base import Architecture, linear_size
from comigs.config import ExpertShape, ExpertsSection
from comigs.experts.lora import LoraLinear
from comigs.experts.mixture import Expert, Mixture
from comigs.experts.router import Routing
from comigs.methods import lowrank
from comigs.slots import Slot, expert_parts


class Attachment:
    """Mixtures in place of every MLP and LoRA on every attention linear of `model`. Use as a
    context, or `detach()`.
    """

    def __init__(
        self, model: Any, architecture: Architecture, settings: ExpertsSection, summed: bool = False
    ) -> None:
        """summed: a client's experts are one expert, whose LoRA is the sum of theirs."""
        self.model = model
        self.summed = summed
        self.architecture = architecture
        self.settings = settings
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        self.mixtures: list[Mixture] = []
        self.attention: list[dict[str, LoraLinear]] = []
        for block in model.get_submodule(architecture.blocks):
            mixture = Mixture(block.get_submodule(architecture.mlp), architecture)
            self._replace(block, architecture.mlp, mixture)
            self.mixtures.append(mixture)
            adapted = {}
            for site, path in architecture.attention.items():
                adapted[site] = LoraLinear(block.get_submodule(path))
                self._replace(block, path, adapted[site])
            self.attention.append(adapted)

    def _replace(self, block: nn.Module, path: str, new: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def slot_shapes(
        self, shape: ExpertShape, routed: bool, merges: bool = False
    ) -> dict[Slot, tuple[int, ...]]:
        """Every tensor of a client with these experts.

        routed: with a router, where it has a choice. merges: with a frozen change of every adapted
        linear.
        """
        shapes: dict[Slot, tuple[int, ...]] = {}
        for layer, (mixture, adapted) in enumerate(zip(self.mixtures, self.attention, strict=True)):
            for part in shape.parts:
                for site, name in self.architecture.mlp_linears().items():
                    size = linear_size(getattr(mixture.mlp, name))
                    shapes |= _pair(
                        layer,
                        site,
                        part,
                        shape.specialist_rank if part.startswith("s") else shape.rank,
                        size,
                    )
            for site, lora in adapted.items():
                shapes |= _pair(
                    layer, site, "attention", shape.attention_rank, linear_size(lora.linear)
                )
            if routed and shape.num_experts > 1:
                width = linear_size(getattr(mixture.mlp, self.architecture.up))[0]
                width = 1 if self.settings.routing == "client" else width
                shapes[Slot(layer, "mlp", "router", "W")] = (shape.num_experts, width)
                if shape.others == "gated":
                    shapes[Slot(layer, "mlp", "router", "B")] = (1,)
        if merges:
            sizes = {(s.layer, s.site): dims for s, dims in shapes.items() if s.matrix == "A"}
            outs = {(s.layer, s.site): dims[0] for s, dims in shapes.items() if s.matrix == "B"}
            shapes |= {Slot(*at, "merged", "W"): (outs[at], dims[1]) for at, dims in sizes.items()}
        return shapes

    def bind(self, tensors: Mapping[Slot, Tensor]) -> None:
        """Point the mixtures at a client's tensors; what they hold decides experts, ranks and
        routing.
        """
        has = {
            role: {s.part for s in tensors if s.role == role}
            for role in ("generalist", "specialist", "rest")
        }
        parts = expert_parts(len(has["generalist"]), len(has["specialist"]), bool(has["rest"]))
        sites = list(self.architecture.mlp_linears())
        for layer, (mixture, adapted) in enumerate(zip(self.mixtures, self.attention, strict=True)):
            router = tensors.get(Slot(layer, "mlp", "router", "W"))
            strength = self._strength(len(parts) - len(has["rest"]), routed=router is not None)
            mixture.summed = self.summed
            mixture.experts = [
                Expert(
                    {site: tensors[Slot(layer, site, part, "A")] for site in sites},
                    {site: tensors[Slot(layer, site, part, "B")] for site in sites},
                    strength * self.settings.scale(len(tensors[Slot(layer, sites[0], part, "A")])),
                )
                for part in parts
            ]
            mixture.merged = {
                site: tensors[slot]
                for site in sites
                if (slot := Slot(layer, site, "merged", "W")) in tensors
            }
            mixture.routed_by = self.settings.routing
            mixture.W_ED = router
            mixture.open = tensors.get(Slot(layer, "mlp", "router", "B"))
            mixture.top_k = self.settings.top_k
            mixture.routing = None
            for site, lora in adapted.items():
                lora.A, lora.B = (
                    tensors.get(Slot(layer, site, "attention", "A")),
                    tensors.get(Slot(layer, site, "attention", "B")),
                )
                lora.merged = tensors.get(Slot(layer, site, "merged", "W"))
                if lora.A is not None:
                    lora.scale = self.settings.scale(len(lora.A))

    def _strength(self, num_experts: int, routed: bool) -> float:
        """Of each of a client's own experts. The rest of the world is no part of its budget, and
        not always asked.
        """
        sharing = min(self.settings.top_k, num_experts) if routed else num_experts
        together = self.settings.strength == "together" and sharing > 1
        return lowrank.joint_strength(sharing, self.summed) if together else 1.0

    def unbind(self) -> None:
        """Point at nobody's tensors: the base alone."""
        self.bind({})

    def routings(self) -> list[Routing]:
        """Each block's decision in the last forward pass; empty without a router."""
        return [m.routing for m in self.mixtures if m.routing is not None]

    def detach(self) -> None:
        """Put the base's own modules back, as if nothing had ever been attached."""
        while self._undo:
            owner, name, original = self._undo.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _pair(
    layer: int, site: str, part: str, rank: int, size: tuple[int, int]
) -> dict[Slot, tuple[int, ...]]:
    return {
        Slot(layer, site, part, "A"): (rank, size[0]),
        Slot(layer, site, part, "B"): (size[1], rank),
    }
