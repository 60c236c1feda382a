"""What routing by token is worth: each client's own model, and the same with mean weights.

    python benchmarks/routing_worth.py runs/main/multilingual/comigs/seed-42 [fr de]

A row for each client of a run with a router whose tokens use all experts: test perplexity of its
mixture; of the same experts with each block's mean weights of that text for every token; and by how
much the second is higher. Mean weights are read from test itself, so that they are the best that
this text could know.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from comigs.app import api
from comigs.data.corpus import TokenStore
from comigs.data.prepare import prepare
from comigs.personal.model import PersonalModel
from comigs.slots import Slot


def main() -> None:
    """Print the table of one run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("clients", nargs="*")
    given = parser.parse_args()
    folder = api.open_run(given.run)
    config, base = folder.config(), api.base_of(folder)
    texts = prepare(config, base.encoder)

    table = Table("client", "mixture", "mean weights", "routing is worth")
    for name in given.clients or [client.name for client in config.clients]:
        model = PersonalModel(folder, name, base)
        mixture, constant = perplexities(model, texts.load(name).test)
        model.close()
        worth = f"{100 * (constant / mixture - 1):+.1f} %"
        table.add_row(name, f"{mixture:.2f}", f"{constant:.2f}", worth)
    Console(width=110).print(table)


def perplexities(model: PersonalModel, test: Sequence[TokenStore]) -> tuple[float, float]:
    """Return the perplexity of a model, and of the same with each block's mean weights."""
    routed = model.evaluate(test)
    weights_LE, experts = routed.expert_share_LE, model.config.experts
    if weights_LE is None:
        raise SystemExit("needs a router")
    if experts.top_k != len(weights_LE[0]):
        raise SystemExit(f"needs tokens that use all {len(weights_LE[0])} experts")

    # A router that reads a constant, with the logarithms of the weights, has them for every token.
    # What a gate does to the weights is in their means already.
    for layer, weights_E in enumerate(weights_LE):
        router = Slot(layer, "mlp", "router", "W")
        logits_E = torch.tensor(weights_E).log().to(model.tensors[router])
        model.tensors[router] = logits_E[:, None]
        model.tensors.pop(Slot(layer, "mlp", "router", "B"), None)
    model.attachment.settings = experts.model_copy(update={"routing": "client"})
    return routed.perplexity, model.evaluate(test).perplexity


if __name__ == "__main__":
    main()
