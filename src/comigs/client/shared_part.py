"""What leaves a client that is private: tensors of its own, which learn by noised steps alone.

They start each round from the download, as it was sent. The client's own model may adopt as much of
the same download as its valid asks, and learns from all of its text without noise, whole: it stays,
so nothing of that is in what is sent (docs/decisions/0022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor

from comigs.client.private_steps import Mechanism, shared_round
from comigs.client.round_log import RoundLog
from comigs.client.state import ClientState, load_state, new_train_state, saved_state
from comigs.client.steps import MethodHooks, OnStep, StepSettings
from comigs.client.workplace import Workplace
from comigs.data.documents import Documents
from comigs.data.prepare import ClientData
from comigs.methods.method import Download, Method, Tensors
from comigs.privacy.budget import Budget
from comigs.privacy.noise import step_generator
from comigs.slots import Slot

# The parts of a saved client that are the shared part's, and what they are called in a train state.
PARTS = {"shared": "experts", "shared_optimizer": "optimizer"}


def is_shared(method: Method, slot: Slot) -> bool:
    """Return whether a tensor learns in the shared phase.

    It does where it is sent, or where the gradient of what is sent goes through it: of a LoRA of
    which one factor is sent, both do.
    """
    if slot.role not in ("generalist", "attention"):
        return False
    return any(method.shares(replace(slot, matrix=matrix)) for matrix in "AB")


def learns_at_home(method: Method, slot: Slot, round: int) -> bool:
    """Return whether a tensor of a private client learns from all of its text in a round.

    The copies of what is sent do not where a download is written over them whole.
    """
    is_copy = is_shared(method, slot) and method.mix is None
    return not slot.is_frozen and method.trains(slot, round) and not is_copy


class SharedPart:
    """The shared part of a private client.

    tensors: by slot, trained by noised steps alone. budget: None where nothing is to be trained.
    """

    def __init__(
        self,
        name: str,
        place: Workplace,
        start: Tensors,
        state: ClientState | None,
        budget: Budget | None,
    ) -> None:
        """Begin from `state`, or from the client's tensors `start` where that is None."""
        self.name, self.budget = name, budget
        self.config, self.method = config, method = place.config, place.method
        self._attachment = place.attachment
        own = {slot: tensor.clone() for slot, tensor in start.items() if is_shared(method, slot)}
        self._train_state = new_train_state(own, config.client)
        if state is not None:
            saved = {of: state[part] for part, of in PARTS.items()}
            load_state(self._train_state, saved, name)
            # A round that is done was counted, or what was spent is not known any more.
            if budget is not None:
                budget.require_counted(self._train_state.local_steps // config.client.steps)

    @property
    def tensors(self) -> dict[Slot, Tensor]:
        """The tensors by slot."""
        return self._train_state.tensors

    def receive(self, download: Download) -> None:
        """Take a download as it is, whatever the client's own model makes of it."""
        for slot, tensor in download.items():
            if slot in self.tensors:
                self.tensors[slot].copy_(tensor)

    def train(
        self,
        round: int,
        settings: StepSettings,
        data: ClientData,
        own: Tensors,
        on_step: OnStep,
    ) -> RoundLog:
        """Take a round's noised steps; return what they measured, with the run's epsilon so far.

        own: the tensors of the client's own model, of which those are written that learn here and
        that no download brings. Raises BudgetSpent before anything is drawn.
        """
        assert self.budget is not None, "a client without a budget does not train"
        (store,) = data.train
        documents = Documents(store, self.config.data.sequence_length)

        # What is spent is on the disk before the first number is drawn.
        spent, plan = self.budget.spend(round), self.budget.plan
        seed = self.config.privacy.noise_seed
        mechanism = Mechanism(
            documents,
            plan.sampling_rate,
            plan.noise_multiplier,
            self.config.privacy.clip,
            partial(step_generator, seed, self.name),
        )

        # No specialist and no router is in the forward pass: they have learnt from every document,
        # and each document's gradient would tell of all others through them.
        merged = {slot: tensor for slot, tensor in own.items() if slot.role == "merged"}
        self._attachment.bind({**merged, **self.tensors})
        hooks, missed = self._hooks(round), (round - 1) * self.config.client.steps
        settings = replace(settings, missed=max(0, missed - self._train_state.local_steps))
        log = shared_round(self._attachment, self._train_state, settings, mechanism, hooks, on_step)
        for slot, tensor in self.tensors.items():
            if not self.method.receives(slot):
                own[slot].copy_(tensor)
        # With noise that can be drawn again, or with none, nothing is private.
        log.epsilon = spent if math.isfinite(spent) and seed is None else None
        return log

    def _hooks(self, round: int) -> MethodHooks:
        penalty = None
        if self.method.penalty is not None:
            anchor = {slot: tensor.clone() for slot, tensor in self.tensors.items()}
            penalty = partial(self.method.penalty, self.tensors, anchor)
        return MethodHooks(lambda slot: self.method.trains(slot, round), penalty)

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what it goes on from."""
        saved = saved_state(self._train_state)
        return {part: saved[of] for part, of in PARTS.items()}
