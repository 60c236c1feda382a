"""Failure signs: each fires on a history that shows it, stays quiet on a healthy one, and is said
once.
"""

from __future__ import annotations

import pytest

from comigs.runs.metrics import Evaluation, RoundEnd, Train
from comigs.server.diagnostics import diagnose
from tests.fake_engine import evaluation_of, train_of

HEALTHY = {
    "shares": [[0.5, 0.5], [0.6, 0.4]],
    "valid": 3.0,
    "train": 3.0,
    "drift": 0.5,
    "adopted": None,
}


def lines_of(round, client="ada", **changes):
    """What a round adds to metrics.jsonl: its training, its drift, and the evaluation of the round
    before.
    """
    shown = {**HEALTHY, **changes}
    seen = {"expert_share_by_layer": shown["shares"], "adopted_share": shown["adopted"]}
    trained = train_of(round, client, shown["train"])
    measured = evaluation_of(round, client, "valid", "personal", shown["valid"])
    return [
        Train(**trained | seen, uploaded_bytes=0, downloaded_bytes=0),
        Evaluation(**measured | seen),
        RoundEnd(round=round, drift=shown["drift"]),
    ]


def warnings_over(rounds, beside_others=False):
    """All warnings of a run whose rounds show these, with what was warned of before as part of the
    history.
    """
    history, found = [], []
    for number, lines in enumerate(rounds, start=1):
        new = [
            line
            for change in (lines if isinstance(lines, list) else [lines])
            for line in lines_of(number, **change)
        ]
        signs = diagnose(history, new, beside_others)
        history += [*new, *signs]
        found += signs
    return found


def test_a_healthy_run_shows_no_sign():
    improving = [
        {"valid": 4 - 0.2 * i, "train": 3.9 - 0.2 * i, "drift": 0.5 + 0.01 * (i % 2)}
        for i in range(12)
    ]
    assert warnings_over(improving) == []


@pytest.mark.parametrize(
    "shares", [[[0.5, 0.5], [0.98, 0.02]], [[0.01, 0.99], [0.5, 0.5]], [[0.0, 0.0, 1.0]]]
)
def test_a_router_that_collapses_onto_one_expert_is_told_once(shares):
    (warning,) = warnings_over([{}, {"shares": shares}, {"shares": shares}, {"shares": shares}])
    assert (warning.sign, warning.round, warning.client) == ("collapsed-router", 2, "ada")
    layer = next(i for i, experts in enumerate(shares) if max(experts) > 0.9)
    assert f"layers {layer};" in warning.message and "\n" not in warning.message


def test_a_strong_preference_or_no_router_is_no_collapse():
    assert warnings_over([{"shares": [[0.9, 0.1], [0.05, 0.95]]}, {"shares": None}]) == []


def test_an_own_expert_with_all_the_weight_beside_the_others_is_no_collapse():
    collapsed = [{"shares": [[1.0, 0.0], [0.99, 0.01]]}] * 3
    assert warnings_over(collapsed, beside_others=True) == []
    assert len(warnings_over(collapsed)) == 1


def test_beside_the_others_own_experts_collapse_onto_one_of_them():
    (warning,) = warnings_over([{"shares": [[0.3, 0.001, 0.699]]}] * 3, beside_others=True)
    assert warning.sign == "collapsed-router"
    fine = [{"shares": [[0.0, 0.0, 1.0], [0.3, 0.1, 0.6]]}] * 3  # all for the others
    assert warnings_over(fine, beside_others=True) == []


@pytest.mark.parametrize(("adopted", "told"), [(0.2, []), (0.8, ["drifting-generalists"])])
def test_drift_is_no_sign_where_most_of_the_mean_is_not_adopted(adopted, told):
    rising = [
        {"drift": value, "adopted": adopted} for value in (None, 0.5, 0.6, 0.7, 0.9, 1.2, 1.5)
    ]
    assert [warning.sign for warning in warnings_over(rising)] == told


def test_generalists_that_drift_apart_are_told_once():
    rising = [{"drift": value} for value in (None, 0.5, 0.6, 0.7, 0.9, 1.2, 1.5)]
    (warning,) = warnings_over(rising)
    assert (warning.sign, warning.round, warning.client) == (
        "drifting-generalists",
        5,
        None,
    )
    assert "0.50 to 0.90" in warning.message


@pytest.mark.parametrize(
    "drifts",
    [
        (0.5, 0.52, 0.54, 0.56, 0.58),  # grows, but hardly
        (0.5, 0.9, 0.4, 1.0, 0.45, 1.1),  # up and down
        (2.0, 1.5, 1.0, 0.7),  # together again
        (None, None, None, None, None),  # nothing is shared
        (0.5, 0.7, 0.9),  # too few rounds to say
    ],
)
def test_drift_that_does_not_grow_steadily_is_no_sign(drifts):
    assert warnings_over([{"drift": value} for value in drifts]) == []


def test_overfitting_is_told_once_where_valid_rises_while_train_falls():
    rounds = [{"valid": 3.0 + 0.05 * i, "train": 3.0 - 0.1 * i} for i in range(7)]
    (warning,) = warnings_over(rounds)
    assert (warning.sign, warning.round, warning.client) == ("overfitting", 4, "ada")


@pytest.mark.parametrize(
    "rounds",
    [
        [
            {"valid": 3.0 + 0.05 * i, "train": 3.0 + 0.1 * i} for i in range(6)
        ],  # both rise: diverging, not overfitting
        [{"valid": 3.0 + 0.001 * i, "train": 3.0 - 0.1 * i} for i in range(6)],  # hardly
        [{"valid": 3.0 + 0.1 * (i % 2), "train": 3.0 - 0.1 * i} for i in range(6)],  # up and down
        [{"valid": 3.0 + 0.05 * i, "train": 3.0 - 0.1 * i} for i in range(3)],  # too short to say
    ],
)
def test_what_is_no_overfitting_is_no_sign(rounds):
    assert warnings_over(rounds) == []


def test_clients_are_told_apart():
    ada = {"client": "ada", "shares": [[1.0, 0.0]]}
    bob = [{"client": "bob", "valid": 3.0 + 0.05 * i, "train": 3.0 - 0.1 * i} for i in range(6)]
    found = warnings_over([[ada, b] for b in bob])
    assert {(w.sign, w.client) for w in found} == {
        ("collapsed-router", "ada"),
        ("overfitting", "bob"),
    }
    assert len(found) == 2


def test_each_client_is_told_of_its_own_collapse():
    both = [{"client": name, "shares": [[1.0, 0.0]]} for name in ("ada", "bob")]
    assert [w.client for w in warnings_over([both, both])] == ["ada", "bob"]


def test_a_resumed_run_does_not_repeat_what_was_told():
    new = lines_of(1, shares=[[1.0, 0.0]])
    told = diagnose([], new)
    assert len(told) == 1 and diagnose([*new, *told], lines_of(2, shares=[[1.0, 0.0]])) == []
