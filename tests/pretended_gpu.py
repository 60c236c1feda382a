"""A GPU that is none: tensors that say they are on cuda:0, are told apart from those on the CPU as
a GPU tells them, and compute on the CPU. What would stop on a GPU for a tensor that is elsewhere
stops here.

Tensors with a dimension may not meet across devices, but where CUDA lets them: a copy, and indices
that are on the CPU. No memory of such a tensor may be looked at from Python. Speed, rounding and
kernels are the CPU's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
aten = torch.ops.aten
MAY_MEET = (aten.copy_.default, aten._to_copy.default)
MAY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
LOOKS_INSIDE = (Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage)
THERE_IS_ONE = {  # what torch.cuda says where there is a GPU
    **{"is_available": True, "device_count": 1, "current_device": 0},
    **{"mem_get_info": (2**34, 2**34), "memory_reserved": 0, "max_memory_allocated": 1},
    **{"get_device_name": "a pretended GPU", "synchronize": None, "empty_cache": None},
    **{"reset_peak_memory_stats": None, "get_device_capability": (9, 0)},
}


class OnGpu(Tensor):
    """A tensor on the pretended GPU. inner: the same on the CPU, which is what computes."""

    inner: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        """Put a plain tensor's values there."""
        assert not isinstance(inner, OnGpu)
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU what is asked. Raises RuntimeError where devices meet."""
        kwargs = kwargs or {}
        checked = (args, kwargs)
        if func in MAY_MEET:
            checked = ((), {})
        elif func in MAY_INDEX and isinstance(args[0], OnGpu):
            checked = ((args[0], *args[2:]), kwargs)
        for leaf in tree_leaves(checked):
            if isinstance(leaf, Tensor) and not isinstance(leaf, OnGpu) and leaf.dim():
                raise RuntimeError(f"{func}: a tensor of {tuple(leaf.shape)} is on cpu, not {GPU}")
        inside, settings = tree_map(_inner, (args, kwargs))
        out = func(*inside, **settings)
        if func is aten.copy_.default:
            return args[0]
        made = tree_map(lambda leaf: OnGpu(leaf) if isinstance(leaf, Tensor) else leaf, out)
        return return_and_correct_aliasing(func, args, kwargs, made)


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _inner(gradient)  # type: ignore[no-any-return]


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: OnGpu) -> Tensor:
        return x.inner.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient)


class _Placing(TorchFunctionMode):
    """Read "cuda" in calls of torch as the pretended GPU, which torch itself lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, *args, **kwargs)
        if isinstance(first, OnGpu):
            if func in LOOKS_INSIDE:
                raise TypeError(f"{func.__name__}: the tensor is on {GPU}")
            if func is Tensor.tolist:
                return first.inner.tolist()
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                func(*args)
                first.inner = args[1].inner
                return None
        if "device" not in kwargs:
            return func(*args, **kwargs)
        place, needs_grad = _place(kwargs.pop("device")), kwargs.pop("requires_grad", False)
        out = func(*args, **kwargs)
        if place is not None:
            out = _at(out, place)
        return out.requires_grad_() if needs_grad else out


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnGpu) else leaf


def _place(device: Any) -> torch.device | None:
    if device is None or isinstance(device, torch.device):
        return device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _at(x: Tensor, place: torch.device) -> Tensor:
    if x.device.type == place.type:
        return x
    return (_ToGpu if place.type == "cuda" else _ToCpu).apply(x)  # type: ignore[no-any-return]


def _moved(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do what Tensor.to, cpu or cuda does."""
    place = {Tensor.cpu: torch.device("cpu"), Tensor.cuda: GPU}.get(func)
    place = _place(kwargs.pop("device", place))
    others = []
    for argument in args:
        if isinstance(argument, str | torch.device):
            place = _place(argument)
        elif isinstance(argument, Tensor):
            place = argument.device
            others.append(argument.dtype)
        elif isinstance(argument, torch.dtype):
            others.append(argument)
    kwargs.pop("non_blocking", None)
    if others or kwargs:
        x = Tensor.to(x, *others, **kwargs)
    return x if place is None else _at(x, place)


class _Autocast(torch.autocast):
    """torch's, on the device that computes."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Have a GPU inside, in each thread that is started there, too."""
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    seed, run = torch.default_generator.manual_seed, threading.Thread.run

    def run_placing(thread: threading.Thread) -> None:
        with _Placing():
            run(thread)

    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in THERE_IS_ONE.items():
            stack.enter_context(patch.object(torch.cuda, name, _saying(value)))
        # whether a graph is captured, an optimiser asks of the driver
        stack.enter_context(patch.object(torch.accelerator, "current_accelerator", _saying(None)))
        stack.enter_context(patch.object(torch, "autocast", _Autocast))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: enabled("cpu")))
        stack.enter_context(patch.object(torch, "get_autocast_dtype", lambda *_: dtype("cpu")))
        stack.enter_context(patch.object(torch, "manual_seed", seed))
        stack.enter_context(patch.object(torch.random, "fork_rng", lambda *_, **__: nullcontext()))
        stack.enter_context(patch.object(threading.Thread, "run", run_placing))
        # a parameter that is moved is another one, as its type is
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.enter_context(_Placing())
        yield


def _saying(value: object) -> Callable[..., object]:
    return lambda *_, **__: value
