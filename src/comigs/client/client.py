"""A client: its tensors, optimisers and text, and what it does in a run: receive, evaluate, train, send."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.evaluate import Evaluation, evaluate
from comigs.client.steps import Batch, Group, NonFiniteLoss, OnStep, Plan, RoundLog, Trainee, local_round
from comigs.config import ClientSection, Config, Split
from comigs.data.batches import sample_windows
from comigs.data.prepare import ClientData
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.start import starting_tensors
from comigs.methods.method import Download, Method
from comigs.seeds import generator
from comigs.slots import Slot

PRIVATE = ("specialist", "router")  # roles that no method can make a client send
GROUPS: tuple[Group, ...] = get_args(Group)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class Client:
    """One participant. Many share one attachment, which is pointed at whichever client is at work."""

    def __init__(
        self, name: str, config: Config, method: Method, base: Base, attachment: Attachment, data: ClientData
    ) -> None:
        self.name = name
        self.config = config
        self.method = method
        self.base = base
        self.attachment = attachment
        self.data = data
        self.shape = method.shape(config.shape_of(config.client_named(name)))
        shapes = attachment.slot_shapes(self.shape, method.routed)
        start = starting_tensors(shapes, config.seed, name)
        self.trainee = new_trainee({s: t.to(base.device) for s, t in start.items()}, config.client)
        lr = config.client.lr or base.architecture.lr
        self.plan = Plan(
            settings=config.client,
            lr=lr,
            router_lr=config.client.router_lr or lr,
            total_steps=config.rounds * config.client.steps,
            dtype=base.dtype,
            joint=method.schedule == "joint",
        )

    @property
    def trained_parameters(self) -> int:
        """Scalars this client trains."""
        return sum(t.numel() for t in self.trainee.tensors.values())

    def receive(self, download: Download) -> None:
        """Write the server's tensors over the client's. Optimiser moments, specialists and router stay as they were."""
        own = self.trainee.tensors
        for slot, tensor in download.items():  # all of it is checked before any of it is written
            if not self.method.receives(slot) or slot.role in PRIVATE or slot not in own:
                raise AssertionError(f"{self.name}: a download may not touch {slot}")
            if tensor.shape != own[slot].shape or not bool(tensor.isfinite().all()):
                raise AssertionError(f"{self.name}: {slot} of the download has another shape or is not finite")
        for slot, tensor in download.items():
            own[slot].copy_(tensor)

    def train(self, round: int, on_step: OnStep) -> RoundLog:
        """One round of local steps and router steps. Raises UserError when a loss is NaN or infinite."""
        self.attachment.bind(self.trainee.tensors)
        try:
            return local_round(
                self.attachment,
                self.trainee,
                self.plan,
                self._draw,
                lambda slot: self.method.trains(slot, round),
                on_step,
            )
        except NonFiniteLoss as error:
            raise UserError(
                f"client {self.name}: {error} in round {round}, {error.batch}; this batch was not learnt from and the "
                f"state after round {round - 1} is kept. Start a new run with client.lr lower than {self.plan.lr:g}, "
                "or look at the text"
            ) from None

    def send(self) -> dict[Slot, Tensor]:
        """A copy of what the method shares. Specialists and routers never leave, whatever the method says."""
        upload = {slot: t.detach().clone() for slot, t in self.trainee.tensors.items() if self.method.shares(slot)}
        for slot in upload:
            if slot.role in PRIVATE:
                raise AssertionError(f'method "{self.method.name}" tried to share {slot}, which never leaves a client')
        return upload

    def evaluate(self, split: Split, untouched_base: bool = False) -> Evaluation:
        """Every token of a split once, with the client's own model or with the base alone."""
        self.attachment.bind({} if untouched_base else self.trainee.tensors)
        length, batch_size = self.config.data.sequence_length, self.config.evaluation.batch_size
        result = evaluate(self.attachment, getattr(self.data, split), length, batch_size, self.base.dtype)
        if not math.isfinite(result.nats):
            cure = "use base.dtype float32" if untouched_base else f"lower client.lr (now {self.plan.lr:g})"
            raise UserError(
                f"client {self.name}: {'the base' if untouched_base else 'its model'} gives {split} a loss of "
                f"{result.nats}; every whole round is kept. Start a new run and {cure}"
            )
        return result

    def _draw(self, split: str, number: int) -> Batch:
        """The same batch for the same (seed, client, split, number), whatever was drawn before."""
        return sample_windows(
            getattr(self.data, split),
            generator(self.config.seed, "batch", self.name, split, number),
            self.config.client.batch_size,
            self.config.data.sequence_length,
        )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What training goes on from: {"experts": tensors by slot, "optimizer": both AdamW states and step counts}."""
        t = self.trainee
        moments = {"local_steps": torch.tensor(t.local_steps), "router_steps": torch.tensor(t.router_steps)}
        by_id = {id(tensor): slot for slot, tensor in t.tensors.items()}
        for optimizer in t.optimizers.values():
            for param, values in optimizer.state.items():
                moments |= {f"{by_id[id(param)]}/{key}": values[key] for key in MOMENTS}
        return {"experts": {str(slot): tensor for slot, tensor in t.tensors.items()}, "optimizer": moments}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state`. Raises UserError where the tensors are not this client's."""
        t, moments = self.trainee, state["optimizer"]
        load_tensors(t.tensors, state["experts"], self.name)
        t.local_steps, t.router_steps = int(moments["local_steps"]), int(moments["router_steps"])
        slots = {id(tensor): slot for slot, tensor in t.tensors.items()}
        for optimizer in t.optimizers.values():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    keys = {key: f"{slots[id(param)]}/{key}" for key in MOMENTS}
                    if keys["step"] in moments:
                        optimizer.state[param] = {key: moments[name].to(param.device) for key, name in keys.items()}


def new_trainee(tensors: dict[Slot, Tensor], settings: ClientSection) -> Trainee:
    """Fresh optimisers over these tensors: one AdamW per level."""
    trainee = Trainee(tensors, {})
    for group in GROUPS:
        if params := trainee.group(group):
            trainee.optimizers[group] = torch.optim.AdamW(
                params, lr=1.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
            )
    return trainee


def load_tensors(tensors: Mapping[Slot, Tensor], saved: Mapping[str, Tensor], client: str) -> None:
    """Copy saved tensors over a client's. Raises UserError naming the first that is missing or of another shape."""
    expected = {str(slot): tuple(t.shape) for slot, t in tensors.items()}
    given = {name: tuple(t.shape) for name, t in saved.items()}
    if expected != given:
        name = min(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
        raise UserError(
            f"client {client}: saved tensor {name} has shape {given.get(name)}, this run needs {expected.get(name)}; "
            "the checkpoint belongs to another config or base"
        )
    for slot, tensor in tensors.items():
        tensor.copy_(saved[str(slot)])
