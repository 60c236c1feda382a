"""The steps of the shared phase: DP-SGD (1607.00133), with the document as its unit.

Each document gives one gradient, over all tensors that learn together, cut to the length `clip`.
The sum of a step's has noise added, and is divided by the number of documents that is expected, not
by the number that came. Whatever is made of it from there on, AdamW's moments too, says no more of
a text than these noised sums do.

A document's loss is the mean over its own tokens. A mean over the tokens of the batch would divide
its gradient by the lengths of its neighbours, so that one document could move those of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comigs.client.loss import autocast, sum_cross_entropy, windows_on
from comigs.client.round_log import Outcome, RoundLog
from comigs.client.state import TrainState
from comigs.client.steps import MethodHooks, OnStep, StepSettings, gradients_for
from comigs.data.batches import Batch
from comigs.data.documents import Documents
from comigs.experts.attach import Attachment
from comigs.privacy.noise import gaussian, poisson_sample


@dataclass(frozen=True)
class Mechanism:
    """The mechanism is how documents become a step.

    documents: of which each joins a step by itself.
    sampling_rate: the probability of a document to be in a step. noise_multiplier: the noise's
    standard deviation over `clip`. random: the generator of each step, by its number.
    """

    documents: Documents
    sampling_rate: float
    noise_multiplier: float
    clip: float
    random: Callable[[int], np.random.Generator]


def shared_round(
    attachment: Attachment,
    state: TrainState,
    settings: StepSettings,
    mechanism: Mechanism,
    hooks: MethodHooks,
    on_step: OnStep,
) -> RoundLog:
    """Take a round's noised steps, and return what they measured, which is not to leave."""
    log = RoundLog()
    for _ in range(settings.client.steps):
        log.learning_rate = settings.rate("experts", state.local_steps)
        outcome = noised_step(attachment, state, settings, mechanism, hooks)
        state.local_steps += 1
        log.local_steps += 1
        # A step that nobody was drawn for has noise and no loss.
        if outcome.tokens:
            log.note(outcome)
            on_step("experts", outcome.nats)
    return log


def noised_step(
    attachment: Attachment,
    state: TrainState,
    settings: StepSettings,
    mechanism: Mechanism,
    hooks: MethodHooks,
) -> Outcome:
    """Take one AdamW step on a noised mean, and return what was measured, as means per token."""
    # Who is in the step is as secret as the noise, so both come from one generator.
    random, documents = mechanism.random(state.local_steps), mechanism.documents
    drawn = poisson_sample(random, len(documents), mechanism.sampling_rate)
    windows = (documents.window(int(number), random) for number in drawn)
    with gradients_for(state, ("experts",), hooks.trains):
        learning = [tensor for tensor in state.of("experts") if tensor.requires_grad]
        sums, outcome = clipped_sum(attachment, learning, windows, mechanism.clip, settings.dtype)

        # The noise is as long as one document's gradient may be, whoever is there.
        deviation = mechanism.noise_multiplier * mechanism.clip
        expected = mechanism.sampling_rate * len(documents)
        for tensor, total in zip(learning, sums, strict=True):
            if deviation:
                noise = gaussian(random, tuple(total.shape), deviation)
                total += torch.from_numpy(noise).to(total)
            tensor.grad = total / expected
        if hooks.penalty is not None:
            hooks.penalty().backward()  # of the tensors alone, not of text
        optimizer = state.optimizers["experts"]
        for group in optimizer.param_groups:
            group["lr"] = settings.rate("experts", state.local_steps)
        optimizer.step()
    return outcome


def clipped_sum(
    attachment: Attachment,
    learning: Sequence[Tensor],
    windows: Iterable[Batch | None],
    clip: float,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Outcome]:
    """Return the sum of the documents' gradients, each cut to `clip`, and what was measured.

    One document more or less changes the sum by `clip` at most, in the l2 norm over all tensors
    together. windows: one of each document, None where nothing of it is learnt.
    """
    sums = [torch.zeros_like(tensor) for tensor in learning]
    device, tokens, nats = attachment.model.device, 0, 0.0
    for batch in windows:
        if batch is None:
            continue
        # One window at a time gives one document's gradient by itself, with any base and method.
        window = windows_on(device, batch)
        with autocast(dtype, device):
            loss = sum_cross_entropy(attachment.model, window) / batch.num_learnt
        gradients = torch.autograd.grad(loss, learning)
        # In double precision, or the squares of small numbers are 0 and nothing would be cut.
        squares = [gradient.double().square().sum() for gradient in gradients]
        norm = math.sqrt(float(torch.stack(squares).sum()))
        # What is not finite has no direction to be cut to; it counts for nothing.
        if not math.isfinite(norm):
            continue
        factor = min(1.0, clip / norm) if norm else 1.0
        for total, gradient in zip(sums, gradients, strict=True):
            total.add_(gradient, alpha=factor)
        tokens += batch.num_learnt
        nats += float(loss.detach()) * batch.num_learnt
    return sums, Outcome(tokens, nats / max(1, tokens))
