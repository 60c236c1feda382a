"""This module alone knows what `B @ A` means.

Shapes: A (R, in), B (out, R), delta = scaling * B @ A (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # A (R, in), B (out, R)


def joint_strength(count: int, summed: bool) -> float:
    """Return the factor that makes `count` experts of rank R act like one LoRA of rank count * R.

    Under rsLoRA each would have alpha / sqrt(R), the one LoRA alpha / sqrt(count R). Their mean
    (weights 1 / count) is weaker than it by sqrt(count), for independent updates of equal size, and
    their sum as much stronger.
    """
    return 1 / math.sqrt(count) if summed else math.sqrt(count)


def stack(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Return one pair whose product is exactly sum_k w_k B_k @ A_k, of the sum of the ranks.

    A's are its rows, w_k B_k its columns.
    """
    A_RI = torch.cat([A for A, _ in pairs])
    B_OR = torch.cat([w * B for (_, B), w in zip(pairs, weights, strict=True)], dim=1)
    return A_RI, B_OR


def factorize(pair: Pair, rank: int) -> Pair:
    """Return the best pair of rank `rank` for B @ A in the Frobenius norm, its SVD cut off.

    A has orthonormal rows, B carries the singular values. Signs are fixed (largest entry of each
    row of A positive), so that equal products give equal factors. B @ A is never formed: QR of both
    factors leaves an SVD of (R, R), O((in + out) R^2).
    """
    # The pair is padded first, so that rows beyond the product's rank are orthonormal too: a zero
    # row beside a zero column of B would never get a gradient.
    A_RI, B_OR = pad(pair, max(rank, len(pair[0])))
    left_OR, r_RR = torch.linalg.qr(B_OR)
    right_IR, s_RR = torch.linalg.qr(A_RI.T)
    U, S, Vh = torch.linalg.svd(r_RR @ s_RR.T)
    kept = min(rank, len(S))
    A = Vh[:kept] @ right_IR.T
    B = left_OR @ (U[:, :kept] * S[:kept])
    largest = A.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(A.gather(1, largest) < 0, -1.0, 1.0).to(A.dtype)
    return pad((A * sign, B * sign.T), rank)


def pad(pair: Pair, rank: int) -> Pair:
    """Return the same product with zero rows and columns up to `rank`."""
    (A_RI, B_OR), more = pair, rank - pair[0].shape[0]
    return (
        torch.cat([A_RI, A_RI.new_zeros(more, A_RI.shape[1])]),
        torch.cat([B_OR, B_OR.new_zeros(B_OR.shape[0], more)], dim=1),
    )


def first_rows(pair: Pair, rank: int) -> Pair:
    """Return the pair's first `rank` rows of A and columns of B."""
    return pair[0][:rank], pair[1][:, :rank]


def product_norm(pair: Pair) -> float:
    """Return the Frobenius norm of B @ A, from Gram matrices (R, R): tr(B^T B A A^T)^(1/2)."""
    A_RI, B_OR = pair
    return math.sqrt(max(0.0, float(((B_OR.T @ B_OR) * (A_RI @ A_RI.T).T).sum())))
