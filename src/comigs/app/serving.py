"""Serving the models of several runs: what has to be right before the server takes a request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from comigs.app import api
from comigs.app.setup import ignore
from comigs.errors import UserError
from comigs.personal.serve import catalogue, server
from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.keys import is_loopback, read_keys
from comigs.personal.serve.scheduler import Limits
from comigs.runs.environment import require_one_base, require_same_base
from comigs.runs.folder import RunFolder
from comigs.text import Say, plural


@dataclass(frozen=True)
class Address:
    """Where a server listens, and who may ask it.

    keys: a TOML file with a key for each model; a must where other machines can reach the host.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None


def serve(
    runs: Sequence[Path | RunFolder],
    address: Address,
    dtype: str = "float32",
    limits: Limits | None = None,
    bounds: Bounds | None = None,
    say: Say = ignore,
) -> None:
    """Serve the models of all clients of these runs on one base, with OpenAI's API.

    runs: folders, or what `open_run` opened, where a reader has something to say. dtype: "float32"
    or "bfloat16", of the base. Returns after SIGINT or SIGTERM. Raises UserError.
    """
    if address.keys is None and not is_loopback(address.host):
        raise UserError(
            f"--host {address.host}: others can reach it, so every model needs a key; give them "
            "with --keys FILE"
        )
    # What is wrong with runs, keys and port is said before the base is loaded.
    folders = [api.open_run(run) for run in runs]
    require_one_base(folders, "one server has one base: serve them apart")
    ids = catalogue.ids_of(folders)
    keys = None if address.keys is None else read_keys(address.keys, ids)
    with closing(server.listen(address.host, address.port)) as listener:
        # All runs were trained on the same base, so any of them says which it is.
        base = api.base_of(folders[0])
        for folder in folders:
            require_same_base(folder, base)
        bounds = bounds or Bounds(context=2048)
        window = int(base.model.config.max_position_embeddings)
        bounds = replace(bounds, context=min(bounds.context, window))
        base = catalogue.in_dtype(base, getattr(torch, dtype))
        models = catalogue.read_models(folders, base, say)
        host = f"[{address.host}]" if ":" in address.host else address.host
        where = f"http://{host}:{listener.getsockname()[1]}/v1"

        def ready() -> None:
            for id in models:
                say(f"  {id}")
            count = plural(len(models), "model")
            say(f"{count} on {base.name} in {dtype} at {where}; stop with Ctrl-C")

        offer = server.Offer(base, models, limits or Limits(), bounds, keys)
        server.serve(offer, listener, ready)
    say("stopped")
