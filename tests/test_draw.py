"""Which text a step learns from: train for experts; valid, train or a fold the experts did not see
for the router.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comigs.app import api
from comigs.config import ClientSection, parse_config
from comigs.data.batches import Fold, fold_windows
from comigs.data.corpus import TokenStore
from comigs.data.prepare import ClientData, prepare
from comigs.data.sampling import BatchSource, check_text
from comigs.errors import Stopped, UserError
from comigs.seeds import generator
from tests.conftest import APART, run_config, same, start_engine
from tests.runs import outcome
from tests.test_data_helper import ByteEncoder

LENGTH = 12
QUIET = lambda level, nats: None  # noqa: E731


def store(num_tokens, first=0):
    """A text whose tokens are their own places, so that a window shows where it is from."""
    tokens = np.arange(first, first + num_tokens)
    return TokenStore(Path("nowhere"), tokens, num_tokens, 1, "", "")


def fold_of(place, num_tokens, folds):
    """The part of the text that a place is in, by counting."""
    return next(
        f for f in range(folds) if num_tokens * f // folds <= place < num_tokens * (f + 1) // folds
    )


def random_for(label, number):
    return generator(42, "batch", "ada", label, number)


def drawn(inputs, targets, positions):
    """Rows of the tokens of each window, its last target included."""
    assert positions is None
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    return np.concatenate([inputs, targets[:, -1:]], axis=1)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("num_tokens", "folds"), [(52, 4), (61, 4), (40, 3), (31, 2)])
def test_windows_of_a_fold_are_all_windows_wholly_inside_or_outside_it(num_tokens, folds, inside):
    """Every one of them, each as likely as any other, whatever the fold and however the text
    divides.
    """
    for fold in range(folds):
        places = [p for p in range(num_tokens) if fold_of(p, num_tokens, folds) == fold]
        possible = set()
        for start in range(num_tokens - LENGTH):
            within = [p in places for p in range(start, start + LENGTH + 1)]
            if all(within) if inside else not any(within):
                possible.add(start)
        draws = 400 * len(possible)
        random = np.random.default_rng(fold)
        windows = drawn(
            *fold_windows([store(num_tokens)], random, draws, LENGTH, Fold(fold, folds, inside))
        )
        assert (np.diff(windows, axis=1) == 1).all() and windows.shape == (draws, LENGTH + 1)
        starts, counts = np.unique(windows[:, 0], return_counts=True)
        assert set(starts.tolist()) == possible
        assert np.abs(counts - 400).max() < 6 * 400**0.5


def test_every_text_of_a_mixture_is_as_likely_and_has_its_own_folds():
    stores = [store(60), store(400, first=1000), store(100, first=5000)]
    windows = drawn(
        *fold_windows(stores, np.random.default_rng(0), 3000, LENGTH, Fold(1, 4, inside=True))
    )
    counts = [
        ((windows >= s.tokens[0]) & (windows <= s.tokens[-1])).all(axis=1).sum() for s in stores
    ]
    assert sum(counts) == 3000 and max(abs(c - 1000) for c in counts) < 160
    for s in stores:
        own = (
            windows[(windows[:, 0] >= s.tokens[0]) & (windows[:, 0] <= s.tokens[-1])] - s.tokens[0]
        )
        assert {fold_of(p, s.num_tokens, 4) for p in own.ravel()} == {1}


def test_the_routers_fold_is_the_one_its_experts_did_not_see_lately_and_folds_take_turns():
    settings = ClientSection(
        batch_size=16, router_every=3, router_steps=2, router_data="crossfit", folds=4
    )
    text = store(200)
    data = ClientData((text,), (), ())  # no valid at all
    draw = BatchSource(data, settings, LENGTH, random_for).batch
    left_out, number = [], 0
    for phase in range(9):
        seen = set()
        for step in range(3 * phase, 3 * phase + 3):
            seen |= set(drawn(*draw("experts", step, step)).ravel().tolist())
        read = set()
        for _ in range(2):
            read |= set(drawn(*draw("router", number, 3 * phase + 3)).ravel().tolist())
            number += 1
        assert not seen & read
        (fold,) = {fold_of(place, 200, 4) for place in read}
        left_out.append(fold)
        assert {fold_of(place, 200, 4) for place in seen} == {0, 1, 2, 3} - {fold}
    assert left_out == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("source", ["valid", "train", "crossfit"])
def test_a_client_in_a_run_learns_from_what_its_config_says(tmp_path, source):
    """Through whole rounds whose phases do not fall on a round's end, and stopped and gone on with
    in between.
    """
    train, valid = store(120), store(60, first=180)
    settings = {
        "steps": 4,
        "batch_size": 6,
        "router_every": 3,
        "router_steps": 2,
        "router_data": source,
        "lr": 5e-3,
    }
    config = run_config(tmp_path, "ada", client=settings, rounds=3)

    def client():
        made = start_engine(config).clients["ada"]
        made.text = ClientData((train,), (valid,), ())
        return made

    def watched(made):
        original, batches = made._next_batch, []

        def draw(level, number):
            batch = original(level, number)
            batches.append((level, number, made.train_state.local_steps, drawn(*batch)))
            return batch

        made._next_batch = draw
        return batches

    whole, first = client(), client()
    batches = watched(whole)
    for round in (1, 2, 3):
        whole.train(round, QUIET)
    first_batches = watched(first)
    first.train(1, QUIET)
    second = client()
    second.load_state(first.state())
    second_batches = watched(second)
    for round in (2, 3):
        second.train(round, QUIET)
    for one, other in zip(batches, first_batches + second_batches, strict=True):
        assert one[:3] == other[:3] and np.array_equal(one[3], other[3])
    assert same(whole.state()["optimizer"], second.state()["optimizer"])

    levels = [level for level, *_ in batches]
    phase = ["experts"] * 3 + ["router"] * 2
    assert levels == phase * 4
    assert [n for level, n, *_ in batches if level == "router"] == list(range(8))
    places = [set(windows.ravel().tolist()) for *_, windows in batches]
    for start in range(0, len(batches), 5):
        seen, read = (
            set().union(*places[start : start + 3]),
            set().union(*places[start + 3 : start + 5]),
        )
        assert seen <= set(range(120))
        assert read <= set(range(180, 240) if source == "valid" else range(120))
        assert not seen & read or source == "train"
    assert len({windows.tobytes() for *_, windows in batches}) == len(
        batches
    )  # no batch is drawn twice


@pytest.mark.parametrize("source", ["train", "crossfit"])
def test_a_router_taught_by_train_never_reads_valid(tmp_path, source):
    """Whatever valid says: the model of a client is the same to the bit."""
    config = run_config(
        tmp_path,
        "ada",
        client={
            "steps": 4,
            "batch_size": 4,
            "router_every": 2,
            "router_steps": 2,
            "router_data": source,
            "lr": 5e-3,
        },
    )
    clients = [start_engine(config).clients["ada"] for _ in range(2)]
    clients[1].text = replace(clients[1].text, valid=())
    logs = [client.train(1, QUIET) for client in clients]
    assert len(logs[0].router_losses) == 4 and logs[0].router_losses == logs[1].router_losses
    assert same(clients[0].train_state.tensors, clients[1].train_state.tensors)


@pytest.mark.parametrize("source", ["valid", "train", "crossfit"])
def test_experts_draw_the_same_batches_whatever_the_router_learns_from_but_for_the_fold(source):
    data = ClientData((store(200),), (store(60, first=500),), ())

    def draw(level, number, local_steps, settings):
        return BatchSource(data, settings, LENGTH, random_for).batch(level, number, local_steps)

    plain = draw("experts", 5, 5, ClientSection(batch_size=8))
    mine = draw("experts", 5, 5, ClientSection(batch_size=8, router_data=source))
    assert np.array_equal(plain[0], mine[0]) == (source != "crossfit")
    router = draw("router", 5, 30, ClientSection(batch_size=8, router_data=source))
    assert not np.array_equal(router[0], plain[0])  # the router's draw is a stream of its own


@pytest.mark.parametrize("method", ["fedavg", "pfedmoe", "comigs"])
def test_no_text_is_left_out_where_no_router_would_read_it(tmp_path, method):
    """Uniform mixing, one level, or one expert: crossfit has nothing to set aside."""
    options = APART if method == "comigs" else {}
    experts = {"rank": 2, "specialists": 0} if method == "comigs" else {"rank": 2}
    made = [
        start_engine(
            run_config(
                tmp_path,
                "ada",
                method=method,
                experts=experts,
                options=options,
                client={
                    "steps": 3,
                    "batch_size": 4,
                    "router_every": 2,
                    "router_data": source,
                    "lr": 5e-3,
                },
            )
        ).clients["ada"]
        for source in ("valid", "crossfit")
    ]
    for client in made:
        client.train(1, QUIET)
    assert same(made[0].train_state.tensors, made[1].train_state.tensors)


def test_a_fold_may_be_as_short_as_one_window_and_no_shorter():
    """One window: its tokens and the last one's target."""
    settings = ClientSection(router_data="crossfit", folds=3, batch_size=5, router_every=1)
    for extra in range(3):
        data = ClientData((store(500), store(3 * (LENGTH + 1) + extra)), (), ())
        check_text("ada", data, settings, LENGTH)
        for step in range(3):
            source = BatchSource(data, settings, LENGTH, random_for)
            source.batch("experts", step, step)
            source.batch("router", step, step + 1)
    short = ClientData((store(500), store(3 * (LENGTH + 1) - 1)), (), ())
    with pytest.raises(UserError) as raised:
        check_text("ada", short, settings, LENGTH)
    told = str(raised.value)
    assert told.startswith("client.folds: given 3") and "client ada" in told and "38 tokens" in told
    assert "13 at least" in told and "Use at most 2, or" in told and "\n" not in told
    check_text(
        "ada", short, settings.model_copy(update={"router_data": "train"}), LENGTH
    )  # nothing is set aside
    check_text(
        "ada", short, settings.model_copy(update={"folds": 2}), LENGTH
    )  # what it advises works


def test_a_text_too_short_for_any_fold_is_told_what_works():
    settings = ClientSection(router_data="crossfit", folds=2)
    with pytest.raises(UserError) as raised:
        check_text("ada", ClientData((store(20),), (), ()), settings, LENGTH)
    told = str(raised.value)
    assert "at most" not in told and 'client.router_data = "train"' in told


def test_a_run_refuses_folds_that_are_too_short_before_it_trains(tmp_path):
    config = run_config(tmp_path, client={"router_data": "crossfit", "folds": 200})
    with pytest.raises(UserError, match=r"^client\.folds: given 200, but client ada"):
        start_engine(config)


def test_a_crossfit_run_gone_on_with_equals_one_never_stopped(tmp_path):
    settings = {
        "steps": 3,
        "batch_size": 4,
        "router_every": 2,
        "router_steps": 2,
        "router_data": "crossfit",
    }
    config = run_config(tmp_path, client={**settings, "lr": 5e-3}, rounds=3)

    def stop(event):
        if event.kind == "step" and (event.round, event.client) == (2, "bob"):
            raise KeyboardInterrupt

    api.run(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        api.run(config, tmp_path / "stopped", report=stop)
    api.resume(tmp_path / "stopped")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("share", [0.3, 0.77])
def test_a_share_of_a_split_is_its_beginning_and_nothing_else_changes(tmp_path, split, share):
    whole = run_config(tmp_path, client={"batch_size": 4})
    less = parse_config(
        {**whole.model_dump(), "data": {**whole.data.model_dump(), f"{split}_share": share}}
    )
    folders = lambda data, name: [s.folder for s in getattr(data, name)]  # noqa: E731
    everything, part = (prepare(config, ByteEncoder()) for config in (whole, less))
    for name in ("ada", "bob"):
        for other in {"train", "valid", "test"} - {split}:
            assert folders(part.load(name), other) == folders(everything.load(name), other)
        (cut,), (full,) = getattr(part.load(name), split), getattr(everything.load(name), split)
        assert cut.num_bytes == round(share * full.num_bytes)
        assert cut.num_tokens < full.num_tokens
        assert np.array_equal(cut.tokens[:-1], full.tokens[: cut.num_tokens - 1])


@pytest.mark.parametrize(
    ("client", "reads_all"),
    [({"router_every": 5}, True), ({"router_steps": 0}, True), ({"router_every": 4}, False)],
)
def test_experts_read_all_of_train_where_no_phase_of_a_router_would_read_a_fold(
    tmp_path, monkeypatch, client, reads_all
):
    settings = {"steps": 2, "router_every": 2, "router_data": "crossfit", **client}
    config, left_out = run_config(tmp_path, "ada", rounds=2, client=settings), []

    def noting(*of_what):
        left_out.append(of_what[-1].number)
        return fold_windows(*of_what)

    monkeypatch.setattr("comigs.data.sampling.fold_windows", noting)
    ada = start_engine(config).clients["ada"]
    ada.train(1, QUIET)
    ada.train(2, QUIET)
    assert left_out == ([] if reads_all else [0] * 4 + [0] * 2)
