"""This module says when a simulated client is there: by a Markov chain, by a trace, or always."""

from __future__ import annotations

import math
from bisect import bisect_right

from comigs.config import Condition, read_trace
from comigs.errors import UserError
from comigs.seeds import generator


class TraceEnds(UserError):
    """A run lasts longer than a client's trace."""


class Availability:
    """The availability of one client: it is there or away from one switch to the next."""

    def __init__(self, condition: Condition, seed: int, client: str) -> None:
        """Begin at second 0. A Markov chain begins as it is on average."""
        self._client, self._on, self._off = client, condition.on, condition.off
        self._random = generator(seed, "conditions", "availability", client)
        self._times, self._ends = [0.0], math.inf
        self._first = True
        if condition.trace is not None:
            switches = read_trace(condition.trace)[client]
            # A line that says what holds already is no switch.
            self._first, self._ends = switches[0][1], switches[-1][0]
            state = self._first
            for seconds, available in switches[1:]:
                if available != state:
                    self._times.append(seconds)
                    state = available
        elif self._on is not None and self._off is not None:
            self._first = self._random.random() < self._on / (self._on + self._off)

    def at(self, seconds: float) -> bool:
        """Return whether the client is there. Raises UserError beyond the end of its trace."""
        return self._first == (self._index(seconds) % 2 == 0)

    def next_switch(self, seconds: float) -> float:
        """Return when the client next comes or goes after a moment; infinite where it never does.

        Raises UserError beyond the end of its trace.
        """
        index = self._index(seconds)
        return self._times[index + 1] if index + 1 < len(self._times) else self._ends

    def lost_after(self, seconds: float) -> float:
        """Return when the client, who is there at a moment, next goes away."""
        switch = self.next_switch(seconds)
        return math.inf if switch == self._ends else switch

    def _index(self, seconds: float) -> int:
        """Return the number of the last switch up to a moment."""
        if seconds >= self._ends:
            raise TraceEnds(
                f"conditions.trace: client {self._client}'s ends at second {self._ends:g}, but the "
                f"run is at second {seconds:g}; every whole round is kept. Start a new run with a "
                "trace that covers it"
            )
        # A chain is drawn as far as it is asked for, always in the same order.
        while self._on is not None and self._times[-1] <= seconds:
            is_on = self._first == (len(self._times) % 2 == 1)
            mean = self._on if is_on else self._off
            assert mean is not None
            self._times.append(self._times[-1] + float(self._random.exponential(mean)))
        return bisect_right(self._times, seconds) - 1
