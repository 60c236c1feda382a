"""A client's train state is made here, saved as named tensors, and loaded again to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from comigs.config import ClientSection, ExpertShape
from comigs.data.sampling import Level
from comigs.errors import UserError
from comigs.slots import Slot, num_specialists

LEVELS: tuple[Level, ...] = get_args(Level)
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's means of gradients and of their squares
KEPT = (*MOMENTS, "step")  # what AdamW holds of each tensor that it has stepped
ClientState = Mapping[str, Mapping[str, Tensor]]  # a part of STATE -> tensors by name
# The parts of a saved client, each a path in its run; those of the best round come later, if ever,
# and what is sent is a part of its own only where it is private.
STATE = ("experts", "optimizer", "best", "score", "shared", "shared_optimizer")


@dataclass
class TrainState:
    """A train state is what training changes of a client.

    tensors: every tensor of the client, float32. optimizers: one AdamW for each level that has
    tensors. local_steps, router_steps: steps done so far, over the whole run.
    """

    tensors: dict[Slot, Tensor]
    optimizers: dict[Level, torch.optim.AdamW]
    local_steps: int = 0
    router_steps: int = 0

    def of(self, level: Level) -> list[Tensor]:
        """Return the tensors that a level trains, in slot order. What is merged is nobody's."""
        trained = []
        for slot, tensor in sorted(self.tensors.items()):
            is_routers = slot.role == "router"
            if slot.role != "merged" and is_routers == (level == "router"):
                trained.append(tensor)
        return trained


def new_train_state(tensors: dict[Slot, Tensor], settings: ClientSection) -> TrainState:
    """Return a train state of these tensors with fresh optimisers, one AdamW for each level."""
    state = TrainState(tensors, {})
    for level in LEVELS:
        params = state.of(level)
        if params:
            # the rate here is of no consequence: each step sets its own
            state.optimizers[level] = torch.optim.AdamW(
                params, lr=1.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
            )
    return state


def saved_state(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return what training goes on from.

    "experts" has the tensors by slot. "optimizer" has both levels' moments and the step counts.
    """
    slots = {id(tensor): slot for slot, tensor in state.tensors.items()}
    optimizer_state = {
        "local_steps": torch.tensor(state.local_steps),
        "router_steps": torch.tensor(state.router_steps),
    }
    for optimizer in state.optimizers.values():
        for param, values in optimizer.state.items():
            for key in KEPT:
                optimizer_state[f"{slots[id(param)]}/{key}"] = values[key]
    experts = {str(slot): tensor for slot, tensor in state.tensors.items()}
    return {"experts": experts, "optimizer": optimizer_state}


def load_state(state: TrainState, saved: ClientState, client: str) -> None:
    """Copy what `saved_state` returned into a train state.

    client: its name, for the error. Raises UserError where the tensors are not this client's.
    """
    saved_optimizer = saved["optimizer"]
    load_tensors(state.tensors, saved["experts"], client)
    state.local_steps = int(saved_optimizer["local_steps"])
    state.router_steps = int(saved_optimizer["router_steps"])

    # A tensor that was never stepped has no moments, and must have none again.
    slots = {id(tensor): slot for slot, tensor in state.tensors.items()}
    for level, optimizer in state.optimizers.items():
        optimizer.state.clear()
        for param in state.of(level):
            name = slots[id(param)]
            if f"{name}/step" in saved_optimizer:
                optimizer.state[param] = {
                    key: saved_optimizer[f"{name}/{key}"].to(param.device, copy=True)
                    for key in KEPT
                }


def shape_as_saved(shape: ExpertShape, names: Iterable[str]) -> ExpertShape:
    """Return the experts of a client whose power may have changed since the run began.

    names: of its saved tensors.
    """
    return shape.model_copy(update={"specialists": num_specialists(names)})


def load_tensors(tensors: Mapping[Slot, Tensor], saved: Mapping[str, Tensor], client: str) -> None:
    """Copy saved tensors over a client's.

    Raises UserError naming the first tensor that is missing or of another shape.
    """
    expected = {str(slot): tuple(tensor.shape) for slot, tensor in tensors.items()}
    given = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise UserError(
                f"client {client}: saved tensor {name} has shape {given.get(name)}, this run needs "
                f"{expected.get(name)}; the checkpoint belongs to another config or base"
            )
    for slot, tensor in tensors.items():
        tensor.copy_(saved[str(slot)])


def replace_tensors(state: TrainState, tensors: Mapping[Slot, Tensor]) -> None:
    """Write what a method made of the tensors after training.

    What it set to zero loses its moments, since AdamW would revive it.
    """
    for slot, tensor in tensors.items():
        own = state.tensors[slot]
        zeroed = (tensor == 0) & (own != 0)
        own.copy_(tensor)
        for optimizer in state.optimizers.values():
            for key in MOMENTS:
                if key in optimizer.state.get(own, {}):
                    optimizer.state[own][key][zeroed] = 0
