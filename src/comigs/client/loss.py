"""What is made of logits goes through a frozen head here, a chunk of tokens at a time.

T tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comigs import csrc
from comigs.data.batches import Batch
from comigs.data.examples import IGNORED
from comigs.experts.hidden_torch import even_slices
from comigs.experts.router import reading_examples

CHUNK = 1 << 24  # logits that exist at once: as bfloat16 32 MB
CHUNK_ELSEWHERE = 1 << 27  # a GPU reads the whole head for each chunk
BLOCK = 1 << 17  # logits that a CPU thread works on: as float32 512 KB, a core's second cache


SumNats = Callable[[slice, Tensor, torch.dtype, bool], Tensor]
"""(tokens of this chunk, their logits (C, V), the type to compute in, whether to) -> a sum of nats.
Where it is to, it turns the logits into the sum's gradient, in place.
"""


class _ThroughHead(torch.autograd.Function):
    """A sum of nats over tokens, which keeps nothing but the gradient to the hidden states.

    The head is frozen, so that is all that the backward pass needs.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head: Any, vocabulary: int, sum_nats: SumNats
    ) -> Tensor:
        wants_grad = ctx.needs_input_grad[0]
        dtype = torch.float32
        if hidden_TD.dtype == torch.float64:
            dtype = torch.float64
        total = torch.zeros((), dtype=dtype, device=hidden_TD.device)
        grad_TD = torch.empty_like(hidden_TD) if wants_grad else None
        chunk = largest_chunk(hidden_TD.device)
        for rows in even_slices(len(hidden_TD), chunk // vocabulary):
            # Each chunk's logits live only until the gradient to its hidden states is known.
            h_CD = hidden_TD[rows].detach().requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                logits_CV = head(h_CD)
            total += sum_nats(rows, logits_CV.detach(), dtype, wants_grad)
            if grad_TD is not None:
                (grad_TD[rows],) = torch.autograd.grad(logits_CV, h_CD, logits_CV.detach())
        if grad_TD is not None:
            ctx.save_for_backward(grad_TD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_TD,) = ctx.saved_tensors
        return grad_TD * grads[0].to(grad_TD.dtype), None, None, None


def largest_chunk(device: torch.device) -> int:
    """Return how many logits exist at once on a device."""
    return CHUNK if device.type == "cpu" else CHUNK_ELSEWHERE


def _sum_nats(
    logits_CV: Tensor, targets_C: Tensor, dtype: torch.dtype, to_gradient: bool
) -> Tensor:
    """Return the sum of -log p(target), computed in `dtype`.

    to_gradient: turn the logits into the sum's gradient, p - [is target], in place.
    """
    if csrc.takes(logits_CV) and dtype == torch.float32:
        return csrc.cross_entropy(logits_CV, targets_C, to_gradient).sum()

    blocks = blocks_of_rows(logits_CV)
    buffer = logits_CV.new_empty(blocks[0].stop, logits_CV.shape[1], dtype=dtype)
    targets_C1 = targets_C[:, None]
    chosen_C1 = logits_CV.gather(-1, targets_C1).to(dtype)
    log_norm_C1 = torch.empty_like(chosen_C1)
    for rows in blocks:
        # The largest logit is subtracted first, so that no exponential overflows.
        p = buffer[: rows.stop - rows.start].copy_(logits_CV[rows])
        largest = p.amax(dim=-1, keepdim=True)
        norm = p.sub_(largest).exp_().sum(dim=-1, keepdim=True)
        log_norm_C1[rows] = norm.log() + largest
        if to_gradient:
            minus_one = torch.full_like(norm, -1)
            logits_CV[rows] = p.div_(norm).scatter_add_(-1, targets_C1[rows], minus_one)
    return (log_norm_C1 - chosen_C1).sum()


def blocks_of_rows(logits_CV: Tensor) -> list[slice]:
    """Return the rows to compute at once.

    A processor's caches are small: it works on blocks of rows that fit. Other devices take all.
    """
    C, V = logits_CV.shape
    rows_at_once = C
    if logits_CV.device.type == "cpu":
        rows_at_once = BLOCK * torch.get_num_threads() // V
    return even_slices(C, rows_at_once)


class Windows(NamedTuple):
    """These are windows on the device: as data/batches.py's Batch, in tensors."""

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None

    @property
    def learnt(self) -> Tensor | None:
        """The numbers (N,) of the tokens whose target is learnt; None: all of them."""
        return None if self.positions is None else learnt_of(self.targets)


def learnt_of(targets: Tensor) -> Tensor:
    """Return the numbers (N,) of the targets that are learnt. A GPU is waited for."""
    return (targets.flatten() != IGNORED).nonzero().squeeze(1)


def windows_on(device: torch.device, batch: Batch, rows: slice = slice(None)) -> Windows:
    """Return rows of a batch as tensors on a device."""
    inputs, targets, positions = batch
    windows = Windows(
        torch.from_numpy(inputs[rows]).to(device), torch.from_numpy(targets[rows]).to(device)
    )
    if positions is None:
        return windows
    return windows._replace(positions=torch.from_numpy(positions[rows]).to(device))


def micro_batches(batch: Batch, size: int | None, device: torch.device) -> Iterator[Windows]:
    """Yield the batch in pieces of `size` windows, or whole where `size` is None, on the device."""
    size = size or len(batch.inputs)
    for start in range(0, len(batch.inputs), size):
        yield windows_on(device, batch, slice(start, start + size))


def hidden_states(model: Any, windows: Windows) -> Tensor:
    """Return what the model makes of windows before its head, (B, L, D).

    Where positions begin anew, so does attention: transformers makes its mask of them.
    """
    with reading_examples(windows.positions):
        read = model.base_model(
            input_ids=windows.inputs, position_ids=windows.positions, use_cache=False
        )
    hidden: Tensor = read.last_hidden_state
    return hidden


def sum_cross_entropy(model: Any, windows: Windows) -> Tensor:
    """Return the nats of the targets (B, L) given the inputs, summed over tokens: a scalar.

    At most `largest_chunk` logits exist at once, and the head, which is frozen, gets no gradient.
    """
    hidden_TD, targets_T = hidden_states(model, windows).flatten(0, 1), windows.targets.flatten()
    return _nats_of(model, hidden_TD, targets_T, windows.learnt)


def cross_entropy_by_window(model: Any, windows: Windows) -> Tensor:
    """Return for each window (B,) the nats of those of its targets that are learnt."""
    sums = []
    for hidden_LD, targets_L in zip(hidden_states(model, windows), windows.targets, strict=True):
        sums.append(_nats_of(model, hidden_LD, targets_L, learnt_of(targets_L)))
    return torch.stack(sums)


def _nats_of(model: Any, hidden_TD: Tensor, targets_T: Tensor, learnt: Tensor | None) -> Tensor:
    """Return the nats of targets after these hidden states; learnt: of which, None: of all."""
    # Where nothing is learnt, nothing goes through the head.
    if learnt is not None:
        hidden_TD, targets_T = hidden_TD[learnt], targets_T[learnt]

    def sum_nats(rows: slice, logits_CV: Tensor, dtype: torch.dtype, to_gradient: bool) -> Tensor:
        return _sum_nats(logits_CV, targets_T[rows], dtype, to_gradient)

    return sum_through_head(model, hidden_TD, sum_nats)


def sum_through_head(model: Any, hidden_TD: Tensor, sum_nats: SumNats) -> Tensor:
    """Return what `sum_nats` makes of the logits of hidden states, a chunk of tokens at a time."""
    total: Tensor = _ThroughHead.apply(  # type: ignore[no-untyped-call]
        hidden_TD, _head(model), model.config.vocab_size, sum_nats
    )
    return total


def _head(model: Any) -> Any:
    """Return what turns hidden states into logits, scaled or capped as some families do it."""
    linear = model.get_output_embeddings()
    cap = getattr(model.config, "final_logit_softcapping", None)
    scaling = getattr(model.config, "logits_scaling", None)
    if cap is not None:
        return lambda hidden: torch.tanh(linear(hidden) / cap) * cap
    if scaling is not None:
        return lambda hidden: linear(hidden) / scaling
    return linear


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context in which matrix products are bfloat16 where `dtype` is."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
