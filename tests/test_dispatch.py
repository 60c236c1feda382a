"""Who is waited for and who is not, by a clock of the test's own: here a fault of the rules fails
and does not hang.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from comigs.server.dispatch import NO_NODE, Dispatcher, Polling, Question
from comigs.server.transport import GONE

PATIENCE, DEADLINE, WORK, LONG = 30.0, 100.0, 5.0, 1000.0


@dataclass(frozen=True)
class Said:
    round: int


class World:
    """Clients that answer after WORK seconds, and when they are online: the transport and clock.

    back: client -> the second from which it is there; who is not in it always is.
    """

    def __init__(self, names, **back):
        self.names, self.back, self.time, self.work = names.split(), back, 0.0, WORK
        self.out = {}

    def now(self):
        return self.time

    def wait(self, seconds, until):
        assert self.time < LONG, "it waits without end"
        self.time += seconds

    def online(self, nodes):
        there = [n for n in nodes if self.time >= self.back.get(self.names[n], 0)]
        return dict.fromkeys(there, "")

    def push(self, node, message, life):
        id = f"{node} {message}"
        self.out[id] = self.time + self.work, Said(len(message))
        return id

    def pull(self, ids):
        return {id: self.out[id][1] for id in ids if self.time >= self.out[id][0]}


def dispatcher_of(world, invited=None):
    nodes = {name: node for node, name in enumerate(world.names) if name in (invited or name)}
    return Dispatcher(world, nodes, Polling(DEADLINE, PATIENCE), lambda event: None, world)


def questions(names, round=1):
    def accept(said, size):
        return said

    # The message of round r is r bytes.
    return {name: Question(name, round, lambda: bytes(round), accept) for name in names.split()}


def ask(world, names, invited=None, **how):
    return dispatcher_of(world, invited).gather(questions(names), **how)


def test_who_has_no_node_is_not_waited_for():
    """Nor the others because of it; neither first nor when it is asked again alone."""
    world = World("ada bob")
    came = ask(world, "ada bob", invited="ada")
    assert (
        set(came.answers) == {"ada"} and came.absent == {"bob": NO_NODE} and world.time < PATIENCE
    )
    assert ask(World("ada bob"), "bob", invited="ada").absent == {"bob": NO_NODE}


def test_who_nobody_can_replace_is_waited_for_however_long_it_is_away():
    """A round of two that needs both: one has answered, the other is off for an hour."""
    world = World("ada bob", bob=LONG / 2)
    assert set(ask(world, "bob").answers) == {"bob"} and world.time > LONG / 2


@pytest.mark.parametrize("asked", ["cyd", "bob cyd"])
def test_who_was_drawn_and_is_away_is_absent_after_a_while_where_others_are_online(asked):
    world = World("ada bob cyd", bob=LONG, cyd=LONG)
    came = ask(world, asked, replaceable=True)
    assert came.absent == dict.fromkeys(asked.split(), GONE)
    assert PATIENCE <= world.time < PATIENCE + 2


def test_who_comes_back_in_that_while_is_asked():
    world = World("ada bob", bob=PATIENCE / 2)
    assert set(ask(world, "bob", replaceable=True).answers) == {"bob"}


def test_with_nobody_online_it_waits_and_whoever_is_back_soon_after_the_first_is_asked():
    back = LONG / 2
    world = World("ada bob", ada=back, bob=back + PATIENCE / 2)
    assert set(ask(world, "bob", replaceable=True).answers) == {"bob"}
    world = World("ada bob", ada=back, bob=LONG)
    assert ask(world, "bob", replaceable=True).absent == {"bob": GONE}
    assert back + PATIENCE - 2 < world.time < back + PATIENCE + 2


def test_who_is_still_at_work_for_an_earlier_round_is_waited_for():
    """It can be asked when it has answered that, and has not failed until then."""
    world = World("ada bob")
    world.work = DEADLINE + 2 * PATIENCE
    dispatcher = dispatcher_of(world)
    assert "deadline" in dispatcher.gather(questions("bob")).absent["bob"]
    world.work = WORK
    came = dispatcher.gather(questions("bob", 2), replaceable=True)
    assert came.late["bob"].round == 1 and came.answers["bob"].round == 2
