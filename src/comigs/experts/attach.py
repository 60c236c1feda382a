"""This module puts experts on a frozen base from outside, and takes them off leaving it identical.

The base stays an untouched `transformers` model: its own forward pass and `generate()` with KV
cache run through the mixtures. One attachment serves all clients of a process: `bind` moves
references, it copies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from comigs.bases.base import Architecture, linear_size
from comigs.config import ExpertShape, ExpertsSection
from comigs.experts.block import quicker_modules
from comigs.experts.lora import LoraLinear
from comigs.experts.mixture import BlockExperts, Expert, Lora, Mixture
from comigs.experts.recompute import recomputed
from comigs.experts.router import Routing
from comigs.experts.token import linear_in_c
from comigs.methods import lowrank
from comigs.slots import OTHERS, Slot, expert_parts, experts_of

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A layout says how a method puts a client's LoRA together.

    summed: they are one expert, the sum of all. on_top, beside_others: as of `Method`; what a
    client sends of its experts has the scale that it has beside the others' expert.
    """

    summed: bool = False
    on_top: bool = False
    beside_others: bool = False


class Attachment:
    """An attachment is a mixture in place of every MLP, and LoRA on every attention linear.

    It is on `model` until `detach()`, or until it ends as a context. Where it is to `recompute`,
    training keeps of each block what goes in.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        settings: ExpertsSection,
        layout: Layout = Layout(),
        recompute: bool = False,
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.settings = settings
        self.layout = layout
        self.mixtures: list[Mixture] = []
        self.attention: list[dict[str, LoraLinear]] = []
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._quickened: list[nn.Module] = []
        self._is_laid_out = False
        # Modules are replaced on the model itself, and remembered, so that `detach` can undo it.
        blocks = model.get_submodule(architecture.blocks)
        for block in blocks:
            mixture = Mixture(block.get_submodule(architecture.mlp), architecture)
            self._replace(block, architecture.mlp, mixture)
            self.mixtures.append(mixture)
            adapted = {}
            for site, path in architecture.attention.items():
                adapted[site] = LoraLinear(block.get_submodule(path))
                self._replace(block, path, adapted[site])
            self.attention.append(adapted)
        for module, compute in quicker_modules(model, self.attention, architecture.blocks):
            self._quickened.append(module)
            module.forward = compute
        if recompute:
            for block, mixture in zip(blocks, self.mixtures, strict=True):
                self._quickened.append(block)
                block.forward = partial(recomputed, block.forward, mixture)

    def _replace(self, block: nn.Module, path: str, new: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def slot_shapes(
        self, shape: ExpertShape, routed: bool, merges: bool = False
    ) -> dict[Slot, Dims]:
        """Return the shape of every tensor of a client with these experts, by its slot.

        Where `routed`, a client that has a choice has a router. Where it `merges`, it has a frozen
        change of every adapted linear.
        """
        shapes: dict[Slot, Dims] = {}
        sizes: dict[tuple[int, str], tuple[int, int]] = {}
        for layer, (mixture, adapted) in enumerate(zip(self.mixtures, self.attention, strict=True)):
            # Each expert adapts every linear of the MLP, and attention has one LoRA for all.
            for site, name in self.architecture.mlp_linears().items():
                sizes[layer, site] = linear_size(getattr(mixture.mlp, name))
            for part in shape.parts:
                rank = shape.rank_of(part)
                for site in self.architecture.mlp_linears():
                    shapes |= _pair(layer, site, part, rank, sizes[layer, site])
            for site, lora in adapted.items():
                sizes[layer, site] = linear_size(lora.linear)
                rank = shape.attention_rank
                shapes |= _pair(layer, site, "attention", rank, sizes[layer, site])
            # A single expert leaves a router nothing to choose.
            if routed and shape.num_experts > 1:
                width = 1 if self.settings.routing == "client" else sizes[layer, "up"][0]
                shapes[Slot(layer, "mlp", "router", "W")] = (shape.num_experts, width)
                if shape.others == "gated":
                    shapes[Slot(layer, "mlp", "router", "B")] = (1,)
        if merges:
            for (layer, site), (width_in, width_out) in sizes.items():
                shapes[Slot(layer, site, "merged", "W")] = (width_out, width_in)
        return shapes

    def bind(self, tensors: Mapping[Slot, Tensor], opening: Tensor | None = None) -> None:
        """Point the mixtures at a client's tensors, which decide experts, ranks and routing.

        opening: (E,) how far the router is open to each expert, from 0 to 1; None: to all.
        """
        self._is_laid_out = False
        names = {slot.part for slot in tensors if slot.role in ("generalist", "specialist", OTHERS)}
        generalists = sum(name.startswith("g") for name in names)
        specialists = sum(name.startswith("s") for name in names)
        # All blocks have the same experts, in the order in which a router's rows are.
        beside_others = self.layout.beside_others or OTHERS in names
        experts = self.experts_of(expert_parts(generalists, specialists, beside_others))
        for layer, (mixture, adapted) in enumerate(zip(self.mixtures, self.attention, strict=True)):
            mixture.bind(replace(self._block_experts(tensors, layer, experts), opening=opening))
            for site, lora in adapted.items():
                lora.A = tensors.get(Slot(layer, site, "attention", "A"))
                lora.B = tensors.get(Slot(layer, site, "attention", "B"))
                lora.merged = tensors.get(Slot(layer, site, "merged", "W"))
                lora.one_token = None
                if lora.A is not None:
                    lora.scale = self.settings.scale(len(lora.A))

    def experts_of(self, parts: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the experts that these parts make, in the router's order; one where `summed`."""
        return [tuple(parts)] if self.layout.summed and parts else experts_of(parts)

    def lay_out(self) -> None:
        """Lay the client's tensors out in C for reading one token at a time without gradients.

        They must not change until the next `bind`, which forgets what was laid out. Whatever else
        is read, and what C is not written for, is computed as before.
        """
        if self._is_laid_out:
            return
        self._is_laid_out, dtype = True, self.model.dtype
        for mixture, adapted in zip(self.mixtures, self.attention, strict=True):
            mixture.lay_out(dtype)
            for lora in adapted.values():
                lora.one_token = linear_in_c(lora.linear, dtype, lora.packed(dtype))

    def _block_experts(
        self, tensors: Mapping[Slot, Tensor], layer: int, experts: Sequence[Sequence[str]]
    ) -> BlockExperts:
        sites = self.architecture.mlp_linears()
        router = tensors.get(Slot(layer, "mlp", "router", "W"))
        # A strength is part of the scale, so that the mixture knows one factor of a LoRA only.
        bound, merged, ranks = [], {}, {}
        for part in {part for parts in experts for part in parts}:
            if (slot := Slot(layer, "down", part, "A")) in tensors:
                ranks[part] = len(tensors[slot])
        for parts in experts:
            if not ranks.keys() & set(parts):
                continue
            loras = []
            for part in parts:
                A = {site: tensors[Slot(layer, site, part, "A")] for site in sites}
                B = {site: tensors[Slot(layer, site, part, "B")] for site in sites}
                scale = self.scale(part, experts, ranks, routed=router is not None)
                loras.append(Lora(A, B, scale))
            bound.append(Expert(loras))
        for site in sites:
            slot = Slot(layer, site, "merged", "W")
            if slot in tensors:
                merged[site] = tensors[slot]
        return BlockExperts(
            experts=bound,
            merged=merged,
            W_ED=router,
            gate=tensors.get(Slot(layer, "mlp", "router", "B")),
            top_k=self.settings.top_k,
            routed_by=self.settings.routing,
        )

    def scale(
        self, part: str, experts: Sequence[Sequence[str]], ranks: Mapping[str, int], routed: bool
    ) -> float:
        """Return the factor of a part's LoRA among these experts. ranks: by part.

        Beside the others' expert all have one scale, by which everybody's generalists are the same
        at every client: that of its generalists, and where specialists are on top, of them with one
        specialist as [experts] has it, however many of what rank a client has.
        """
        rank, sharing = ranks[part], len(experts)
        if self.layout.summed:
            sharing = len(ranks)
        elif (OTHERS,) in experts:
            generalists = [part for part in experts[0] if part.startswith("g")]
            rank, sharing = sum(ranks[part] for part in generalists), 1
            if self.layout.on_top and self.settings.specialists:
                rank += self.settings.specialist_rank
        if routed:
            sharing = min(self.settings.top_k, sharing)
        scale = self.settings.scale(rank)
        if self.settings.strength != "together" or sharing <= 1:
            return scale
        return scale * lowrank.joint_strength(sharing, self.layout.summed)

    def unbind(self) -> None:
        """Point at nobody's tensors, which leaves the base alone."""
        self.bind({})

    def routings(self, tokens: Tensor | None = None) -> list[Routing]:
        """Return each block's decision in the last forward pass; nothing without a router.

        tokens: the numbers of those it is for; None: all.
        """
        return [m.routing.of(tokens) for m in self.mixtures if m.routing is not None]

    def detach(self) -> None:
        """Put the base's own modules back, as if nothing had ever been attached."""
        while self._quickened:
            del self._quickened.pop().forward  # the class has its own
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)

    def __enter__(self) -> Attachment:
        """Return the attachment, which is on the model already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the experts off."""
        self.detach()


def _pair(layer: int, site: str, part: str, rank: int, size: tuple[int, int]) -> dict[Slot, Dims]:
    return {
        Slot(layer, site, part, "A"): (rank, size[0]),
        Slot(layer, site, part, "B"): (size[1], rank),
    }
