"""Signs that a run is going wrong: collapsed router, drifting generalists, overfitting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from comigs.methods.merging import mean
from comigs.methods.method import Download, Tensors, Upload
from comigs.runs.metrics import Evaluation, Line, RoundEnd, Train, TrainReport, Warned

COLLAPSED = 0.97  # mean routing weight of one expert in a block, over a whole evaluation
DRIFT_ROUNDS = 3  # rounds in a row in which drift grew
DRIFT_GROWTH = 1.5  # and by which factor over them
OVERFIT_ROUNDS = 3  # evaluations in a row in which valid rose while train fell
OVERFIT_RISE = 0.01  # and by how many nats per token over them


def drift(uploads: Mapping[str, Upload], sent: Mapping[str, Download]) -> float | None:
    """Return how far clients pull apart in a round.

    Drift is the mean distance of an upload from the mean upload, over the length of the mean's step
    away from the mean of what the clients were sent. It is None in the first round, which starts
    from no download, and where clients share nothing or unequal shapes, or none sent anything.
    """
    starts = [sent.get(name, {}) for name in uploads]
    shapes = set()
    # Many clients start from one and the same download, whose shapes are looked at once.
    for tensors in {id(tensors): tensors for tensors in (*uploads.values(), *starts)}.values():
        shapes.add(frozenset((slot, tensor.shape) for slot, tensor in tensors.items()))
    if len(shapes) != 1 or frozenset() in shapes:
        return None
    center = mean(uploads.values())
    step = _distance(center, mean(starts))
    apart = sum(_distance(upload, center) for upload in uploads.values()) / len(uploads)
    return apart / step if step > 0 else None


def _distance(a: Tensors, b: Tensors) -> float:
    squares = (float((tensor.double() - b[slot]).square().sum()) for slot, tensor in a.items())
    return math.sqrt(sum(squares))


def diagnose(
    history: Sequence[Line], new: Sequence[Line], beside_others: bool = False
) -> list[Warned]:
    """Return the warnings for what the `new` lines show in the light of `history`.

    Each sign is told once per client and run. beside_others: a client's last expert is the others',
    and all of the weight for that, or for what is a client's own, is as it should be.
    """
    known = {(line.sign, line.client) for line in history if isinstance(line, Warned)}
    everything = [*history, *new]
    found = [*_collapsed_routers(new, beside_others), *_drifting_generalists(everything, new)]
    found += _overfitting(everything, new)
    return [warning for warning in found if (warning.sign, warning.client) not in known]


def _collapsed_routers(new: Sequence[Line], beside_others: bool) -> Iterator[Warned]:
    # Each client is told once, with all the layers of its first evaluation that shows it.
    told = set()
    for line in new:
        if not isinstance(line, Evaluation) or line.client in told:
            continue
        collapsed = []
        for layer, shares in enumerate(line.expert_share_by_layer or ()):
            own = shares[:-1] if beside_others else shares
            if len(own) > 1 and max(own) > COLLAPSED * sum(own):
                collapsed.append(str(layer))
        if collapsed:
            told.add(line.client)
            yield Warned(
                round=line.round,
                client=line.client,
                sign="collapsed-router",
                message=f"one expert takes over {COLLAPSED:.0%} of the weight in layers "
                f"{', '.join(collapsed)}; try a lower client.router_lr, fewer client.router_steps "
                "or a higher client.balance_coef",
            )


def _drifting_generalists(everything: Sequence[Line], new: Sequence[Line]) -> Iterator[Warned]:
    # Drift does no harm where clients adopt less than half of the mean: most of it is not used.
    if not any(isinstance(line, RoundEnd) for line in new):
        return
    trained = [line for line in new if isinstance(line, TrainReport)]
    adopted = [line.adopted_share for line in trained if line.adopted_share is not None]
    if adopted and sum(adopted) < len(adopted) / 2:
        return

    # A sign is a steady and considerable growth; drift goes up and down in any run.
    last = [
        (line.round, line.drift)
        for line in everything
        if isinstance(line, RoundEnd) and line.drift is not None
    ][-DRIFT_ROUNDS - 1 :]
    values = [value for _, value in last]
    long_enough = len(values) == DRIFT_ROUNDS + 1
    if long_enough and _rises(values) and values[-1] > DRIFT_GROWTH * values[0]:
        yield Warned(
            round=last[-1][0],
            client=None,
            sign="drifting-generalists",
            message=f"clients' uploads pull apart: drift rose from {values[0]:.2f} to "
            f"{values[-1]:.2f} in {DRIFT_ROUNDS} rounds; try fewer client.steps per round, a lower "
            "client.lr, or fewer generalists",
        )


def _overfitting(everything: Sequence[Line], new: Sequence[Line]) -> Iterator[Warned]:
    # Only clients that were measured just now can show something new.
    just_measured = {
        line.client for line in new if isinstance(line, Evaluation) and line.split == "valid"
    }
    measured: dict[str, list[tuple[int, float]]] = {client: [] for client in just_measured}
    trained: dict[str, dict[int, float | None]] = {client: {} for client in just_measured}
    for line in everything:
        if isinstance(line, Train) and line.client in just_measured:
            trained[line.client][line.round] = line.train_nats_per_token
        elif isinstance(line, Evaluation) and line.client in just_measured:
            own = line.split == "valid" and line.model == "personal"
            if own and line.nats_per_token is not None:
                measured[line.client].append((line.round, line.nats_per_token))

    # Valid must rise while train falls over the same rounds: a rise of both is something else.
    for client in sorted(just_measured):
        last = measured[client][-OVERFIT_ROUNDS - 1 :]
        losses = [nats for _, nats in last]
        train = [trained[client].get(round) for round, _ in last]
        seen = [nats for nats in train if nats is not None]
        long_enough = len(losses) == OVERFIT_ROUNDS + 1 and len(seen) >= 2
        if not long_enough or not _rises(losses) or losses[-1] - losses[0] <= OVERFIT_RISE:
            continue
        if seen[-1] < seen[0]:
            yield Warned(
                round=last[-1][0],
                client=client,
                sign="overfitting",
                message=f"valid rose from {losses[0]:.3f} to {losses[-1]:.3f} nats per token while "
                "train fell; try fewer rounds, fewer specialists, a lower rank, or more text",
            )


def _rises(values: Sequence[float]) -> bool:
    return all(later > earlier for earlier, later in pairwise(values))
