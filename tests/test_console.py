"""What is shown of a run in which not everybody is asked, or answers."""

from __future__ import annotations

from io import StringIO

from rich.console import Console as RichConsole

from comigs.app.console import Console
from tests.fake_engine import GONE, Numbers, rounds_of


def shown(tmp_path, engine, **tree):
    """What the run prints where there is no terminal."""
    console, file = Console(), StringIO()
    console.out = RichConsole(file=file, width=80, highlight=False)

    def report(event):
        if console.config is None:
            console.config = engine.folder.config()
        console.report(event)

    rounds_of(tmp_path, engine, report=report, **tree)
    return file.getvalue()


def test_absences_and_who_is_left_out_are_said(tmp_path):
    engine = Numbers("ada bob", lambda name, task, reply: GONE if name == "bob" else reply)
    out = shown(tmp_path, engine, rounds=4)
    for round in (1, 2, 3):
        assert f"round {round}/4  bob  absent: {GONE}\n" in out
    assert (
        out.count("left-out: client bob: nothing usable came from it 3 times in a row") == 1
        and "round 4/4  bob" not in out
    )


def test_a_round_that_is_asked_again_says_why_and_an_absence_at_the_end_is_named_so(tmp_path):
    asked = []

    def trouble(name, task, reply):
        asked.append((name, task.round))
        gone = (task.round == 2 and asked.count((name, 2)) == 1) or not task.train
        return GONE if name == "bob" and gone else reply

    out = shown(tmp_path, Numbers("ada bob", trouble), rounds=2, participation={"min_clients": 2})
    assert f"round 2: 1 of the 2 uploads it needs; asking again (bob: {GONE})\n" in out
    assert f"last exchange  bob  absent: {GONE}\n" in out


def test_only_those_that_were_asked_are_shown_and_the_bar_counts_them(tmp_path):
    engine = Numbers("ada bob cyd dan")
    config = {"rounds": 3, "participation": {"clients_per_round": 2}}
    out = shown(tmp_path, engine, **config)
    for round in (1, 2, 3):
        trained = [
            line
            for line in out.splitlines()
            if line.startswith(f"round {round}/3") and "train" in line
        ]
        assert [line.split()[2] for line in trained] == list(engine.tasks[round - 1])
    console = Console(engine.folder.config())
    assert [console._before(round) for round in (1, 2, 3, 4)] == [
        0,
        2,
        4,
        6,
    ] and console._total() == 10
