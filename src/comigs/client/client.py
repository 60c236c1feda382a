"""A client has tensors, optimisers and text. In a run it receives, evaluates, trains and sends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from comigs.client.best_round import BestRound
from comigs.client.door import PRIVATE, Weights, checked_prior, require_receivable
from comigs.client.evaluate import Measurement, evaluate, measure
from comigs.client.objective import objective_of
from comigs.client.round_log import RoundLog
from comigs.client.shared_part import SharedPart, learns_at_home
from comigs.client.state import (
    ClientState,
    load_state,
    new_train_state,
    replace_tensors,
    saved_state,
    shape_as_saved,
)
from comigs.client.steps import (
    MethodHooks,
    NonFiniteLoss,
    OnStep,
    StepSettings,
    local_round,
    settings_of,
)
from comigs.client.workplace import Workplace
from comigs.config import Split
from comigs.data.batches import Batch, evaluation_windows
from comigs.data.prepare import ClientData, pooled
from comigs.data.sampling import BatchSource, Level, check_text, probe_windows
from comigs.errors import UserError
from comigs.experts.init import starting_tensors
from comigs.methods.merging import pairs
from comigs.methods.method import Download, Tensors
from comigs.privacy.budget import Budget
from comigs.seeds import generator
from comigs.slots import Slot


class Client:
    """A client is one participant of a run.

    text: what it trains on. is_trainer: False where another client trains for it (centralized).
    adopted_share: how far it went towards its last download, from 0 to 1, where the method asks.
    best: None where the personal model is that of the last round. opening: (E,) how far its router
    is open to each expert while one is new (power.py). shared: what it sends, if private. seed: of
    its batches.
    """

    def __init__(
        self,
        name: str,
        place: Workplace,
        data: ClientData,
        state: ClientState | None = None,
        budget: Budget | None = None,
        seed: int | None = None,
    ) -> None:
        """Begin from `state`, or from the client's start where `state` is None.

        budget: of its privacy, to train with any. seed: of its batches; None: the config's. Raises
        UserError where the state is not this client's, or its text is too short to train on.
        """
        self.name = name
        self.config, self.method = config, method = place.config, place.method
        self.base, self.attachment = base, attachment = place.base, place.attachment
        self.data = self.text = data
        self.is_trainer = True
        self.adopted_share: float | None = None
        self.opening: Tensor | None = None
        self.best = BestRound(state or {}) if config.evaluation.keep == "best" else None
        self.seed = config.seed if seed is None else seed

        # The shapes follow from the client's own power and from what the method makes of it.
        self.shape = method.shape(config.shape_of(config.client_named(name)))
        if state is not None:
            self.shape = shape_as_saved(self.shape, state["experts"])
        routed = method.mixing == "routed"
        self.shapes = attachment.slot_shapes(self.shape, routed, method.merges)

        # A saved client is not drawn first: idle clients come from the disk in every round.
        if state is None:
            self.train_state = new_train_state(self._start(), config.client)
        else:
            empty = {slot: torch.empty(s, device=base.device) for slot, s in self.shapes.items()}
            self.train_state = new_train_state(empty, config.client)
            self.load_state(state)
        self.shared: SharedPart | None = None
        if config.privacy.by_document:
            self.shared = SharedPart(name, place, self.train_state.tensors, state, budget)

        lr = config.client.lr or base.architecture.lr
        self.step_settings = StepSettings(
            client=settings_of(config, method, name, self.shapes),
            lr=lr,
            router_lr=config.client.router_lr or lr,
            total_steps=config.rounds * config.client.steps,
            dtype=base.dtype,
            schedule=method.schedule,
        )
        check_text(name, data, self.step_settings.client, config.data.sequence_length)

    def pool(self, everyone: Sequence[ClientData]) -> None:
        """Train on everybody's text from now on, with as many times the batch.

        What is measured stays the client's own text.
        """
        self.text = pooled(everyone)
        own = self.step_settings.client
        size, piece = own.batch_size * len(everyone), own.micro_batch_size or own.batch_size
        larger = own.model_copy(update={"batch_size": size, "micro_batch_size": piece})
        self.step_settings = replace(self.step_settings, client=larger)

    def trained_parameters(self, rounds: Iterable[int]) -> int:
        """Return how many scalars this client trains in any of these rounds."""
        trained = {s for r in rounds for s in self.train_state.tensors if self._trains(s, r)}
        return sum(self.train_state.tensors[slot].numel() for slot in trained)

    def receive(self, download: Download, round: int = 1) -> None:
        """Write the server's tensors over the client's before it trains in `round`.

        A method may go only part of the way (Method.mix), which may write what stays home as well.
        Optimiser moments stay as they were, and specialists and router without that.
        """
        # All of a download is checked before any of it is written.
        own = self.train_state.tensors
        require_receivable(self.name, self.method, download, own)
        download = self._on_device(download)
        factors = {slot: tensor for slot, tensor in download.items() if slot.role == "update"}
        written: Tensors = {s: tensor for s, tensor in download.items() if s.role != "update"}

        # The client's valid says how far towards the download the client goes.
        self.adopted_share = None
        if self.method.mix is not None and written:
            windows = probe_windows(self.config, self.name, self.data, round, self.method.probe)
            written, self.adopted_share = self.method.mix(
                own, written, lambda tensors: self._nats({**own, **tensors}, windows)
            )
        for slot, tensor in written.items():
            own[slot].copy_(tensor)
        self._merge(factors)
        if self.shared is not None:
            self.shared.receive(download)

    def _merge(self, factors: Download) -> None:
        """Add updates to the frozen changes; where the method says so, LoRA starts anew then."""
        own = self.train_state.tensors
        for (layer, site, _), (A_RI, B_OR) in pairs(factors).items():
            merged_OI = own[Slot(layer, site, "merged", "W")]
            merged_OI += (B_OR @ A_RI).to(merged_OI)
        if factors and self.method.reinitializes:
            for slot, tensor in self._start().items():
                if self.method.shares(slot):
                    own[slot].copy_(tensor)

    def train(self, round: int, on_step: OnStep, prior: Weights | None = None) -> RoundLog:
        """Train for one round, and return what was measured.

        prior: of a Task. Raises UserError for a loss that is not finite, and BudgetSpent first.
        """
        own, method, sent = self.train_state.tensors, self.method, None
        if self.shared is not None:
            sent = self.shared.train(round, self.step_settings, self.data, own, on_step)

        # What is sent has learnt, where that is private; the client's own model learns as ever.
        def trains(slot: Slot) -> bool:
            if self.shared is not None:
                return learns_at_home(method, slot, round)
            return self._trains(slot, round)

        if sent is not None and not any(map(trains, own)):
            return sent
        self.attachment.bind(own, self.opening)

        # Some methods look back at the tensors with which the round began.
        anchor: Tensors = {}
        if method.penalty is not None or method.after_training is not None:
            anchor = {slot: tensor.clone() for slot, tensor in own.items()}
        penalty = None
        if method.penalty is not None:
            penalty = partial(method.penalty, own, anchor)
        objective = objective_of(self.step_settings.client, checked_prior(self.name, prior, own))
        hooks = MethodHooks(trains, penalty, objective)

        # Rates follow the run, also where the client was not asked in some of its rounds.
        missed = (round - 1) * self.config.client.steps - self.train_state.local_steps
        settings = replace(self.step_settings, missed=max(0, missed))
        try:
            log = local_round(
                self.attachment, self.train_state, settings, self._next_batch, hooks, on_step
            )
        except NonFiniteLoss as error:
            raise UserError(
                f"client {self.name}: {error} in round {round}, {error.batch}; this batch was not "
                f"learnt from and the state after round {round - 1} is kept. Start a new run with "
                f"client.lr lower than {settings.lr:g}, or look at the text"
            ) from None
        self.opening = None
        if method.after_training is not None:
            replace_tensors(self.train_state, method.after_training(own, anchor))
        if sent is not None:
            log.note_sent(sent)
        return log

    def send(self, round: int) -> dict[Slot, Tensor]:
        """Return copies on the CPU of what the method shares and this round trained.

        Specialists and routers never leave, whatever the method says.
        """
        upload = {}
        for slot, tensor in (self.shared or self.train_state).tensors.items():
            if not self.method.shares(slot) or not self._trains(slot, round):
                continue
            if slot.role in PRIVATE:
                raise AssertionError(f"{slot} never leaves a client, whatever the method says")
            upload[slot] = tensor.detach().to("cpu", copy=True)
        return upload

    def probe(self, models: Mapping[str, Download], round: int) -> dict[str, float]:
        """Return author -> nats per token of its upload in this client's place, on one sample."""
        windows = probe_windows(self.config, self.name, self.data, round, self.method.probe)
        nats = {}
        for author, model in models.items():
            require_receivable(self.name, self.method, model, self.train_state.tensors)
            tensors = {**self.train_state.tensors, **self._on_device(model)}
            nats[author] = self._nats(tensors, windows)
        return nats

    def finish(self) -> str | None:
        """Let the method finish the model, judged on all of valid; return the part that it left."""
        finish, own = self.method.finish, self.train_state.tensors
        if finish is None:
            return None
        sizes = self.config.data.sequence_length, self.config.evaluation.batch_size
        windows = partial(evaluation_windows, self.data.valid, *sizes)  # from the disk
        finished, part = finish(dict(own), lambda model: self._nats(model, windows()))
        for slot, tensor in finished.items():
            own[slot].copy_(tensor)
        return part

    def evaluate(self, split: Split, untouched_base: bool = False) -> Measurement:
        """Measure every token of a split once, with the client's own model or the base alone.

        Raises UserError where the model gives a loss that is not finite.
        """
        self.attachment.bind({} if untouched_base else self.train_state.tensors, self.opening)
        sizes = self.config.data.sequence_length, self.config.evaluation.batch_size
        result = evaluate(self.attachment, getattr(self.data, split), *sizes, self.base.dtype)
        if math.isfinite(result.nats):
            return result
        who, cure = "its model", f"lower client.lr (now {self.step_settings.lr:g})"
        if untouched_base:
            who, cure = "the base", "use base.dtype float32"
        raise UserError(
            f"client {self.name}: {who} gives {split} a loss of {result.nats}; every whole round "
            f"is kept. Start a new run and {cure}"
        )

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what training goes on from (client/state.py), and the best round if it is new."""
        best = self.best.parts() if self.best else {}
        shared = self.shared.state() if self.shared else {}
        return {**saved_state(self.train_state), **best, **shared}

    def load_state(self, state: ClientState) -> None:
        """Copy a saved state. Raises UserError where it is not this client's."""
        load_state(self.train_state, state, self.name)

    def _start(self) -> dict[Slot, Tensor]:
        seed, router_start = self.config.seed, self.config.experts.router_start
        return self._on_device(starting_tensors(self.shapes, seed, self.name, router_start))

    def _on_device(self, tensors: Tensors) -> dict[Slot, Tensor]:
        return {slot: tensor.to(self.base.device) for slot, tensor in tensors.items()}

    def _trains(self, slot: Slot, round: int) -> bool:
        return not slot.is_frozen and self.method.trains(slot, round)

    def _nats(self, tensors: Tensors, windows: Iterable[Batch]) -> float:
        """Return a model's nats per token on these windows; what is no number is the worst."""
        self.attachment.bind(tensors, self.opening)
        return min(math.inf, measure(self.attachment, windows, self.base.dtype).nats_per_token)

    def _next_batch(self, level: Level, number: int) -> Batch:
        settings, length = self.step_settings.client, self.config.data.sequence_length
        if self.opening is not None and level == "experts":
            self.opening.add_(1 / settings.steps).clamp_(max=1)  # 1 with the round's last step
        random = partial(generator, self.seed, "batch", self.name)
        source = BatchSource(self.text, settings, length, random)
        return source.batch(level, number, self.train_state.local_steps)
