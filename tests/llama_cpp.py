"""llama.cpp itself, from the wheel xllamacpp: logits, tokens and greedy text of a GGUF.

xllamacpp gives a server; its shared object has llama.h's functions as well, which give logits. Its
structs are passed as words, and the defaults are compared with what llama.h says first, so that a
wheel whose structs are laid out otherwise is noticed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp.xllamacpp as wheel
from torch import Tensor

CONTEXT = {0: 512, 1: 2048, 2: 512, 3: 1, 10: 2**32 - 1, 13: 2**32 - 1, 26: 1, 27: 1}
N_CTX, N_BATCH, N_UBATCH, THREADS, BATCH_THREADS, FLASH, TYPE_K, TYPE_V = 0, 1, 2, 7, 8, 13, 26, 27
F32, F16 = 0, 1


class Words(ctypes.Structure):
    """A struct of llama.h that is passed by value, as 32-bit words, and some more than it has."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@functools.cache
def library() -> Any:
    """llama.h's functions, with what they take and give."""
    lib = ctypes.CDLL(wheel.__file__)
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    text, real = ctypes.c_char_p, ctypes.c_float
    kinds: dict[str, tuple[Any, list[Any]]] = {
        "llama_context_default_params": (Words, []),
        "llama_model_default_params": (Words, []),
        "llama_model_load_from_file": (pointer, [text, Words]),
        "llama_init_from_model": (pointer, [pointer, Words]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, integer]),
        "llama_batch_init": (Batch, [integer, integer, integer]),
        "llama_batch_free": (None, [Batch]),
        "llama_decode": (integer, [pointer, Batch]),
        "llama_get_logits": (ctypes.POINTER(real), [pointer]),
        "llama_adapter_lora_init": (pointer, [pointer, text]),
        "llama_set_adapters_lora": (integer, [pointer, pointer, ctypes.c_size_t, pointer]),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_tokenize": (
            integer,
            [
                pointer,
                text,
                integer,
                ctypes.POINTER(integer),
                integer,
                ctypes.c_bool,
                ctypes.c_bool,
            ],
        ),
    }
    for name, (gives, takes) in kinds.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = gives, takes
    lib.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, text, pointer)(lambda *_: None)
    lib.llama_log_set(ctypes.cast(lib.quiet, pointer), None)
    defaults = lib.llama_context_default_params().words
    assert {at: defaults[at] for at in CONTEXT} == CONTEXT, "xllamacpp has another llama.h"
    return lib


class Model:
    """A GGUF in llama.cpp, with nothing that rounds: no flash attention, a cache in float32."""

    def __init__(self, path: Path, adapter: Path | None, context: int) -> None:
        lib = self.lib = library()
        self.model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        assert self.model, f"llama.cpp does not load {path}"
        settings = lib.llama_context_default_params()
        chosen = {N_CTX: context, N_BATCH: context, N_UBATCH: context, THREADS: 1, BATCH_THREADS: 1}
        for at, value in {**chosen, FLASH: 0, TYPE_K: F32, TYPE_V: F32}.items():
            settings.words[at] = value
        self.context = lib.llama_init_from_model(self.model, settings)
        assert self.context and lib.llama_n_ctx(self.context) >= context
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert lora, f"llama.cpp does not load {adapter}"
            loras, scales = (ctypes.c_void_p * 1)(lora), (ctypes.c_float * 1)(1.0)
            assert lib.llama_set_adapters_lora(self.context, loras, 1, scales) == 0

    def logits(self, ids: list[int]) -> Tensor:
        """(L, V) of these tokens, each window in a sequence of its own."""
        lib, count = self.lib, len(ids)
        lib.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        lib.llama_get_memory.argtypes, lib.llama_get_memory.restype = (
            [ctypes.c_void_p],
            ctypes.c_void_p,
        )
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        assert lib.llama_decode(self.context, batch) == 0
        found = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (count, self.size)).copy()
        lib.llama_batch_free(batch)
        return torch.from_numpy(found)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text, in which special tokens that are written out stay text."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(
            self.vocabulary, raw, len(raw), room, len(room), False, False
        )
        assert count >= 0
        return list(room[:count])

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp ends a text at this token."""
        return bool(self.lib.llama_vocab_is_eog(self.vocabulary, token))

    def greedy(self, ids: list[int], count: int, once: bool = False) -> list[int]:
        """The likeliest tokens that follow; each at most once, where a text would go in circles."""
        found = list(ids)
        for _ in range(count):
            logits_V = self.logits(found)[-1]
            if once:
                logits_V[found] = -torch.inf
            found.append(int(logits_V.argmax()))
        return found[len(ids) :]


@contextmanager
def llama_cpp(path: Path, adapter: Path | None = None, context: int = 256) -> Iterator[Model]:
    """A GGUF loaded in llama.cpp, with an adapter on it."""
    model = Model(path, adapter, context)
    try:
        yield model
    finally:
        model.lib.llama_free(model.context)
        model.lib.llama_model_free(model.model)
