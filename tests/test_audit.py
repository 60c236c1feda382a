"""comigs audit: the bound against simulation and brute force, planting, and a whole small audit."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
from typer.testing import CliRunner

from comigs.app.audit import audit
from comigs.app.cli import app
from comigs.bases.load import load_base
from comigs.data.canaries import COPIES, Canary, PlantedTexts, make_up
from comigs.data.prepare import prepare
from comigs.errors import UserError
from comigs.experiments.audit.bound import epsilon_at_least, p_value
from comigs.experiments.audit.figures import Promise, Score, rows
from comigs.experiments.audit.page import table
from tests.conftest import run_config


def q_of(epsilon):
    return math.exp(epsilon) / (1 + math.exp(epsilon))


def brute(correct, guesses, canaries, epsilon, delta):
    """Theorem 5.2, term by term, with exact numbers of ways."""
    q = q_of(epsilon)

    def exactly(k):
        return math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k)

    pure = sum(exactly(k) for k in range(correct, guesses + 1))
    most = max(
        (sum(exactly(k) for k in range(correct - i, correct)) / i for i in range(1, correct + 1)),
        default=0.0,
    )
    return min(1.0, pure + 2 * canaries * delta * most)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("correct", "guesses"), [(0, 5), (3, 5), (5, 5), (40, 60), (60, 60)])
def test_the_p_value_is_the_theorems(correct, guesses, delta):
    for epsilon in (0.0, 0.5, 2.0, 5.0):
        mine = p_value(correct, guesses, 100, epsilon, delta)
        assert mine == pytest.approx(brute(correct, guesses, 100, epsilon, delta), rel=1e-9)


def test_the_bound_by_hand():
    """All of r guesses right: q^r = 0.05."""
    for r in (10, 60, 250):
        q = 0.05 ** (1 / r)
        assert epsilon_at_least(r, r, r, 0.0) == pytest.approx(math.log(q / (1 - q)), rel=1e-9)
    assert epsilon_at_least(30, 60, 60, 0.0) == 0.0 and epsilon_at_least(0, 0, 60, 1e-5) == 0.0
    bounds = [epsilon_at_least(60, 60, 256, delta) for delta in (0.0, 1e-5, 1e-4, 1e-3)]
    assert all(a > b for a, b in pairwise(bounds))


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.01)])
def test_the_bound_is_below_the_truth_and_near_it(epsilon, delta):
    """Randomised response is (epsilon, delta)-private and no more: it tells each coin truly with
    the probability q, or plainly with the probability delta.
    """
    random, m, trials = np.random.default_rng(0), 200, 1000
    truth = delta + (1 - delta) * q_of(epsilon)
    right = random.binomial(m, truth, trials)
    of_count = {int(v): epsilon_at_least(int(v), m, m, delta) for v in set(right)}
    bounds = [of_count[int(v)] for v in right]
    assert np.mean([bound > epsilon for bound in bounds]) <= 0.05 + 3 * math.sqrt(0.05 / trials)
    if delta == 0:
        assert np.median(bounds) > 0.5 * epsilon


def scores_of(inside, outside, copies=1, client="ada"):
    made = [Score(client, copies, True, nats) for nats in inside]
    return made + [Score(client, copies, False, nats) for nats in outside]


def test_figures_by_hand():
    (row,) = rows("it", scores_of([-5.0, -4.0, 0.5], [0.0, 1.0, 2.0]), 1e-5)
    assert (row.canaries, row.members) == (6, 3)
    assert row.told_apart == pytest.approx(8 / 9)
    assert row.rank == 1 / 4 and row.exposure == 2.0
    # Clients are centred each by itself, and rivals are of one's own client.
    many = [x / 100 for x in range(200)]
    both = scores_of([-9.0] * 200, many) + scores_of([91.0] * 200, [100 + x for x in many], 1, "b")
    (row,) = rows("it", both, 1e-5)
    assert row.told_apart == 1.0 and row.exposure == pytest.approx(math.log2(201))
    assert row.correct == row.guesses == 800 and row.epsilon > 4.5
    random = np.random.default_rng(1)
    (row,) = rows("it", scores_of(random.normal(size=300), random.normal(size=300)), 1e-5)
    assert 0.4 < row.told_apart < 0.6 and row.epsilon < 0.3


def test_a_promise_of_one_document_is_held_against_several_copies_by_group_privacy():
    """k epsilon, at the sum of the deltas on the way; nothing where that is no probability."""
    one = Promise(0.5, 1e-5)
    assert one.of_copies(1) == one
    four = one.of_copies(4)
    assert four.epsilon == 2.0
    assert four.delta == pytest.approx(1e-5 * (math.exp(2) - 1) / (math.exp(0.5) - 1))
    assert one.of_copies(16).delta < 0.1
    assert Promise(8.0, 1e-5).of_copies(4) is None and Promise(900.0, 1e-5).of_copies(16) is None

    # Both figures are at one delta, and the table says which promise does not hold.
    scores = scores_of([-1.0 - x for x in range(64)], [1.0 + x for x in range(64)], copies=4)
    for epsilon, exceeds in ((0.1, True), (2.0, False)):
        promise = Promise(epsilon, 1e-7).of_copies
        (row,) = rows("it", scores, 1e-7, promise)
        assert row.exceeds == exceeds == row.as_json()["exceeds"]
        assert row.delta == promise(4).delta > 4e-7
        assert ("EXCEEDED" in table([row]).rows[0][-1]) == exceeds


def test_models_that_are_all_the_same_are_guessed_by_chance():
    """Ties are not broken by the truth: half of the guesses are right, not all and not none."""
    random = np.random.default_rng(1)
    scores = [Score("ada", 1, bool(member), 0.0) for member in random.integers(0, 2, 400)]
    (row,) = rows("it", scores, 1e-5)
    assert abs(row.correct - row.guesses / 2) < 2.5 * math.sqrt(row.guesses) / 2


@pytest.mark.parametrize(
    ("privacy", "promised"),
    [
        ({}, {}),
        ({"level": "document", "epsilon": 9.0, "delta": 0.005}, {"upload": [1], "shared": [1]}),
        ({"level": "document", "epsilon": 9.0, "delta": 0.005, "noise_seed": 1}, {}),
        ({"level": "client", "epsilon": 9.0, "delta": 0.01}, {"shared": [1, 4, 16]}),
    ],
    ids=str,
)
def test_a_row_says_what_the_run_promises_of_it(privacy, promised, text, tmp_path):
    root, _ = text
    config = run_config(root, "ada bob cyd", rounds=1, method="fedavg", privacy=privacy)
    _, found = audit(config, 8, tmp_path / "run")
    names = {"a client's last upload": "upload", "what everybody gets": "shared"}
    told: dict[str, list[int]] = {}
    for row in found:
        assert not row.exceeds and row.delta == config.privacy.delta
        if row.promised is not None:
            assert 8 < row.promised <= 9
            told.setdefault(names[row.seen], []).append(row.copies)
    assert told == promised


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return root, run_config(root, "ada bob cyd")


def test_canaries_are_planted_whole_and_nothing_else_is_changed(text):
    _, config = text
    base = load_base(config.base)
    texts = prepare(config, base.encoder)
    made = {name: make_up(1, name, 8) for name in texts.names}
    data = PlantedTexts(texts, made, base.encoder, 1)
    for name in texts.names:
        own, planted = texts.load(name).train[0], data.load(name).train[0]
        end, stream = base.encoder.separator, [int(t) for t in planted.tokens]
        for canary in made[name]:
            (ids,) = base.encoder.encode([canary.text])
            whole = [end, *ids, end]
            places = [at for at in range(len(stream)) if stream[at : at + len(whole)] == whole]
            assert len(places) == (canary.copies if canary.member else 0)
            for at in reversed(places):
                del stream[at + 1 : at + len(whole)]
        assert stream == [int(t) for t in own.tokens]
        (valid,), (before,) = data.load(name).valid, texts.load(name).valid
        assert valid.tokens_sha256 == before.tokens_sha256
        assert planted.tokens_sha256 != own.tokens_sha256
    assert made["ada"] != made["bob"] and made["ada"] == make_up(1, "ada", 8)
    flips = [canary.member for canary in make_up(1, "ada", 400)]
    assert 0.4 < np.mean(flips) < 0.6
    assert {canary.copies for canary in made["ada"]} == set(COPIES)
    assert isinstance(made["ada"][0], Canary)


@pytest.fixture(scope="module")
def audited(text):
    """An audit of a run that learns by heart."""
    root, _ = text
    learning = {"steps": 150, "batch_size": 8, "lr": 0.01, "router_steps": 0, "weight_decay": 0}
    config = run_config(
        root, "ada bob", rounds=1, method="fedavg", client=learning, experts={"rank": 32},
        evaluation={"every": 0, "keep": "last"}, data={"sequence_length": 48},
        base={"name": "tiny-llama"},
    )  # fmt: skip
    return audit(config, 8, root / "audited")


def test_what_is_learnt_by_heart_is_told_and_what_is_made_up_anew_is_not(audited):
    folder, found = audited
    assert [row.copies for row in found] == [1, 4, 16] * 3
    by = {(row.seen, row.copies): row for row in found}
    upload, shared = "a client's last upload", "what everybody gets"
    assert by[upload, 16].told_apart > 0.8 and by[upload, 16].exposure > 2.5
    assert by[upload, 16].told_apart > by[upload, 1].told_apart
    assert by[upload, 16].told_apart > by[shared, 16].told_apart > 0.6
    told = json.loads((folder.path / "audit.json").read_text())
    assert told["canaries"] == 8 and len(told["rows"]) == 9
    page = (folder.path / "audit.html").read_text()
    assert "comigs audit" in page and "told apart" in page and "says ada" not in page


def test_where_a_client_gets_the_others_alone_its_own_is_looked_for_in_what_they_get(text):
    root, _ = text
    config = run_config(
        root, "ada bob", rounds=2, method="fedalt",
        client={"steps": 75, "batch_size": 8, "lr": 0.01, "router_steps": 0, "weight_decay": 0},
        experts={"rank": 32}, evaluation={"every": 0, "keep": "last"},
        data={"sequence_length": 48}, base={"name": "tiny-llama"},
    )  # fmt: skip
    _, found = audit(config, 8, root / "others")
    (row,) = (row for row in found if row.seen == "what everybody gets" and row.copies == 16)
    assert row.told_apart > 0.8


@pytest.mark.parametrize(
    ("tree", "canaries", "said"),
    [
        ({}, 7, "--canaries: given 7; must be 8 to 4096"),
        ({"method": "centralized"}, 8, "no client has an upload of its own"),
        ({"method": "flora"}, 8, "merges updates into the base"),
        ({"workers": 2}, 8, "workers: given 2; an audit needs 1"),
        ({"conditions": {"latency": 1.0}}, 8, "conditions: given, but an audit simulates no dev"),
        ({"participation": {"clients_per_round": 2}}, 8, "looks at every client's last upload"),
    ],
    ids=str,
)
def test_what_cannot_be_audited_is_said_in_a_line(tree, canaries, said, text, tmp_path):
    root, _ = text
    with pytest.raises(UserError, match=said) as refused:
        audit(run_config(root, "ada bob cyd", **tree), canaries, tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_the_command_says_what_is_wrong_with_a_config(tmp_path):
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "none.toml")])
    assert isinstance(done.exception, UserError) and "none.toml" in str(done.exception)
