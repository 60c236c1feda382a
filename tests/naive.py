"""The method written down a second time, as slowly and plainly as it can be said. Nothing here is
imported from comigs.

Every expert is a whole MLP of its own, whose weights are the base's plus its LoRA, merged; tokens
are routed one at a time; the logits of all tokens exist at once; AdamW is five lines of numpy.
Tensors go by str(slot):
"LAYER.SITE.PART.MATRIX".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

GPT2_MLP = {"up": "c_fc", "down": "c_proj"}
GPT2_ATTENTION = {"c_attn": "c_attn", "c_proj": "c_proj"}
LLAMA_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
LLAMA_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


def merged(linear: nn.Module, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """W + alpha / sqrt(R) B A, laid out as the module keeps it: Conv1D holds (in, out)."""
    delta = alpha / math.sqrt(A.shape[0]) * (B @ A)
    return linear.weight + (delta if isinstance(linear, nn.Linear) else delta.T)


def choose(logits: Tensor, top_k: int, lead: float = 0.0) -> list[tuple[int, Tensor]]:
    """(expert, weight) of one token from its E logits. The last one is `lead` behind, but not where
    K >= 2 are chosen.
    """
    behind = [logits[e] - lead * (e == len(logits) - 1) for e in range(len(logits))]
    by = behind if top_k == 1 else list(logits)
    order = sorted(range(len(logits)), key=lambda e: -float(by[e].detach()))[:top_k]
    powers = [torch.exp(logit) for logit in behind]
    among = range(len(logits)) if top_k == 1 else order
    return [(e, powers[e] / sum(powers[i] for i in among)) for e in order]


def choose_gated(
    logits: Tensor, top_k: int, lead: float, gate: float | None
) -> list[tuple[int, Tensor]]:
    """(expert, weight) of one token where a router is as far open to the last expert as its gate
    is; None: there is no gate.
    """
    if gate is None:
        return choose(logits, top_k, lead)
    weights: dict[int, Any] = {}
    without = list(logits[:-1])
    for part, chosen in (
        (1 - gate, choose(torch.stack(without), min(top_k, len(without)))),
        (gate, choose(logits, top_k, lead)),
    ):
        for e, weight in chosen:
            weights[e] = weights.get(e, 0) + part * weight
    return list(weights.items())


def balance(logits_TE: Tensor, top_k: int, share: float) -> Tensor:
    """METHOD: E^2 * mean_e(p_e * density_e * factor_e), token by token."""
    T, E = logits_TE.shape
    total = 0
    chosen = [choose(row, top_k) for row in logits_TE]
    for e in range(E):
        p, density = 0, 0.0
        for row, choice in zip(logits_TE, chosen, strict=True):
            weights = dict(choice)
            density += (e in weights) / top_k / T
            if top_k == 1:
                p = p + weights.get(e, 0.0) / T
            else:
                z = [row[i] if i in weights else torch.zeros_like(row[i]) for i in range(E)]
                p = p + torch.exp(z[e]) / sum(map(torch.exp, z)) / T
        if share == 0:
            factor = 1.0
        elif e == 0:
            factor = 1 / (share * E)
        else:
            factor = (E - 1) / ((1 - share) * E)
        total = total + p * density * factor
    return E**2 * total / E


def read_by_the_router(x: Tensor, routing: str) -> list[Tensor]:
    """What decides for each token of x (B, L, D): the token; all tokens of its sequence up to it;
    or nothing at all.
    """
    seen = []
    for sequence in x:
        for t in range(len(sequence)):
            if routing == "token":
                seen.append(sequence[t])
            elif routing == "sequence":
                seen.append(sum(sequence[: t + 1]) / (t + 1))
            else:
                seen.append(torch.ones(1, dtype=x.dtype))
    return seen


class NaiveMixture(nn.Module):
    """sum over the chosen e of w_e(x) * MLP_e(x), each MLP_e a full forward pass of its own."""

    def __init__(
        self,
        mlp: nn.Module,
        layer: int,
        tensors: Mapping[str, Tensor],
        alpha: float,
        top_k: int,
        routing: str,
    ) -> None:
        super().__init__()
        self.mlp, self.top_k, self.routing, self.logits_TE = mlp, top_k, routing, None
        self.lead, self.gate = 0.0, None
        sites = LLAMA_MLP if hasattr(mlp, "gate_proj") else GPT2_MLP
        found = {name.split(".")[2] for name in tensors if name.startswith(f"{layer}.")} - {
            "router",
            "attention",
        }
        parts = sorted(found, key=lambda part: (part[0] == "s", int(part[1:])))
        self.weights = [
            {
                f"{name}.weight": merged(
                    getattr(mlp, name),
                    tensors[f"{layer}.{site}.{part}.A"],
                    tensors[f"{layer}.{site}.{part}.B"],
                    alpha,
                )
                for site, name in sites.items()
            }
            for part in parts
        ]
        self.W = tensors.get(f"{layer}.mlp.router.W")

    def forward(self, x: Tensor) -> Tensor:
        each = [functional_call(self.mlp, weights, (x,)) for weights in self.weights]
        if self.W is None:
            return sum(each) / len(each)
        each_TD = [y.reshape(-1, y.shape[-1]) for y in each]
        self.logits_TE = torch.stack(read_by_the_router(x, self.routing)) @ self.W.T
        rows = [
            sum(w * each_TD[e][t] for e, w in self.choose(row))
            for t, row in enumerate(self.logits_TE)
        ]
        return torch.stack(rows).reshape(x.shape)

    def choose(self, logits: Tensor) -> list[tuple[int, Tensor]]:
        return choose_gated(logits, self.top_k, self.lead, self.gate)


class MergedLinear(nn.Module):
    def __init__(self, linear: nn.Module, A: Tensor, B: Tensor, alpha: float) -> None:
        super().__init__()
        self.linear, self.weight = linear, merged(linear, A, B, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.linear, {"weight": self.weight}, (x,))


def naive_model(
    model: Any,
    tensors: Mapping[Any, Tensor],
    top_k: int,
    alpha: float = 16.0,
    routing: str = "token",
    lead: float = 0.0,
    gate: float | None = None,
) -> Any:
    """A copy of the whole model in which every expert of every block is an MLP of its own."""
    named = {str(slot): tensor for slot, tensor in tensors.items()}
    whole = copy.deepcopy(model)
    is_gpt2 = hasattr(whole, "transformer")
    for layer, block in enumerate(whole.transformer.h if is_gpt2 else whole.model.layers):
        block.mlp = NaiveMixture(block.mlp, layer, named, alpha, top_k, routing)
        block.mlp.lead, block.mlp.gate = lead, gate
        attention = block.attn if is_gpt2 else block.self_attn
        for site, name in (GPT2_ATTENTION if is_gpt2 else LLAMA_ATTENTION).items():
            A, B = (
                named.get(f"{layer}.{site}.attention.A"),
                named.get(f"{layer}.{site}.attention.B"),
            )
            if A is not None and B is not None:
                setattr(attention, name, MergedLinear(getattr(attention, name), A, B, alpha))
    return whole


def mixtures(model: Any) -> list[NaiveMixture]:
    return [module for module in model.modules() if isinstance(module, NaiveMixture)]


def mean_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of -ln p(target), the probabilities written out."""
    flat = logits.reshape(-1, logits.shape[-1])
    probabilities = torch.exp(flat) / torch.exp(flat).sum(dim=-1, keepdim=True)
    return -torch.log(probabilities[torch.arange(len(flat)), targets.reshape(-1)]).mean()


class NumpyAdamW:
    """Decoupled weight decay (1711.05101), bias-corrected moments, eps 1e-8 outside the root."""

    def __init__(self, betas: tuple[float, float], weight_decay: float) -> None:
        self.betas, self.weight_decay = betas, weight_decay
        self.m: dict[str, NDArray[Any]] = {}
        self.v: dict[str, NDArray[Any]] = {}
        self.t: dict[str, int] = {}

    def step(self, name: str, value: NDArray[Any], grad: NDArray[Any], lr: float) -> NDArray[Any]:
        b1, b2 = self.betas
        t = self.t[name] = self.t.get(name, 0) + 1
        m = self.m[name] = b1 * self.m.get(name, np.zeros_like(value)) + (1 - b1) * grad
        v = self.v[name] = b2 * self.v.get(name, np.zeros_like(value)) + (1 - b2) * grad**2
        value = value - lr * self.weight_decay * value
        return value - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def naive_train(
    model: Any,
    start: Mapping[Any, Tensor],
    top_k: int,
    draw: Any,
    *,
    lr: float,
    router_lr: float,
    steps: int,
    total_steps: int,
    router_every: int,
    router_steps: int,
    balance_coef: float,
    share: float,
    betas: tuple[float, float],
    weight_decay: float,
    schedule: str = "alternating",
) -> tuple[dict[str, Tensor], list[float]]:
    """Bi-level training from scratch: tensors by name after `steps` local steps, and the nats of
    every step in order.

    draw(split, number): inputs and targets as numpy arrays.
    """
    values = {str(slot): tensor.detach().numpy().copy() for slot, tensor in start.items()}
    adam = {True: NumpyAdamW(betas, weight_decay), False: NumpyAdamW(betas, weight_decay)}
    nats = []

    def descend(
        split: str, number: int, groups: tuple[bool, ...], rates: dict[bool, float]
    ) -> None:
        """groups: True is the router, False everything else."""
        differ = any(
            v.any()
            for name, v in values.items()
            if name.endswith(".B") and ".attention." not in name
        )
        tensors = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in values.items()}
        whole = naive_model(model, tensors, top_k)
        inputs, targets = (torch.from_numpy(part) for part in draw(split, number)[:2])
        loss = mean_nats(whole(inputs).logits, targets)
        nats.append(loss.item())
        terms = [
            balance(m.logits_TE, top_k, share) for m in mixtures(whole) if m.logits_TE is not None
        ]
        (loss + balance_coef * sum(terms) / max(len(terms), 1)).backward()
        for name, tensor in tensors.items():
            is_router = ".router." in name
            if is_router in groups and (differ or not is_router):
                grad = np.zeros_like(values[name]) if tensor.grad is None else tensor.grad.numpy()
                values[name] = adam[is_router].step(name, values[name], grad, rates[is_router])

    has_router, router_number = any(".router." in name for name in values), 0
    for number in range(steps):
        cosine = lr * (0.1 + 0.9 * (1 + math.cos(math.pi * number / total_steps)) / 2)
        rates = {True: router_lr, False: cosine}
        descend("train", number, (False,) if schedule == "alternating" else (False, True), rates)
        if schedule != "joint" and has_router and (number + 1) % router_every == 0:
            for _ in range(router_steps):
                descend("valid", router_number, (True,), rates)
                router_number += 1
    return {name: torch.from_numpy(v) for name, v in values.items()}, nats
