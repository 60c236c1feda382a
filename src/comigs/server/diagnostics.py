"""Signs that a run is going wrong, read off its metrics: collapsed router, drifting generalists,
overfitting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

Line = Mapping[str, Any]  # of metrics.jsonl

COLLAPSED = 0.97  # mean routing weight of one expert in a block, over a whole evaluation
DRIFT_ROUNDS = 3  # rounds in a row in which drift grew
DRIFT_GROWTH = 1.5  # and by which factor over them
OVERFIT_ROUNDS = 3  # evaluations in a row in which valid rose while train fell
OVERFIT_RISE = 0.01  # and by how many nats per token over them


def failure_signs(
    history: Sequence[Line], new: Sequence[Line], own_or_rest: bool = False
) -> list[dict[str, Any]]:
    """Warning lines for what the `new` lines show in the light of `history`; each sign once per
    client and run.

    own_or_rest: routers weigh a single own expert and the rest of the world, where all of either is
    as it should be.
    """
    known = {(line["sign"], line["client"]) for line in history if line["kind"] == "warning"}
    everything = [*history, *new]
    collapsed = () if own_or_rest else _collapsed_routers(new)
    found = [*collapsed, *_drift(everything, new), *_overfitting(everything, new)]
    return [sign for sign in found if (sign["sign"], sign["client"]) not in known]


def _warning(sign: str, round: int, client: str | None, message: str) -> dict[str, Any]:
    return {"kind": "warning", "round": round, "client": client, "sign": sign, "message": message}


def _collapsed_routers(new: Sequence[Line]) -> Iterator[dict[str, Any]]:
    seen = set()
    for line in new:
        shares = line.get("expert_share_by_layer") if line["kind"] == "evaluation" else None
        collapsed = [
            layer for layer, experts in enumerate(shares or []) if max(experts) > COLLAPSED
        ]
        if shares and collapsed and line["client"] not in seen:
            seen.add(line["client"])
            layers = ", ".join(map(str, collapsed))
            yield _warning(
                "collapsed-router", line["round"], line["client"],
                f"one expert takes over {COLLAPSED:.0%} of the weight in layers {layers}; "
                "try a lower client.router_lr, fewer client.router_steps or a higher client.balance_coef",
            )  # fmt: skip


def _drift(everything: Sequence[Line], new: Sequence[Line]) -> Iterator[dict[str, Any]]:
    if not any(line["kind"] == "server" for line in new):
        return
    adopted = [
        x["adopted_share"]
        for x in new
        if x["kind"] == "train" and x.get("adopted_share") is not None
    ]
    if adopted and sum(adopted) < len(adopted) / 2:  # most of the mean is not used
        return
    drifts = [
        (x["round"], x["drift"])
        for x in everything
        if x["kind"] == "server" and x["drift"] is not None
    ]
    last = [value for _, value in drifts[-DRIFT_ROUNDS - 1 :]]
    if len(last) == DRIFT_ROUNDS + 1 and _rises(last) and last[-1] > DRIFT_GROWTH * last[0]:
        yield _warning(
            "drifting-generalists", drifts[-1][0], None,
            f"clients' uploads pull apart: drift rose from {last[0]:.2f} to {last[-1]:.2f} in {DRIFT_ROUNDS} rounds; "
            "try fewer client.steps per round, a lower client.lr, or fewer generalists",
        )  # fmt: skip


def _overfitting(everything: Sequence[Line], new: Sequence[Line]) -> Iterator[dict[str, Any]]:
    clients = {x["client"] for x in new if x["kind"] == "evaluation" and x["split"] == "valid"}
    measured, trained = defaultdict[str, list[Line]](list), defaultdict[str, list[Line]](list)
    for x in everything:
        if x["kind"] == "train" and x["client"] in clients:
            trained[x["client"]].append(x)
        elif x["kind"] == "evaluation" and x["split"] == "valid" and x["model"] == "personal":
            measured[x["client"]].append(x)
    for client in sorted(clients):
        valid = measured[client][-OVERFIT_ROUNDS - 1 :]
        rounds, losses = [x["round"] for x in valid], [x["nats_per_token"] for x in valid]
        train = [x["train_nats_per_token"] for x in trained[client] if x["round"] in rounds]
        long_enough = len(losses) == OVERFIT_ROUNDS + 1 and len(train) >= 2
        if (
            long_enough
            and _rises(losses)
            and losses[-1] - losses[0] > OVERFIT_RISE
            and train[-1] < train[0]
        ):
            yield _warning(
                "overfitting", rounds[-1], client,
                f"valid rose from {losses[0]:.3f} to {losses[-1]:.3f} nats per token while train fell; "
                "try fewer rounds, fewer specialists, a lower rank, or more text",
            )  # fmt: skip


def _rises(values: Sequence[float]) -> bool:
    return all(b > a for a, b in pairwise(values))
