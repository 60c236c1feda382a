"""A client: its tensors, optimisers and text, and what it does in a run: receive, evaluate, train,
send.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from comigs.bases.load import Base
from comigs.client.evaluate import Measurement, evaluate, measure
from comigs.client.steps import (
    MethodHooks,
    NonFiniteLoss,
    OnStep,
    RoundLog,
    StepSettings,
    TrainState,
    local_round,
)
from comigs.config import SPLITS, ClientSection, Config, Split
from comigs.data.batches import Batch, evaluation_windows
from comigs.data.prepare import ClientData
from comigs.data.sampling import Group, batch_for, check_text, probe_windows
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.init import starting_tensors
from comigs.methods.method import Download, Method, Tensors, pairs
from comigs.seeds import generator
from comigs.slots import Slot

PRIVATE = (
    "specialist",
    "router",
)  # roles that never leave a client, nor come from elsewhere, whatever the method
GROUPS: tuple[Group, ...] = get_args(Group)
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
ClientState = Mapping[str, Mapping[str, Tensor]]  # what `Client.state` gives


class Client:
    """One participant. Many share one attachment, which is pointed at whichever client is at
    work.
    """

    def __init__(
        self, name: str, config: Config, method: Method, base: Base, attachment: Attachment, data: ClientData,
        state: ClientState | None = None,
    ) -> None:  # fmt: skip
        """state: what it goes on from; None: from its start. Raises UserError where the state is
        not this client's.
        """
        self.name = name
        self.config = config
        self.method = method
        self.base = base
        self.attachment = attachment
        self.data = data
        self.text = data  # what it trains on
        self.is_trainer = True  # False: another client trains for it (pooled)
        self.adopted_share: float | None = (
            None  # of what it received last, where the method weighs that
        )
        self.shape = method.shape(config.shape_of(config.client_named(name)))
        self.shapes = attachment.slot_shapes(self.shape, method.mixing == "routed", method.merges)
        self.train_state = new_train_state(
            self._start() if state is None else self._unwritten(), config.client
        )
        if state is not None:
            self.load_state(state)
        settings, lr = (
            settings_of(config, method, self.shapes),
            config.client.lr or base.architecture.lr,
        )
        self.plan = StepSettings(
            settings=settings,
            lr=lr,
            router_lr=config.client.router_lr or lr,
            total_steps=config.rounds * config.client.steps,
            dtype=base.dtype,
            schedule=method.schedule,
        )
        check_text(name, data, settings, config.data.sequence_length)

    def pool(self, everyone: Sequence[ClientData]) -> None:
        """Train on everybody's text, with as many times the batch; what is measured stays the
        client's own.
        """
        settings, count = self.plan.settings, len(everyone)
        self.text = ClientData(
            *(tuple(s for d in everyone for s in getattr(d, split)) for split in SPLITS)
        )
        batch_size = settings.batch_size * count
        micro = settings.micro_batch_size or settings.batch_size
        pooled = settings.model_copy(update={"batch_size": batch_size, "micro_batch_size": micro})
        self.plan = replace(self.plan, settings=pooled)

    def _here(self, tensors: Tensors) -> dict[Slot, Tensor]:
        return {slot: tensor.to(self.base.device) for slot, tensor in tensors.items()}

    def _start(self) -> dict[Slot, Tensor]:
        start = starting_tensors(
            self.shapes, self.config.seed, self.name, self.config.experts.router_start
        )
        return {slot: tensor.to(self.base.device) for slot, tensor in start.items()}

    def _unwritten(self) -> dict[Slot, Tensor]:
        return {
            slot: torch.empty(dims, device=self.base.device) for slot, dims in self.shapes.items()
        }

    def trained_parameters(self, rounds: Iterable[int]) -> int:
        """Scalars this client trains in any of these rounds."""
        which = list(rounds)
        trained = (
            t
            for slot, t in self.train_state.tensors.items()
            if any(self._trains(slot, r) for r in which)
        )
        return sum(t.numel() for t in trained)

    def _trains(self, slot: Slot, round: int) -> bool:
        return not slot.is_frozen and self.method.trains(slot, round)

    def receive(self, download: Download, round: int = 1) -> None:
        """Write the server's tensors over the client's, as the method adopts them, before training
        in `round`.

        Optimiser moments, specialists and router stay as they were.
        """
        own, download = self.train_state.tensors, self._here(download)
        for slot, tensor in download.items():  # all of it is checked before any of it is written
            place = Slot(slot.layer, slot.site, "merged", "W") if slot.role == "update" else slot
            if not self.method.receives(slot) or slot.role in PRIVATE or place not in own:
                raise AssertionError(f"{self.name}: a download may not touch {slot}")
            side = (
                slice(None) if place == slot else slice(1, 2) if slot.matrix == "A" else slice(0, 1)
            )
            if tensor.shape[side] != own[place].shape[side]:  # the rank of an update is free
                raise AssertionError(f"{self.name}: {slot} of the download has another shape")
            if not bool(tensor.isfinite().all()):
                raise AssertionError(f"{self.name}: {slot} of the download is not finite")
        written: Tensors = {
            slot: tensor for slot, tensor in download.items() if slot.role != "update"
        }
        self.adopted_share = None
        if self.method.mix is not None and written:
            windows = probe_windows(self.config, self.name, self.data, round, self.method.probe)
            written, self.adopted_share = self.method.mix(
                own, written, lambda tensors: self._nats({**own, **tensors}, windows)
            )
        for slot, tensor in written.items():
            own[slot].copy_(tensor)
        self._merge({slot: tensor for slot, tensor in download.items() if slot.role == "update"})

    def _merge(self, update: Download) -> None:
        """Add factored updates to the frozen change of their linears, and start the LoRA that went
        into them anew.
        """
        own = self.train_state.tensors
        for (layer, site, _), (A_RI, B_OR) in pairs(update).items():
            merged_OI = own[Slot(layer, site, "merged", "W")]
            merged_OI += (B_OR @ A_RI).to(merged_OI)
        if update and self.method.reinitializes:
            for slot, tensor in self._start().items():
                if self.method.shares(slot):
                    own[slot].copy_(tensor)

    def train(self, round: int, on_step: OnStep) -> RoundLog:
        """One round of local steps and router steps. Raises UserError when a loss is NaN or
        infinite.
        """
        self.attachment.bind(self.train_state.tensors)
        own, method = self.train_state.tensors, self.method
        looks_back = method.penalty is not None or method.after_training is not None
        anchor = {slot: tensor.clone() for slot, tensor in own.items()} if looks_back else {}
        penalty = None if method.penalty is None else partial(method.penalty, own, anchor)
        rules = MethodHooks(lambda slot: self._trains(slot, round), penalty)
        missed = (round - 1) * self.config.client.steps - self.train_state.local_steps
        plan = replace(self.plan, missed=max(0, missed))
        try:
            log = local_round(self.attachment, self.train_state, plan, self._draw, rules, on_step)
        except NonFiniteLoss as error:
            raise UserError(
                f"client {self.name}: {error} in round {round}, {error.batch}; this batch was not learnt from and the "
                f"state after round {round - 1} is kept. Start a new run with client.lr lower than {self.plan.lr:g}, "
                "or look at the text"
            ) from None
        if method.after_training is not None:
            self._write_settled(method.after_training(own, anchor))
        return log

    def _write_settled(self, after: Tensors) -> None:
        """Write what the method made of the tensors. What it set to zero loses its moments: AdamW
        would revive it.
        """
        for slot, tensor in after.items():
            own = self.train_state.tensors[slot]
            zeroed = (tensor == 0) & (own != 0)
            own.copy_(tensor)
            for optimizer in self.train_state.optimizers.values():
                for key in MOMENTS[:2]:
                    if key in optimizer.state.get(own, {}):
                        optimizer.state[own][key][zeroed] = 0

    def send(self, round: int) -> dict[Slot, Tensor]:
        """What the method shares and this round trained, copied to the CPU.

        Specialists and routers never leave, whatever the method says.
        """
        own = self.train_state.tensors
        sent = {
            slot: t
            for slot, t in own.items()
            if self.method.shares(slot) and self._trains(slot, round)
        }
        upload = {slot: tensor.detach().to("cpu", copy=True) for slot, tensor in sent.items()}
        for slot in upload:
            if slot.role in PRIVATE:
                raise AssertionError(
                    f'method "{self.method.name}" tried to share {slot}, which never leaves a client'
                )
        return upload

    def probe(self, models: Mapping[str, Download], round: int) -> dict[str, float]:
        """Nats per token of each upload in this client's place, on a fixed sample of its valid."""
        windows = probe_windows(self.config, self.name, self.data, round, self.method.probe)
        return {
            author: self._nats({**self.train_state.tensors, **self._here(model)}, windows)
            for author, model in models.items()
        }

    def finish(self) -> None:
        """What the method does with a client's model at the very end, judged on all of its
        valid.
        """
        if self.method.finish is not None:
            length, batch_size = self.config.data.sequence_length, self.config.evaluation.batch_size
            windows = list(evaluation_windows(self.data.valid, length, batch_size))
            own = self.train_state.tensors
            finished = self.method.finish(dict(own), lambda tensors: self._nats(tensors, windows))
            for slot, tensor in finished.items():
                own[slot].copy_(tensor)

    def _nats(self, tensors: Tensors, windows: Iterable[Batch]) -> float:
        """Nats per token of a model with these tensors on these windows."""
        self.attachment.bind(tensors)
        return measure(self.attachment, windows, self.base.dtype).nats_per_token

    def evaluate(self, split: Split, untouched_base: bool = False) -> Measurement:
        """Every token of a split once, with the client's own model or with the base alone."""
        self.attachment.bind({} if untouched_base else self.train_state.tensors)
        length, batch_size = self.config.data.sequence_length, self.config.evaluation.batch_size
        result = evaluate(
            self.attachment, getattr(self.data, split), length, batch_size, self.base.dtype
        )
        if not math.isfinite(result.nats):
            cure = (
                "use base.dtype float32"
                if untouched_base
                else f"lower client.lr (now {self.plan.lr:g})"
            )
            raise UserError(
                f"client {self.name}: {'the base' if untouched_base else 'its model'} gives {split} a loss of "
                f"{result.nats}; every whole round is kept. Start a new run and {cure}"
            )
        return result

    def _draw(self, level: Group, number: int) -> Batch:
        settings, length = self.plan.settings, self.config.data.sequence_length
        random = partial(generator, self.config.seed, "batch", self.name)
        return batch_for(
            level, number, self.train_state.local_steps, settings, length, random, self.text
        )

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What training goes on from: {"experts": tensors by slot, "optimizer": both AdamW states
        and step counts}.
        """
        t = self.train_state
        moments = {
            "local_steps": torch.tensor(t.local_steps),
            "router_steps": torch.tensor(t.router_steps),
        }
        by_id = {id(tensor): slot for slot, tensor in t.tensors.items()}
        for optimizer in t.optimizers.values():
            for param, values in optimizer.state.items():
                moments |= {f"{by_id[id(param)]}/{key}": values[key] for key in MOMENTS}
        return {
            "experts": {str(slot): tensor for slot, tensor in t.tensors.items()},
            "optimizer": moments,
        }

    def load_state(self, state: ClientState) -> None:
        """The inverse of `state`; copies. Raises UserError where the tensors are not this
        client's.
        """
        t, moments = self.train_state, state["optimizer"]
        load_tensors(t.tensors, state["experts"], self.name)
        t.local_steps, t.router_steps = int(moments["local_steps"]), int(moments["router_steps"])
        slots = {id(tensor): slot for slot, tensor in t.tensors.items()}
        for optimizer in t.optimizers.values():
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for param in group["params"]:
                    keys = {key: f"{slots[id(param)]}/{key}" for key in MOMENTS}
                    if keys["step"] in moments:
                        optimizer.state[param] = {
                            key: moments[name].to(param.device, copy=True)
                            for key, name in keys.items()
                        }


def settings_of(config: Config, method: Method, slots: Iterable[Slot]) -> ClientSection:
    """[client] as a client with these slots trains by it."""
    if method.schedule == "joint" or not any(slot.role == "router" for slot in slots):
        return config.client.model_copy(
            update={"router_data": "valid"}
        )  # no phases to set a fold of train aside for
    return config.client


def new_train_state(tensors: dict[Slot, Tensor], settings: ClientSection) -> TrainState:
    """Fresh optimisers over these tensors: one AdamW per level."""
    train_state = TrainState(tensors, {})
    for group in GROUPS:
        if params := train_state.group(group):
            train_state.optimizers[group] = torch.optim.AdamW(
                params, lr=1.0, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
            )
    return train_state


def load_tensors(tensors: Mapping[Slot, Tensor], saved: Mapping[str, Tensor], client: str) -> None:
    """Copy saved tensors over a client's. Raises UserError naming the first that is missing or of
    another shape.
    """
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
