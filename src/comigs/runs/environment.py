"""What a run was made with (env.json), so that a result can be traced and made again."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from comigs import __version__, csrc
from comigs.bases.load import Base
from comigs.bases.packed import num_parameters
from comigs.config import SPLITS
from comigs.data.client_text import SplitText
from comigs.data.corpus import Encoder, TokenStore
from comigs.data.prepare import ClientData, Outline
from comigs.errors import UserError
from comigs.runs.folder import RunFolder

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def environment(base: Base, data: Mapping[str, ClientData | Outline]) -> dict[str, Any]:
    """Return versions, commit, machine, base and text of a run, as JSON."""
    # Results differ in their last bits with any of these, so a run that cannot be repeated exactly
    # can at least be told apart.
    # The package may run from its source, where it is not installed.
    versions = {"comigs": __version__} | {name: version(name) for name in PACKAGES}
    return {
        "versions": versions | {"python": platform.python_version()},
        "commit": _commit(),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(base.device),
            "threads": torch.get_num_threads(),
        },
        "command": [Path(sys.argv[0]).name, *map(without_folders, sys.argv[1:])],
        "device": str(base.device),
        "experts": csrc.way(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "base_fingerprint": base.fingerprint,
        "base_parameters": num_parameters(base.model),
        "tokenizer": base.encoder.id,
        "chats": base.encoder.chats.id,
        "data": describe(data),
    }


def without_folders(word: str) -> str:
    """Return a word of a command line without the folders of this machine, whose names may tell
    something: "/home/ann/clinic.toml" is "clinic.toml".
    """
    return re.sub(r"""(?:~|(?<![\w.:/]))/(?:[^"',=]*/)?""", "", word)


def require_same_base(folder: RunFolder, base: Base) -> None:
    """Raise UserError where what is loaded now is not what the run began with."""
    if folder.environment()["base_fingerprint"] != base.fingerprint:
        raise UserError(
            f'{folder.path}: base "{base.name}" is not the one this run began with '
            "(its weights differ)"
        )


def require_one_base(folders: Sequence[RunFolder], instead: str) -> None:
    """Raise UserError where a run has no round yet, or where two were trained on different bases;
    what is said of these ends with `instead`.
    """
    for folder in folders:
        folder.require_a_round()
    first, *others = folders
    for other in others:
        if other.environment()["base_fingerprint"] != first.environment()["base_fingerprint"]:
            raise UserError(
                f"{other.path}: trained on another base than {first.path} (or in another "
                f"precision); {instead}"
            )


def require_no_federation(folder: RunFolder, instead: str) -> None:
    """Raise UserError, which ends with `instead`, where text and models of a run are elsewhere."""
    if "federation" in folder.environment():
        raise UserError(
            f"{folder.path}: of a federation, whose text and models are on its devices; {instead}"
        )


def require_same_chats(folder: RunFolder, encoder: Encoder) -> None:
    """Raise UserError where chats would become other tokens than those the run began with.

    A base's fingerprint is of its weights and its tokenizer, and its template may change without
    them. Runs from before say nothing of it.
    """
    if folder.environment().get("chats", encoder.chats.id) != encoder.chats.id:
        raise UserError(
            f"{folder.path}: the base's chat template, or what ends an answer, has changed since "
            "this run began, or comigs cuts chats otherwise; put it back, give it as "
            "base.chat_template in the run's config.toml, or start a new run"
        )


def describe(data: Mapping[str, ClientData | Outline]) -> dict[str, Any]:
    """Return how much text each client has in each split, and its hash; nothing of the text.

    Tokens are counted only where the text is tokenized.
    """
    described: dict[str, Any] = {}
    for name, client in data.items():
        described[name] = {}
        for split in SPLITS:
            parts = getattr(client, split)
            if parts:
                described[name][split] = _amounts(parts)
    return described


def _amounts(parts: Sequence[TokenStore | SplitText]) -> dict[str, Any]:
    tokens = [part.num_tokens for part in parts if isinstance(part, TokenStore)]
    hashes = [part.text_sha256 for part in parts]
    # One hash stands for many: where everybody has everybody's text, a list for each client would
    # be quadratic in clients.
    if len(hashes) > 1:
        hashes = [hashlib.sha256("".join(hashes).encode()).hexdigest()]
    return ({"tokens": sum(tokens)} if tokens else {}) | {
        "bytes": sum(part.num_bytes for part in parts),
        "documents": sum(part.num_documents for part in parts),
        "sha256": hashes,
    }


def _commit() -> str | None:
    """Return the commit of the source this package runs from, with "+changes" where it differs.

    An installed package has none.
    """
    try:
        if _git("ls-files", Path(__file__).name) == "":
            return None
        changes = _git("status", "--porcelain", "--untracked-files=no", ".")
        return _git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def processor(device: torch.device) -> str:
    """Return the name of what computes there, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        return said or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    board = Path("/proc/device-tree/model")  # where a processor of ARM says none
    if board.exists():
        return board.read_text(encoding="utf-8").rstrip("\0")
    return platform.processor() or platform.machine()
