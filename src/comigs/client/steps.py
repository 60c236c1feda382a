"""One client's training in a round: the whole of the bi-level method on one page (2409.13931,
section 3 and alg. 1).

The lower level trains the experts on `train`, the upper level trains the router on `valid`, which
stands for what the user wants. The two never touch: a step computes the gradient of its own group
only, and leaves none behind.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from comigs.client.loss import sum_cross_entropy
from comigs.config import ClientSection
from comigs.data.batches import Batch
from comigs.data.sampling import Group
from comigs.experts.attach import Attachment
from comigs.experts.router import balance_loss
from comigs.methods.method import Schedule
from comigs.slots import Slot

OnStep = Callable[[Group, float], None]  # (level, nats per token) after each step
BatchFn = Callable[
    [Group, int], Batch
]  # (level, how many batches it has had before) -> its next batch


@dataclass
class TrainState:
    """What of a client changes while it trains.

    tensors: every trainable tensor, float32. local_steps, router_steps: done so far, over the whole
    run.
    """

    tensors: dict[Slot, Tensor]
    optimizers: dict[Group, torch.optim.AdamW]
    local_steps: int = 0
    router_steps: int = 0

    def group(self, group: Group) -> list[Tensor]:
        """The tensors one level trains, in slot order; what is merged belongs to neither."""
        return [
            t
            for slot, t in sorted(self.tensors.items())
            if slot.role != "merged" and (slot.role == "router") == (group == "router")
        ]


@dataclass(frozen=True)
class StepSettings:
    """The settings of a run that steps need.

    total_steps: local steps of the whole run, for the cosine. missed: those before now for which
    the client was not asked.
    """

    settings: ClientSection
    lr: float
    router_lr: float
    total_steps: int
    dtype: torch.dtype
    schedule: Schedule = "alternating"  # of the router (Method.schedule)
    missed: int = 0

    def rate(self, group: Group, done: int) -> float:
        """Learning rate after `done` own local steps: the router's constant; the experts' a cosine
        over the run from lr to lr / 10.
        """
        if group == "router":
            return self.router_lr
        over = (done + self.missed) / self.total_steps
        return self.lr / 10 + (self.lr - self.lr / 10) * (1 + math.cos(math.pi * over)) / 2


@dataclass(frozen=True)
class MethodHooks:
    """What the method says about one round. trains(slot); penalty(): added to the loss of local
    steps, or None.
    """

    trains: Callable[[Slot], bool] = lambda slot: True
    penalty: Callable[[], Tensor] | None = None


@dataclass
class RoundLog:
    """What a round of one client measured: nats per token of each step, and the experts' mean
    routing weights.
    """

    train_losses: list[float] = field(default_factory=list)
    router_losses: list[float] = field(default_factory=list)
    balance_losses: list[float] = field(default_factory=list)
    share_sum_LE: Tensor | None = None
    learning_rate: float = 0.0
    trained_tokens: int = 0


class NonFiniteLoss(ArithmeticError):
    """The loss or gradient of a batch is NaN or infinite; nothing was stepped with it. batch: which
    one.
    """

    batch = ""


def local_round(
    attachment: Attachment,
    train_state: TrainState,
    plan: StepSettings,
    draw: BatchFn,
    rules: MethodHooks,
    on_step: OnStep,
) -> RoundLog:
    """`steps` local steps, and after every `router_every` of them (over the whole run) a phase of
    router steps.
    """
    settings, log = plan.settings, RoundLog()
    for _ in range(settings.steps):
        log.learning_rate = plan.rate("experts", train_state.local_steps)
        groups: tuple[Group, ...] = (
            ("experts",) if plan.schedule == "alternating" else ("experts", "router")
        )
        with naming("train", train_state.local_steps):
            loss = step(
                attachment,
                train_state,
                plan,
                groups,
                draw("experts", train_state.local_steps),
                rules,
                log,
            )
        train_state.local_steps += 1
        log.train_losses.append(loss)
        on_step("experts", loss)

        phase_is_due = train_state.local_steps % settings.router_every == 0
        if plan.schedule != "joint" and phase_is_due and train_state.group("router"):
            for _ in range(settings.router_steps):
                with naming(settings.router_data, train_state.router_steps):
                    loss = step(
                        attachment,
                        train_state,
                        plan,
                        ("router",),
                        draw("router", train_state.router_steps),
                        rules,
                    )
                train_state.router_steps += 1
                log.router_losses.append(loss)
                on_step("router", loss)
    return log


def step(
    attachment: Attachment, train_state: TrainState, plan: StepSettings, groups: tuple[Group, ...], batch: Batch,
    rules: MethodHooks, log: RoundLog | None = None,
) -> float:  # fmt: skip
    """One AdamW step of `groups` on one batch; returns the batch's mean nats per token.

    Raises NonFiniteLoss before anything is stepped.
    """
    settings = plan.settings
    routed = (
        "router" in train_state.optimizers
        and "router" in groups
        and experts_differ(train_state.tensors)
    )
    with gradients_for(train_state, groups, rules.trains, leaky=settings.leaky_gradients):
        nats, balance_nats, tokens = 0.0, 0.0, batch[0].size
        for inputs, targets in micro_batches(
            batch, settings.micro_batch_size, attachment.model.device
        ):
            share = inputs.numel() / tokens
            with autocast(plan.dtype, inputs.device):
                cross_entropy = sum_cross_entropy(attachment.model, inputs, targets) / tokens
                balance = mean_balance_loss(attachment, settings.generalist_share)
            loss = cross_entropy + settings.balance_coef * balance * share
            nats += float(cross_entropy.detach())
            balance_nats += float(balance.detach()) * share
            if not math.isfinite(nats):
                raise NonFiniteLoss(f"the loss is {nats}")
            if loss.requires_grad:  # a method may train nothing of a client in a round
                loss.backward()
            if log is not None:
                _note_shares(log, attachment)
        if rules.penalty is not None and "experts" in groups:
            rules.penalty().backward()
        # while experts are all equal the router's true gradient is zero, and AdamW would step on
        # rounding noise
        stepped = [group for group in groups if group == "experts" or routed]
        for group in stepped:
            norm = torch.nn.utils.get_total_norm(
                [t.grad for t in train_state.group(group) if t.grad is not None]
            )
            if not math.isfinite(norm):
                raise NonFiniteLoss(f"the gradient's norm is {norm:g}")
        for group in stepped:
            optimizer = train_state.optimizers[group]
            for param_group in optimizer.param_groups:
                param_group["lr"] = plan.rate(group, train_state.local_steps)
            optimizer.step()
    if log is not None:
        log.balance_losses.append(balance_nats)
        log.trained_tokens += tokens
    return nats


@contextlib.contextmanager
def gradients_for(
    train_state: TrainState, groups: tuple[Group, ...], trains: Callable[[Slot], bool], leaky: bool
) -> Iterator[None]:
    """Only tensors of `groups` collect gradients inside, and none is left after.

    leaky: as the authors' loop, all tensors collect and only the stepped groups' gradients are
    dropped.
    """
    stepped = {id(t) for group in groups for t in train_state.group(group)}
    for slot, tensor in train_state.tensors.items():
        tensor.requires_grad_(
            slot.role != "merged" and trains(slot) and (leaky or id(tensor) in stepped)
        )
    try:
        yield
    finally:
        for tensor in train_state.tensors.values():
            tensor.requires_grad_(False)
            if not leaky or id(tensor) in stepped:
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
    """False while every expert's B is zero, that is while all experts are the base's MLP."""
    return any(
        bool(t.any())
        for s, t in tensors.items()
        if s.matrix == "B" and s.role in ("generalist", "specialist")
    )


def mean_balance_loss(attachment: Attachment, generalist_share: float) -> Tensor:
    """Mean over blocks, zero without a router."""
    terms = [balance_loss(routing, generalist_share) for routing in attachment.routings()]
    return torch.stack(terms).mean() if terms else torch.zeros((), device=attachment.model.device)


def micro_batches(
    batch: Batch, size: int | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batch in pieces of `size` windows (None: whole), on the device."""
    inputs, targets = batch
    for start in range(0, len(inputs), size or len(inputs)):
        rows = slice(start, start + (size or len(inputs)))
        yield torch.from_numpy(inputs[rows]).to(device), torch.from_numpy(targets[rows]).to(device)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """bfloat16 matrix products where the run asks for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def _note_shares(log: RoundLog, attachment: Attachment) -> None:
    shares = [routing.weights_TE.detach().sum(dim=0) for routing in attachment.routings()]
    if shares:
        shares_LE = torch.stack(shares)
        log.share_sum_LE = shares_LE if log.share_sum_LE is None else log.share_sum_LE + shares_LE
