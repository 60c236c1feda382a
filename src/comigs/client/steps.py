"""This page is one client's training in a round: the bi-level method of 2409.13931 (algorithm 1).

The lower level trains the experts on `train`. The upper level trains the router on `valid`, which
stands for what the user wants. The two never touch: a step computes the gradient of its own level
only, and leaves no gradient behind.

Shapes: T tokens of a batch, L blocks, E experts.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from comigs.client.balance_loss import batch_densities, mean_balance_loss
from comigs.client.loss import autocast, micro_batches
from comigs.client.objective import CROSS_ENTROPY, Objective
from comigs.client.round_log import Outcome, RoundLog
from comigs.client.state import TrainState
from comigs.config import ClientSection, Config, RouterData
from comigs.data.batches import Batch
from comigs.data.sampling import Level, router_split
from comigs.experts.attach import Attachment
from comigs.methods.method import Method, Schedule
from comigs.slots import Slot

BatchFn = Callable[[Level, int], Batch]  # (level, batches it has had so far) -> its next batch
OnStep = Callable[[Level, float], None]  # (level, nats per token), told after each step


@dataclass(frozen=True)
class StepSettings:
    """These are the settings of a run that its steps need.

    client: the config's [client]. total_steps: local steps of the whole run, for the cosine.
    schedule: how the router learns (Method.schedule). missed: local steps of earlier rounds in
    which the client was not asked.
    """

    client: ClientSection
    lr: float
    router_lr: float
    total_steps: int
    dtype: torch.dtype
    schedule: Schedule = "alternating"
    missed: int = 0

    def rate(self, level: Level, done: int) -> float:
        """Return a level's learning rate after `done` local steps of the client.

        The router's rate is constant. The experts' falls from lr to lr / 10 by a cosine over the
        run.
        """
        if level == "router":
            return self.router_lr
        over = (done + self.missed) / self.total_steps
        return self.lr / 10 + (self.lr - self.lr / 10) * (1 + math.cos(math.pi * over)) / 2


def settings_of(
    config: Config, method: Method, client: str, slots: Iterable[Slot]
) -> ClientSection:
    """Return [client] as the client of that name, which has these slots, trains by it.

    Where no phase of a router ever comes there is nothing to set a fold of train aside for.
    """
    has_router = any(slot.role == "router" for slot in slots)
    steps = config.rounds * config.client.steps
    phases = config.client.router_steps and config.client.router_every <= steps
    router_data: RouterData = "valid"
    if method.schedule != "joint" and has_router and phases:
        router_data = config.router_data_of(config.client_named(client))
    return config.client.model_copy(update={"router_data": router_data})


@dataclass(frozen=True)
class MethodHooks:
    """The hooks are what the method says about one round, and what its router phases minimise.

    trains(slot): the slot learns in this round. penalty(): it is added to the loss of local steps.
    """

    trains: Callable[[Slot], bool] = lambda slot: True
    penalty: Callable[[], Tensor] | None = None
    router: Objective = CROSS_ENTROPY


class NonFiniteLoss(ArithmeticError):
    """A batch's loss or gradient is NaN or infinite, and nothing was stepped with it.

    batch: which batch it was, in words.
    """

    batch = ""


def local_round(
    attachment: Attachment,
    state: TrainState,
    settings: StepSettings,
    next_batch: BatchFn,
    hooks: MethodHooks,
    on_step: OnStep,
) -> RoundLog:
    """Train a client for one round, and return what that measured.

    The round has `client.steps` local steps. After every `client.router_every` of them, counted
    over the whole run, the router has a phase of `client.router_steps` steps of its own. Raises
    NonFiniteLoss.
    """
    log, client = RoundLog(), settings.client
    # In the bi-level method train teaches the experts alone; rivals let it teach the router, too.
    levels: tuple[Level, ...] = ("experts",)
    if settings.schedule != "alternating":
        levels = ("experts", "router")
    has_phases = settings.schedule != "joint" and bool(state.of("router"))

    for _ in range(client.steps):
        # Lower level: the experts learn what the client's text says.
        log.learning_rate = settings.rate("experts", state.local_steps)
        with naming("train", state.local_steps):
            batch = next_batch("experts", state.local_steps)
            outcome = step(attachment, state, settings, hooks, levels, batch)
        state.local_steps += 1
        log.local_steps += 1
        log.note(outcome)
        on_step("experts", outcome.nats)

        # Upper level: the router learns what the user wants, from experts that now stand still.
        if not has_phases or state.local_steps % client.router_every:
            continue
        for _ in range(client.router_steps):
            with naming(router_split(client), state.router_steps):
                batch = next_batch("router", state.router_steps)
                outcome = step(attachment, state, settings, hooks, ("router",), batch)
            state.router_steps += 1
            log.router_losses.append(outcome.nats)
            on_step("router", outcome.nats)
    return log


def step(
    attachment: Attachment,
    state: TrainState,
    settings: StepSettings,
    hooks: MethodHooks,
    levels: tuple[Level, ...],
    batch: Batch,
) -> Outcome:
    """Take one AdamW step of these levels on one batch, and return what was measured.

    The loss is the objective's mean in nats (cross-entropy, but in some router phases), plus
    `balance_coef` times the balance loss, plus the method's penalty. Raises NonFiniteLoss before
    anything is stepped.
    """
    with gradients_for(state, levels, hooks.trains):
        # The gradient of the whole batch is gathered piece by piece, as memory allows.
        objective = hooks.router if levels == ("router",) else CROSS_ENTROPY
        outcome = accumulate(attachment, settings, batch, objective)
        if hooks.penalty is not None and "experts" in levels:
            hooks.penalty().backward()

        # While all experts are equal the router's true gradient is zero, and AdamW would make full
        # steps of its rounding noise.
        stepped: list[Level] = []
        for level in levels:
            if level == "experts" or (level in state.optimizers and experts_differ(state.tensors)):
                stepped.append(level)

        # Every level is checked before any is stepped, so that a bad batch changes nothing.
        for level in stepped:
            gradients = [tensor.grad for tensor in state.of(level) if tensor.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            if not math.isfinite(norm):
                raise NonFiniteLoss(f"the gradient's norm is {norm:g}")
        for level in stepped:
            optimizer = state.optimizers[level]
            for param_group in optimizer.param_groups:
                param_group["lr"] = settings.rate(level, state.local_steps)
            optimizer.step()
    return outcome


def accumulate(
    attachment: Attachment,
    settings: StepSettings,
    batch: Batch,
    objective: Objective = CROSS_ENTROPY,
) -> Outcome:
    """Add a batch's gradient to the tensors that collect one, and return what was measured.

    Raises NonFiniteLoss.
    """
    client, outcome = settings.client, Outcome(tokens=batch.num_learnt)
    pieces = list(micro_batches(batch, client.micro_batch_size, attachment.model.device))
    densities = batch_densities(attachment, pieces, settings.dtype)
    weights_LE = objective.batch_weights(attachment, pieces, settings.dtype)
    for piece in pieces:
        # Each piece counts by its tokens, so that the pieces' sum is the whole batch's mean.
        learnt = piece.learnt
        part = (piece.inputs.numel() if learnt is None else len(learnt)) / outcome.tokens
        with autocast(settings.dtype, piece.inputs.device):
            nats = objective.sum_nats(attachment.model, piece) / outcome.tokens
            routings = attachment.routings(learnt)
            balance = mean_balance_loss(routings, client.generalist_share, densities)
            distance = objective.distance(routings, weights_LE)
        loss = nats + (client.balance_coef * balance + distance) * part
        outcome.nats += float(nats.detach())
        outcome.balance += float(balance.detach()) * part
        if not math.isfinite(outcome.nats):
            raise NonFiniteLoss(f"the loss is {outcome.nats}")

        # A method may train nothing of a client in a round; then there is nothing to go back to.
        if loss.requires_grad:
            loss.backward()
        weights = [routing.weights_TE.detach().sum(dim=0) for routing in routings]
        if weights:
            outcome.shares_LE.append(torch.stack(weights))
    return outcome


@contextlib.contextmanager
def gradients_for(
    state: TrainState, levels: tuple[Level, ...], trains: Callable[[Slot], bool]
) -> Iterator[None]:
    """Let only the tensors of these levels collect gradients inside, and leave none behind.

    The authors' loop leaves the other level's gradients for its next step; ours must not
    (docs/method.md).
    """
    stepped = {id(tensor) for level in levels for tensor in state.of(level)}
    for slot, tensor in state.tensors.items():
        tensor.requires_grad_(id(tensor) in stepped and trains(slot))
    try:
        yield
    finally:
        for tensor in state.tensors.values():
            tensor.requires_grad_(False)
            tensor.grad = None


@contextlib.contextmanager
def naming(split: str, number: int) -> Iterator[None]:
    """Say of a loss that is not finite which batch it was, counted from 0 over the run."""
    try:
        yield
    except NonFiniteLoss as error:
        error.batch = f"{split} batch {number}"
        raise


def experts_differ(tensors: Mapping[Slot, Tensor]) -> bool:
    """Return whether any expert's B has left zero, where every expert is the base's MLP."""
    for slot, tensor in tensors.items():
        if slot.matrix == "B" and slot.role in ("generalist", "specialist") and tensor.any():
            return True
    return False
