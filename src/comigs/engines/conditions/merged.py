"""This module is what simulated clients have added of updates that the server will send again.

A server stacks updates until their client has answered in time. Whoever was late has added them
already, and leaves out what it has, as a real device does.
"""

from __future__ import annotations

from collections.abc import Mapping

from comigs.engines.client_task import added_ranks, unseen
from comigs.methods.method import Download
from comigs.slots import Slot

Ranks = dict[str, int]  # slot of an update -> how many of its ranks were added


class Merged:
    """The ranks of updates that clients have added, as of the last commit and as of this round.

    Whoever is asked twice in a round begins both times from the last commit.
    """

    def __init__(self) -> None:
        self._round = 0
        self._committed: dict[str, Ranks] = {}
        self._new: dict[str, Ranks] = {}

    def begin(self, round: int) -> None:
        """Begin an exchange of a round; what was new before belongs to the commit."""
        if round != self._round:
            self._round, self._committed, self._new = round, self.saved(), {}

    def unseen(self, client: str, download: Download) -> Download:
        """Return a download without what its client has added."""
        ranks = self._committed.get(client, {})
        return unseen(download, {Slot.parse(name): rank for name, rank in ranks.items()})

    def add(self, client: str, download: Download) -> None:
        """Note that a client has added all of a download."""
        self._new[client] = {str(slot): rank for slot, rank in added_ranks(download).items()}

    def undo(self, client: str) -> None:
        """Forget what a client did in this round."""
        self._new.pop(client, None)

    def deliver(self, client: str) -> None:
        """Note that the server knows from now on what a client has."""
        self._new[client] = {}

    def saved(self) -> dict[str, Ranks]:
        """Return what was added in all, by client."""
        both = self._committed | self._new
        return {client: ranks for client, ranks in both.items() if ranks}

    def restore(self, saved: Mapping[str, Ranks]) -> None:
        """Go on from what `saved` has returned."""
        self._committed = dict(saved)
