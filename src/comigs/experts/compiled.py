"""The hidden layer of all experts in C (hidden.c): on CPUs, in float32, for the activations of the usual models.

Compiled for this machine when first wanted, by the C compiler that is there ($CC, else cc), and kept in the cache
folder. Without a compiler, or with COMIGS_COMPILED=0, `chunks` does the same more slowly (docs/decisions/0012).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from comigs.experts.layer import Gradients, Layer, by_expert, flat_of
from comigs.files import cache_folder

SOURCE = Path(__file__).with_name("hidden.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
LANES = 16  # hidden.c's: I is a multiple
LARGEST_RANK = 256  # hidden.c's


class _Expert(ctypes.Structure):
    """hidden.c's `expert`."""

    _fields_ = (
        ("rank", c_int64), ("low", c_void_p * 2), ("B", c_void_p * 2), ("A", c_void_p), ("out_low", c_void_p),
        ("grad_low", c_void_p * 2), ("grad_B", c_void_p * 2), ("grad_A", c_void_p),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    """hidden.c's `layer`."""

    _fields_ = (
        *((name, c_int64) for name in ("T", "I", "E", "S", "half", "act", "all", "threads")),
        ("frozen", c_void_p * 2), ("weights", c_void_p), ("mixed", c_void_p), ("grad_frozen", c_void_p * 2),
        ("grad_weights", c_void_p), ("experts", POINTER(_Expert)),
    )  # fmt: skip


def takes(layer: Layer) -> bool:
    """Whether it is compiled, and for such a layer."""
    width = layer.frozen[0]
    return (
        width.device.type == "cpu"
        and layer.act.in_c is not None
        and layer.weights_TE.dtype == torch.float32
        and width.dtype in (torch.float32, torch.bfloat16)
        and width.shape[1] % LANES == 0
        and max(len(lora.A_RI) for lora in layer.experts) <= LARGEST_RANK
        and library() is not None
    )


def forward(layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """As `chunks.forward`."""
    layer = _contiguous(layer)
    mixed_TI = torch.empty_like(layer.frozen[0])
    lows = [layer.weights_TE.new_zeros(len(lora.A_RI), len(mixed_TI)) for lora in layer.experts]
    call = _call(layer, mixed_TI, lows)
    _c("forward", call)
    return mixed_TI, lows


def backward(
    layer: Layer, grad_mixed_TI: Tensor, grad_lows: Sequence[Tensor], weights_wanted: bool, wanted: Sequence[bool]
) -> Gradients:
    """As `chunks.backward`. Each thread sums up its own tokens; the sums are added in the threads' order."""
    layer, grad_mixed_TI = _contiguous(layer), grad_mixed_TI.contiguous()
    grad_lows = [grad.contiguous() for grad in grad_lows]
    num_frozen, threads = len(layer.frozen), torch.get_num_threads()
    grad_weights = torch.zeros_like(layer.weights_TE) if weights_wanted else None
    grad_frozen = [torch.empty_like(f_TI) for f_TI in layer.frozen]
    is_low = ([True, False] * num_frozen + [False]) * len(layer.experts)  # has a column per token, not a sum over them
    flat = [
        t.new_zeros(t.shape if low else (threads, *t.shape)) if is_wanted else None
        for t, low, is_wanted in zip(flat_of(layer.experts), is_low, wanted, strict=True)
    ]
    call = _call(layer, grad_mixed_TI, grad_lows)
    call.grad_weights = _at(grad_weights)
    for s, grad in enumerate(grad_frozen):
        call.grad_frozen[s] = _at(grad)
    for e, total in enumerate(by_expert(flat, num_frozen)):
        call.experts[e].grad_A = _at(total.A_RI)
        for s, (low, B) in enumerate(total.inputs):
            call.experts[e].grad_low[s], call.experts[e].grad_B[s] = _at(low), _at(B)
    _c("backward", call)
    return Gradients(grad_weights, grad_frozen, [t if t is None or t.dim() == 2 else t.sum(dim=0) for t in flat])


def _contiguous(layer: Layer) -> Layer:
    flat = [t.contiguous() for t in flat_of(layer.experts)]
    return layer._replace(
        frozen=[f_TI.contiguous() for f_TI in layer.frozen],
        weights_TE=layer.weights_TE.contiguous(),
        experts=by_expert(flat, len(layer.frozen)),
    )


def _call(layer: Layer, mixed_TI: Tensor, lows: Sequence[Tensor]) -> _Layer:
    """Points to the tensors, which must outlive it."""
    experts = (_Expert * len(layer.experts))()
    for expert, lora, low in zip(experts, layer.experts, lows, strict=True):
        expert.rank, expert.A, expert.out_low = len(lora.A_RI), _at(lora.A_RI), _at(low)
        for s, (low_RT, B_RI) in enumerate(lora.inputs):
            expert.low[s], expert.B[s] = _at(low_RT), _at(B_RI)
    tokens, width = layer.frozen[0].shape
    call = _Layer(
        T=tokens, I=width, E=len(experts), S=len(layer.frozen), half=mixed_TI.dtype == torch.bfloat16,
        act=layer.act.in_c, all=layer.used == 1, threads=torch.get_num_threads(),
        weights=_at(layer.weights_TE), mixed=_at(mixed_TI), experts=experts,
    )  # fmt: skip
    for s, f_TI in enumerate(layer.frozen):
        call.frozen[s] = _at(f_TI)
    return call


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _c(function: str, call: _Layer) -> None:
    getattr(library(), function)(ctypes.byref(call))


def way(device: torch.device) -> Literal["C", "PyTorch"]:
    """What the hidden layer of experts is worked out in, for a run's record."""
    return "C" if device.type == "cpu" and library() is not None else "PyTorch"


@cache
def library() -> ctypes.CDLL | None:
    """hidden.c for this machine; None where it is switched off or cannot be compiled."""
    if os.environ.get("COMIGS_COMPILED") == "0":
        return None
    compiler = shlex.split(os.environ.get("CC", "cc"))
    for flags in ([*FLAGS, "-fopenmp"], [*FLAGS]):  # without OpenMP, as Apple's compiler is, with one thread
        try:
            return ctypes.CDLL(str(_compiled(compiler, flags)))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _compiled(compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """In the cache folder under a name that says what it was made from, for and by. Raises OSError, SubprocessError."""
    what = "\0".join([SOURCE.read_text(encoding="utf-8"), *compiler, *flags, *_processor()])
    file = cache_folder() / "compiled" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            command = [*compiler, *flags, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(made, file)
    return file


def _processor() -> Iterator[str]:
    """What -march=native depends on: a home folder may be on several machines."""
    yield platform.machine()
    yield platform.node()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        yield from sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
