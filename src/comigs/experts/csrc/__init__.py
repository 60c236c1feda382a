"""What is written in C, for CPUs: the hidden layer of all experts, and cross-entropy
(docs/decisions/0012).

Compiled for this machine when first wanted, by the C compiler that is there ($CC, else cc), and
kept in the cache folder. Without a compiler, or with COMIGS_COMPILED=0, PyTorch does the same more
slowly.
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
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from comigs.files import cache_folder

HERE = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
)


def way(device: torch.device) -> Literal["C", "PyTorch"]:
    """What experts and cross-entropy are worked out in, for a run's record."""
    return "C" if device.type == "cpu" and library() is not None else "PyTorch"


def takes(tensor: Tensor) -> bool:
    """Whether C is there, and for numbers of this dtype and device."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and library() is not None
    )


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, to_gradient: bool) -> Tensor:
    """-log p(target) (C,) in float32. to_gradient: the logits become its gradient, p - [is target].

    logits_CV: contiguous, of a dtype that `takes` allows. Raises IndexError for a target that is no
    column.
    """
    C, V = logits_CV.shape
    lowest, highest = (int(target) for target in torch.aminmax(targets_C))
    if lowest < 0 or highest >= V:
        raise IndexError(f"targets from {lowest} to {highest}, but logits have {V} columns")
    nats_C, targets_C = torch.empty(C), targets_C.contiguous()
    sizes = (C, V, logits_CV.dtype == torch.bfloat16, to_gradient, torch.get_num_threads())
    at = (logits_CV.data_ptr(), targets_C.data_ptr(), nats_C.data_ptr())
    call("cross_entropy", *map(ctypes.c_int64, sizes), *map(ctypes.c_void_p, at))
    return nats_C


def call(function: str, *arguments: Any) -> None:
    """One that is in C, where `library` is there."""
    getattr(library(), function)(*arguments)


def library() -> ctypes.CDLL | None:
    """For this machine; None where it is switched off or cannot be compiled."""
    made = attempt()
    return made if isinstance(made, ctypes.CDLL) else None


@cache
def attempt() -> ctypes.CDLL | str:
    """The library, or why there is none, in a few words."""
    if os.environ.get("COMIGS_COMPILED") == "0":
        return "COMIGS_COMPILED is 0"
    compiler, problem = shlex.split(os.environ.get("CC", "cc")), ""
    for flags in (
        [*FLAGS, "-fopenmp"],
        [*FLAGS],
    ):  # without OpenMP, as Apple's compiler is, with one thread
        try:
            return ctypes.CDLL(str(_compiled(compiler, flags)))
        except FileNotFoundError:
            problem = f"no C compiler here ({compiler[0]})"
        except (OSError, subprocess.SubprocessError) as error:
            problem = f"nothing can be compiled here ({error})"
    return problem


def _compiled(compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """In the cache folder under a name that says what it was made from, for and by. Raises OSError,
    SubprocessError.
    """
    sources = [str(path) for path in sorted(HERE.glob("*.c"))]
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.[ch]"))]
    what = "\0".join([*texts, *compiler, *flags, *_processor()])
    file = cache_folder() / "compiled" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not file.exists():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            command = [*compiler, *flags, *sources, "-o", str(made), "-lm"]
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
        yield from sorted(
            {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        )
