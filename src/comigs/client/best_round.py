"""A client keeps the tensors of its best round, as its valid says, beside those of the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from comigs.client.state import ClientState
from comigs.slots import Slot, num_specialists


class BestRound:
    """The best round of a client so far: which one it is, and its tensors.

    round: 0 before any was measured. nats: what valid came to in that round, per token.
    adopted_share: of its model, as of `Client`.
    """

    def __init__(self, saved: ClientState) -> None:
        """Go on from what was saved (`parts`); there is nothing before the first measurement.

        A model that the client has no room for any more is forgotten.
        """
        if num_specialists(saved.get("best", ())) > num_specialists(saved.get("experts", ())):
            saved = {}
        score = saved.get("score")
        self.round = 0 if score is None else int(score["round"])
        self.nats = math.inf if score is None else float(score["nats"])
        adopted = None if score is None else score.get("adopted")
        self.adopted_share = None if adopted is None else float(adopted)
        self._tensors: Mapping[str, Tensor] = saved.get("best", {})
        self._is_new = False

    def offer(
        self, round: int, nats: float, tensors: Mapping[Slot, Tensor], adopted: float | None = None
    ) -> None:
        """Keep a round's tensors where valid is lower than ever; of equal rounds the first stays.

        A copy is made, on the CPU, as training goes on with the tensors. adopted: their share.
        """
        if nats < self.nats:
            self.adopted_share = adopted
            copies = {str(slot): t.detach().to("cpu", copy=True) for slot, t in tensors.items()}
            self.round, self.nats, self._tensors, self._is_new = round, nats, copies, True

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """Return what is to be saved: nothing where the best round is saved already."""
        if not self._is_new:
            return {}
        nats = torch.tensor(self.nats, dtype=torch.float64)
        score = {"round": torch.tensor(self.round), "nats": nats}
        if self.adopted_share is not None:
            score["adopted"] = torch.tensor(self.adopted_share, dtype=torch.float64)
        return {"best": self._tensors, "score": score}

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of the best round, by the names of their slots."""
        return self._tensors
