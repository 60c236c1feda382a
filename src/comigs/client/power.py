"""A client's power changes between rounds: it gains a specialist, or loses one.

What it gains does not change its model's function at that moment: the new expert's routing weight
is 0 and opens over the steps of the next round (docs/decisions/0025). What it loses is, in each
block, the specialist that its own valid uses least; the others are weighed among themselves.
Optimiser moments and rows of the router follow. Everything is done to the saved state, as one that
was never at work goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from comigs.client.client import Client
from comigs.client.state import MOMENTS, ClientState
from comigs.client.workplace import Workplace
from comigs.config import Config, ExpertShape
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import Method
from comigs.slots import OTHERS, Slot, num_specialists

Shares = Sequence[Sequence[float]]  # (L, E): the mean routing weight of each expert, by block
Tables = dict[str, dict[Slot, Tensor]]  # the tensors, and each of AdamW's figures of them
VALUES = "values"


def with_specialists(client: Client, number: int | None) -> Client:
    """Return the client with that many specialists, one that is new as closed as it must be.

    number: None where that never changes. A client whose method makes something else of its experts
    stays as it is.
    """
    shape, config = client.shape, client.config
    if number in (None, shape.specialists) or not keeps_specialists(config, client.method):
        return client
    assert number is not None
    shares: Shares = []
    if shape.num_experts > 1:
        shares = client.evaluate("valid").expert_share_LE or []

    # One comes or goes at a time; those that have just come are used by nobody yet.
    state = client.state()
    for now in range(shape.specialists, number):
        grown = shape.model_copy(update={"specialists": now + 1})
        slots = client.attachment.slot_shapes(grown, True, client.method.merges)
        router_start = config.experts.router_start
        start = starting_tensors(slots, config.seed, client.name, router_start)
        before = shape.model_copy(update={"specialists": now})
        state = gained(state, before, shares, start)
        if grown.num_experts > before.num_experts:
            new = row_of(grown, now)
            shares = [[*row[:new], 0.0, *row[new:]] for row in shares]
    for now in range(shape.specialists, number, -1):
        before = shape.model_copy(update={"specialists": now})
        state = lost(state, before, shares)
        shares = [without_least(row, before) for row in shares]

    # Experts that share a token's weight have another scale than one that has it alone.
    after = shape.model_copy(update={"specialists": number})
    factor = scale_of(client.attachment, shape) / scale_of(client.attachment, after)
    place = Workplace(config, client.method, client.base, client.attachment)
    budget = client.shared.budget if client.shared else None
    state = rescaled(state, factor)
    changed = Client(client.name, place, client.data, state, budget, client.seed)
    changed.is_trainer, changed.adopted_share = client.is_trainer, client.adopted_share
    # The best round so far is on the disk, if anywhere, and counts where there is room for it.
    if client.best and num_specialists(client.best.tensors()) <= number:
        changed.best = client.best
    if after.num_experts > shape.num_experts:
        changed.opening = torch.ones(after.num_experts, device=client.base.device)
        new = row_of(after, number) - (after.num_experts - shape.num_experts)
        changed.opening[new : row_of(after, number)] = 0
    return changed


def row_of(shape: ExpertShape, specialist: int) -> int:
    """Return the row of the router that a specialist has, which is on top of generalists or not."""
    return specialist if shape.others != "none" else shape.generalists + specialist


def scale_of(attachment: Attachment, shape: ExpertShape) -> float:
    """Return the scale of a client's first expert with these experts."""
    ranks = {part: shape.rank_of(part) for part in shape.parts}
    first, routed = shape.parts[0], shape.num_experts > 1
    return attachment.scale(first, shape.experts, ranks, routed)


def keeps_specialists(config: Config, method: Method) -> bool:
    """Return whether a client's specialists are experts of their own with this method."""
    entry = config.clients[0]
    shapes = []
    for number in (1, 2):
        numbered = entry.model_copy(update={"specialists": number})
        shapes.append(method.shape(config.shape_of(numbered)).specialists)
    return method.mixing == "routed" and shapes == [1, 2]


def gained(
    state: ClientState, shape: ExpertShape, shares: Shares, start: Mapping[Slot, Tensor]
) -> dict[str, Mapping[str, Tensor]]:
    """Return the state of a client with one specialist more, the last.

    It is a copy of the specialist that the block uses most. shape: as it is now. shares: as valid
    says; empty where there is no router. start: what a client of one specialist more starts from,
    whose row of the router tells the copy apart, and which the first specialist of all is.
    """
    tables, new = _tables(state), f"s{shape.specialists}"
    for layer in sorted({slot.layer for slot in tables[VALUES]}):
        model = _most_used(shape, shares, layer)
        for name, table in tables.items():
            for slot in [slot for slot in table if slot.layer == layer]:
                if slot.part == model:
                    table[replace(slot, part=new)] = table[slot].clone()
            if name == VALUES and model is None:
                table |= {s: t.clone() for s, t in start.items() if _is_of(s, layer, new)}

        # The new row is that of the copied expert, told apart by the row of a new client.
        router = Slot(layer, "mlp", "router", "W")
        if router not in tables[VALUES]:
            tables[VALUES][router] = start[router].clone()
            continue
        # Beside the others, generalists alone were an expert already: the specialist joins it.
        if len(tables[VALUES][router]) == len(start[router]):
            continue
        new_row = row_of(shape, shape.specialists)
        for name in (VALUES, *MOMENTS):
            if router not in tables[name]:
                continue
            W_ED = tables[name][router]
            row_D = torch.zeros_like(W_ED[0])
            if model is not None:
                row_D = W_ED[row_of(shape, int(model[1:]))]
            if name == VALUES:
                row_D = row_D + start[router][new_row].to(row_D)
            tables[name][router] = torch.cat([W_ED[:new_row], row_D[None], W_ED[new_row:]])
    return _state(state, tables)


def lost(state: ClientState, shape: ExpertShape, shares: Shares) -> dict[str, Mapping[str, Tensor]]:
    """Return the state of a client without the specialist that each block uses least.

    shape: as it is now. shares: (L, E) mean routing weights, as valid says.
    """
    tables = _tables(state)
    after = shape.model_copy(update={"specialists": shape.specialists - 1})
    for layer in sorted({slot.layer for slot in tables[VALUES]}):
        gone = least_used(shares[layer], shape)
        for name, table in tables.items():
            # Those behind it move up, so that the last name becomes free.
            for number in range(gone, shape.specialists):
                for slot in [slot for slot in table if _is_of(slot, layer, f"s{number}")]:
                    tensor = table.pop(slot)
                    if number > gone:
                        table[replace(slot, part=f"s{number - 1}")] = tensor
            router = Slot(layer, "mlp", "router", "W")
            if router not in table:
                continue
            # A single expert has no router, and generalists remain an expert beside the others.
            if after.num_experts == 1:
                del table[router]
            elif after.num_experts < shape.num_experts and name in (VALUES, *MOMENTS):
                row = row_of(shape, gone)
                W_ED = table[router]
                table[router] = torch.cat([W_ED[:row], W_ED[row + 1 :]])
    return _state(state, tables)


def rescaled(state: ClientState, factor: float) -> dict[str, Mapping[str, Tensor]]:
    """Return a state whose experts' B are so many times as large, as an expert's scale is as much
    smaller then.

    AdamW's moments follow: the gradient of a B that is larger is smaller.
    """
    if factor == 1:
        return dict(state)
    tables = _tables(state)
    powers = {VALUES: factor, "exp_avg": 1 / factor, "exp_avg_sq": 1 / factor**2}
    for name, power in powers.items():
        for slot, tensor in tables[name].items():
            if slot.role in ("generalist", "specialist", OTHERS) and slot.matrix == "B":
                tables[name][slot] = tensor * power
    return _state(state, tables)


def least_used(shares_E: Sequence[float], shape: ExpertShape) -> int:
    """Return which specialist of a block has the least routing weight, from 0."""
    own = _of_specialists(shares_E, shape)
    return own.index(min(own))


def without_least(shares_E: Sequence[float], shape: ExpertShape) -> list[float]:
    """Return the shares of a block's experts without the specialist that has the least."""
    gone = row_of(shape, least_used(shares_E, shape))
    return [*shares_E[:gone], *shares_E[gone + 1 :]]


def _of_specialists(shares_E: Sequence[float], shape: ExpertShape) -> list[float]:
    first = row_of(shape, 0)
    return list(shares_E[first : first + shape.specialists])


def _most_used(shape: ExpertShape, shares: Shares, layer: int) -> str | None:
    """Return the part of the specialist that a block uses most; None where there is none."""
    if shape.specialists == 0:
        return None
    if not shares:
        return "s0"
    own = _of_specialists(shares[layer], shape)
    return f"s{own.index(max(own))}"


def _is_of(slot: Slot, layer: int, part: str) -> bool:
    return slot.layer == layer and slot.part == part


def _tables(state: ClientState) -> Tables:
    """Return the tensors of a saved state by slot, and what AdamW holds of them, by its name."""
    tables: Tables = {VALUES: {Slot.parse(name): t for name, t in state["experts"].items()}}
    tables |= {name: {} for name in (*MOMENTS, "step")}
    for name, tensor in state["optimizer"].items():
        slot, slash, kind = name.rpartition("/")
        if slash:
            tables[kind][Slot.parse(slot)] = tensor
    return tables


def _state(state: ClientState, tables: Tables) -> dict[str, Mapping[str, Tensor]]:
    """Return a saved state with other tensors, and all else as it was."""
    optimizer = {name: t for name, t in state["optimizer"].items() if "/" not in name}
    for kind in (*MOMENTS, "step"):
        optimizer |= {f"{slot}/{kind}": tensor for slot, tensor in tables[kind].items()}
    experts = {str(slot): tensor for slot, tensor in tables[VALUES].items()}
    return {**state, "experts": experts, "optimizer": optimizer}
