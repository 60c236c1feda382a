"""What a run was made with, so that a result can be traced and made again."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from comigs.bases.load import Base
from comigs.config import SPLITS
from comigs.data.corpus import TokenStore
from comigs.data.prepare import ClientData, Outline, SplitText
from comigs.experts import csrc


def environment(base: Base, data: Mapping[str, ClientData | Outline]) -> dict[str, Any]:
    """What a run was made with: versions, commit, machine, base and text."""
    return {
        "versions": {
            n: version(n) for n in ("comigs", "torch", "transformers", "tokenizers", "numpy")
        }
        | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "threads": torch.get_num_threads(),
        },
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": str(base.device),
        "experts": csrc.way(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "base_fingerprint": base.fingerprint,
        "base_parameters": sum(p.numel() for p in base.model.parameters()),
        "tokenizer": base.encoder.id,
        "data": describe(data),
    }


def describe(data: Mapping[str, ClientData | Outline]) -> dict[str, Any]:
    """Per client and split: how much text, and its hash. No text. Tokens only where it is
    tokenised.
    """
    return {
        name: {split: _amounts(stores) for split in SPLITS if (stores := getattr(client, split))}
        for name, client in data.items()
    }


def _amounts(parts: Sequence[TokenStore | SplitText]) -> dict[str, Any]:
    tokens = [p.num_tokens for p in parts if isinstance(p, TokenStore)]
    return ({"tokens": sum(tokens)} if tokens else {}) | {
        "bytes": sum(p.num_bytes for p in parts),
        "documents": sum(p.num_documents for p in parts),
        "sha256": [
            parts[0].text_sha256 if len(parts) == 1 else _of_all(p.text_sha256 for p in parts)
        ],
    }


def _of_all(hashes: Iterable[str]) -> str:
    """One hash of many: where everybody has everybody's text, a list for each would be quadratic in
    clients.
    """
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _commit() -> str | None:
    """Commit of the source this package runs from, with "+changes" where it differs; None for an
    installed package.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) == "":
            return None
        changes = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
