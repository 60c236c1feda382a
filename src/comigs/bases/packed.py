"""Frozen linears in few bits, as blocks of GGUF: 32 numbers of a row with a scale of their own.

"int8" is Q8_0, 34 bytes for 32 numbers; "int4" is Q4_1 or Q4_0, whichever is nearer to a weight,
20 or 18 bytes. They are packed as the `gguf` package packs them, so that the numbers of a file of
one of these types stay what they were. A product unpacks its weight into a buffer that all linears
of a base share, and the backward pass unpacks it once more.

O and I are a linear's outputs and inputs.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from pathlib import Path
from typing import Any, Literal

import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from comigs import csrc
from comigs.bases.base import Architecture, linear_size
from comigs.errors import UserError

Weights = Literal["whole", "int8", "int4"]
TYPES = {"int8": (Type.Q8_0,), "int4": (Type.Q4_1, Type.Q4_0)}
GROUP = 32  # numbers of a row that share a scale


class Buffer:
    """A buffer is the memory into which a base's weights are unpacked, one after the other."""

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def of(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory of this shape, which is the next caller's, too."""
        size = math.prod(shape)
        if (self._held.dtype, self._held.device) != (dtype, device) or self._held.numel() < size:
            self._held = torch.empty(size, dtype=dtype, device=device)
        return self._held[:size].view(shape)


class PackedLinear(nn.Linear):
    """A packed linear computes what an nn.Linear of its unpacked weight does.

    blocks (O, bytes) is the weight, in blocks of `form`.
    """

    def __init__(self, linear: nn.Linear, types: tuple[Type, ...], buffer: Buffer) -> None:
        """Pack a linear whose weight is of real numbers, by the nearest of these types."""
        nn.Module.__init__(self)  # an nn.Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.buffer = linear.bias, buffer
        weight = linear.weight.detach().float().cpu().numpy()
        packed = {type: quantize(weight, type) for type in types}
        errors = {t: float(((dequantize(p, t) - weight) ** 2).sum()) for t, p in packed.items()}
        self.form = min(errors, key=lambda type: errors[type])
        self.blocks: Tensor
        self.register_buffer("blocks", torch.from_numpy(packed[self.form]).to(linear.weight.device))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (O, I) in float32."""
        return self._unpack(torch.empty(self._shape, device=self.blocks.device))

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (O, I), which is there until another linear's is unpacked."""
        return self._unpack(self.buffer.of(self._shape, dtype, self.blocks.device))

    def _unpack(self, out: Tensor) -> Tensor:
        if csrc.takes(out):
            sizes = (out.numel() // GROUP, int(self.form), out.dtype == torch.bfloat16)
            csrc.call("unpack", *sizes, torch.get_num_threads(), self.blocks, out)
            return out
        return out.copy_(plain_numbers(self.blocks, self.form).view(self._shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., I) @ weight^T + bias, (..., O)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():
            return F.linear(x, self.unpacked(x.dtype), self._bias(x.dtype))
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.unpacked(x.dtype), linear._bias(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.linear.unpacked(grad.dtype), None


def plain_numbers(blocks: Tensor, type: Type) -> Tensor:
    """Return the numbers (groups, 32) of blocks (..., bytes) in float32."""
    # A block is its scale, for Q4_1 its least number, and then its numbers in units of the scale.
    size = {Type.Q8_0: 34, Type.Q4_1: 20, Type.Q4_0: 18}[type]
    blocks = blocks.view(-1, size)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    if type == Type.Q8_0:
        return blocks[:, 2:].view(torch.int8).float() * scale
    least, halves = -8 * scale, blocks[:, 2:]
    if type == Type.Q4_1:
        least, halves = blocks[:, 2:4].contiguous().view(torch.float16).float(), blocks[:, 4:]
    # A byte has a number of the first half of its group, and above it one of the second.
    return torch.cat([halves & 15, halves >> 4], dim=1).float() * scale + least


def pack(model: Any, architecture: Architecture, weights: Weights, name: str) -> None:
    """Pack the linears of a model's blocks, one after the other. name: the base's, for the error.

    Raises UserError, before anything is packed, where they cannot be.
    """
    if weights == "whole":
        return
    blocks, sites = model.get_submodule(architecture.blocks), architecture.mlp_linears().values()
    paths = [*(f"{architecture.mlp}.{name}" for name in sites), *architecture.attention.values()]
    for path in paths:
        linear = blocks[0].get_submodule(path)
        if not isinstance(linear, nn.Linear) or linear.in_features % GROUP:
            inputs, _ = linear_size(linear)
            raise UserError(
                f'base.weights: given "{weights}", but {path} of base {name} is a '
                f"{type(linear).__name__} of {inputs} inputs, and what can be packed is a Linear "
                f"of a multiple of {GROUP}; allowed: whole"
            )
    # Each whole weight is let go before the next one is read.
    buffer, types = Buffer(), TYPES[weights]
    for block in blocks:
        for path in paths:
            linear = block.get_submodule(path)
            block.set_submodule(path, PackedLinear(linear, types, buffer))
            forget(linear.weight)


def unpack(model: Any) -> None:
    """Put plain linears of float32 in the place of packed ones."""
    for path, packed in [*model.named_modules()]:
        if isinstance(packed, PackedLinear):
            linear = nn.Linear(1, 1, bias=False)
            linear.in_features, linear.out_features = packed.in_features, packed.out_features
            linear.weight, linear.bias = nn.Parameter(packed.weight, False), packed.bias
            model.set_submodule(path, linear)


def num_parameters(model: Any) -> int:
    """Return how many numbers a model has, packed or not."""
    packed = (module for module in model.modules() if isinstance(module, PackedLinear))
    sizes = [linear.in_features * linear.out_features for linear in packed]
    total: int = sum(sizes) + sum(parameter.numel() for parameter in model.parameters())
    return total


def forget(tensor: Tensor) -> None:
    """Give back the memory of a file's tensor that was read; it can be read again."""
    # what a GPU holds has an address, too, but is not the kernel's to take
    if tensor.device.type != "cpu" or not _is_mapped(tensor.data_ptr()):
        return
    # A file that is mapped stays in memory as far as it was read, until its last tensor goes.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        size = ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)


def _is_mapped(address: int) -> bool:
    """Return whether Linux says that memory is a file's."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(encoding="utf-8").splitlines():
            span, _, _, _, inode, *_ = line.split()
            start, end = span.split("-")
            if int(start, 16) <= address < int(end, 16):
                return inode != "0"
    return False
