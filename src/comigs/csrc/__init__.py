"""This module compiles and calls what is written in C, for CPUs (docs/decisions/0012).

In C are the hidden layer of all experts, cross-entropy, attention, norms, rotation, and products
with one token. They are compiled for this machine when first wanted, by the C compiler that is
there ($CC, else cc), and kept in the cache folder.
Without a compiler, or with COMIGS_COMPILED=0, PyTorch does the same more slowly.
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
LANES = 16  # a multiple of that in vectors.h
FLAGS = shlex.split("-std=gnu11 -O3 -ffp-contract=fast -fno-math-errno -fPIC -shared")


def way(device: torch.device) -> Literal["C", "PyTorch"]:
    """Return what experts and cross-entropy are computed in, for a run's record."""
    return "C" if device.type == "cpu" and library() is not None else "PyTorch"


def takes(tensor: Tensor) -> bool:
    """Return whether C is there, and for numbers of this dtype and device."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and library() is not None
    )


def cross_entropy(logits_CV: Tensor, targets_C: Tensor, to_gradient: bool) -> Tensor:
    """Return -log p(target) (C,) in float32.

    Where `to_gradient`, the logits become the gradient of that, p - [is target]. The logits are
    contiguous and of a dtype that `takes` allows. Raises IndexError for a target that is no column.
    """
    C, V = logits_CV.shape
    lowest, highest = (int(target) for target in torch.aminmax(targets_C))
    if lowest < 0 or highest >= V:
        raise IndexError(f"targets from {lowest} to {highest}, but logits have {V} columns")
    nats_C, targets_C = torch.empty(C), targets_C.contiguous()
    sizes = (C, V, logits_CV.dtype == torch.bfloat16, to_gradient, torch.get_num_threads())
    call("cross_entropy", *sizes, logits_CV, targets_C, nats_C)
    return nats_C


def call(function: str, *arguments: Any) -> None:
    """Call a C function of `library`, which must be there.

    Whole numbers go as int64_t, floats as double, and tensors as their addresses.
    """
    getattr(library(), function)(*map(_in_c, arguments))


def _in_c(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers are; None where there is no tensor."""
    return None if tensor is None else tensor.data_ptr()


def number(function: str, *arguments: int) -> int:
    """Return the whole number that a C function of `library` makes of these."""
    called = getattr(library(), function)
    called.restype = ctypes.c_int64
    return int(called(*map(ctypes.c_int64, arguments)))


def library() -> ctypes.CDLL | None:
    """Return the library for this machine; None where there is none."""
    made = attempt()
    return made if isinstance(made, ctypes.CDLL) else None


@cache
def attempt() -> ctypes.CDLL | str:
    """Return the library, or why there is none, in a few words."""
    if os.environ.get("COMIGS_COMPILED") == "0":
        return "COMIGS_COMPILED is 0"
    compiler, problem = shlex.split(os.environ.get("CC", "")) or ["cc"], ""
    for more in _ways():
        try:
            return ctypes.CDLL(str(_compiled(compiler, [*FLAGS, *more])))
        except FileNotFoundError:
            return f"no C compiler here ({compiler[0]})"
        except subprocess.CalledProcessError as error:
            problem = f"nothing can be compiled here ({_first_error(error)})"
        except (OSError, subprocess.SubprocessError) as error:
            problem = f"nothing can be compiled here ({error})"
    return problem


def is_parallel() -> bool:
    """Return whether the library, which must be there, uses more than one thread."""
    return bool(number("is_parallel"))


def _ways() -> Iterator[list[str]]:
    """Yield what to compile with, the fastest first.

    Apple's compiler has no library of OpenMP, but PyTorch brings one; without any, the library has
    one thread. Compilers may not know this processor, either.
    """
    theirs = Path(torch.__file__).parent / "lib" / "libomp.dylib"
    threads = [["-fopenmp"]]
    if theirs.exists():
        threads.append(["-Xclang", "-fopenmp", str(theirs), f"-Wl,-rpath,{theirs.parent}"])
    for more in (*threads, []):
        yield [*more, "-march=native"]
        yield more


def _first_error(error: subprocess.CalledProcessError) -> str:
    """Return the first line in which a compiler says what is wrong, else what Python says."""
    said: bytes = error.stderr
    for line in said.decode(errors="replace").splitlines():
        if "error" in line:
            return line.strip()
    return str(error)


def _compiled(compiler: Sequence[str], flags: Sequence[str]) -> Path:
    """Return the compiled file in the cache folder, compiling it where it is not there.

    Its name says what it was made from, for and by. Raises OSError and SubprocessError.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.[ch]"))]
    made_from = "\0".join([*texts, *compiler, *flags, *_processor()])
    key = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    file = cache_folder() / "compiled" / f"{key}.so"
    if not file.exists():
        # It is compiled beside its place and moved there, for other processes may look for it.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            sources = [str(path) for path in sorted(HERE.glob("*.c"))]
            command = [*compiler, *flags, *sources, "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(made, file)
    return file


def _processor() -> list[str]:
    """Return what -march=native depends on: a home folder may be on several machines."""
    cpuinfo, kinds = Path("/proc/cpuinfo"), set[str]()
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "flags", "Features")):
                kinds.add(line)
    return [platform.machine(), platform.node(), *sorted(kinds)]
