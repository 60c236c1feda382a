"""Clients that are gone for a round or more: the run goes on, and whoever is back gets the newest
of everything.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from comigs.bases.load import load_base
from comigs.data.prepare import prepare
from comigs.engines.in_process import InProcess
from comigs.methods.loading import list_methods, load_method
from comigs.runs.folder import RunFolder
from comigs.server.pending import next_downloads, unpack_server
from comigs.server.protocol import Answers
from comigs.server.rounds import run_rounds
from comigs.slots import Slot
from tests.conftest import run_config, same
from tests.test_methods_math import assert_close, double, factors, mean_of

A, B, ATTENTION = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B"), Slot(0, "q", "attention", "A")
UPDATE_A, UPDATE_B = Slot(0, "up", "update", "A"), Slot(0, "up", "update", "B")
NAMES = ("ada", "bob", "cyd")
ALPHA = 16.0
ABSENCES = {  # round -> who is gone; the fifth exchange delivers the last download
    "two rounds": {2: {"bob"}, 3: {"bob"}},
    "from the start": {1: {"bob"}, 2: {"bob"}},
    "by turns": {1: {"cyd"}, 2: {"bob", "cyd"}, 3: {"ada"}, 4: {"bob"}},
}


class Losing(InProcess):
    """An engine that does not reach some clients in some rounds; once: they are back when they are
    asked again.
    """

    def __init__(self, config, folder, gone, stop_in=None, once=False):
        base, self.gone, self.stop_in, self.once, self.asked = (
            load_base(config.base),
            gone,
            stop_in,
            once,
            set(),
        )
        data = prepare(config, base.encoder)
        super().__init__(config, load_method(config), base, data, folder, lambda event: None)

    def exchange(self, tasks, downloads):
        (round,) = {task.round for task in tasks.values()}
        if round == self.stop_in:
            raise KeyboardInterrupt
        away = set() if self.once and round in self.asked else self.gone.get(round, set())
        self.asked.add(round)
        reached = {name: task for name, task in tasks.items() if name not in away}
        return Answers(
            super().exchange(reached, downloads).replies, dict.fromkeys(away & tasks.keys(), "gone")
        )


def run(config, path, gone, watch=None, **losing):
    """A run over the engine above. watch(uploads, memory): called before each merge."""
    method = load_method(config)
    if watch is not None:
        merge = method.aggregate

        def watched(uploads, memory, facts):
            watch(uploads, memory)
            return merge(uploads, memory, facts)

        method = replace(method, aggregate=watched)
    folder = RunFolder.open(path) if path.exists() else RunFolder.create(path, config, {})
    with folder:
        run_rounds(
            config, method, Losing(config, folder, gone, **losing), folder, lambda event: None
        )
    return folder


def personal(folder):
    read = {
        n: safetensors.torch.load_file(folder.path / "clients" / n / "personal.safetensors")
        for n in NAMES
    }
    return {
        name: {Slot.parse(slot): t for slot, t in tensors.items()} for name, tensors in read.items()
    }


def config_of(root, method, **tree):
    settings = {"rounds": 4, "evaluation": {"every": 0, "keep": "last", "batch_size": 64}, **tree}
    return run_config(root, " ".join(NAMES), method=method, **settings)


# --- what waits for whom
# ------------------------------------------------------------------------------------------------


def tensors(value):
    return torch.full((2, 3), float(value))


def test_who_was_reached_gets_what_the_server_made_and_nothing_older():
    new = {"ada": {A: tensors(2)}, "bob": {A: tensors(2)}}
    waiting = {"ada": {A: tensors(1), B: tensors(1)}, "bob": {A: tensors(1)}}
    assert next_downloads(waiting, new, delivered={"ada", "bob"}) == new
    assert next_downloads({}, new, delivered=()) == new  # the first round has nothing waiting
    assert next_downloads(waiting, {}, delivered={"ada", "bob"}) == {}


def test_who_was_not_reached_gets_the_newest_of_every_slot():
    waiting = {"bob": {A: tensors(1), B: tensors(1)}, "cyd": {A: tensors(1)}}
    merged = {"ada": {A: tensors(2)}, "bob": {A: tensors(2), ATTENTION: tensors(2)}}
    given = next_downloads(waiting, merged, delivered={"ada"})
    assert {name: {slot: float(t[0, 0]) for slot, t in d.items()} for name, d in given.items()} == {
        "ada": {A: 2},
        "bob": {A: 2, B: 1, ATTENTION: 2},
        "cyd": {A: 1},
    }
    assert waiting["bob"].keys() == {A, B} and merged["bob"].keys() == {
        A,
        ATTENTION,
    }  # neither is changed


def test_what_many_wait_for_is_one_object_however_many_there_are():
    many = [f"c{n}" for n in range(100)]
    missed, older = {A: tensors(1), B: tensors(1)}, {A: tensors(0), ATTENTION: tensors(0)}
    waiting = dict.fromkeys(many[:50], missed) | dict.fromkeys(many[50:], older)
    new = {A: tensors(2), B: tensors(2)}
    given = next_downloads(waiting, dict.fromkeys(many, new), delivered={"c0"})
    assert all(given[name] is new for name in many[:50])  # nothing of what they missed is left
    assert len({id(given[name]) for name in many[50:]}) == 1 and given["c99"].keys() == {
        A,
        B,
        ATTENTION,
    }
    newest = {A: tensors(3)}
    turn = next_downloads(given, dict.fromkeys(many, newest), delivered=())
    assert len({id(download) for download in turn.values()}) == 2
    assert len({id(t) for download in turn.values() for t in download.values()}) == 3


def test_updates_wait_in_line_and_add_up():
    random = np.random.default_rng(0)
    line = [
        {
            UPDATE_A: torch.from_numpy(random.normal(size=(r, 5))),
            UPDATE_B: torch.from_numpy(random.normal(size=(7, r))),
            A: tensors(r),
        }
        for r in (2, 3, 4)
    ]
    waiting = {"bob": line[0]}
    for merged in line[1:]:
        waiting = next_downloads(waiting, {"bob": merged, "ada": merged}, delivered={"ada"})
    assert float(waiting["bob"][A][0, 0]) == 4
    mine = double(waiting["bob"][UPDATE_B]) @ double(waiting["bob"][UPDATE_A])
    np.testing.assert_allclose(
        mine, sum(double(d[UPDATE_B]) @ double(d[UPDATE_A]) for d in line), rtol=1e-12
    )
    assert same(waiting["ada"], line[2])


# --- whole runs
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.few(6)
def test_a_run_goes_on_without_those_who_are_gone(tmp_path, method):
    """One, two or all of them: each client trains in the rounds in which it was reached, and no
    more.

    Where all are gone the round is asked again; the text of all in one place has one client whose
    upload matters.
    """
    gone = {1: {"cyd"}, 2: set(NAMES), 3: {"ada", "bob"}}
    config = config_of(tmp_path, method, rounds=3, client={"steps": 1, "batch_size": 2})
    folder = run(config, tmp_path / "run", gone, once=True)
    trained = [(x.client, x.round) for x in folder.metrics() if x.kind == "train"]
    trains = NAMES[:1] if method == "centralized" else NAMES
    back = {r for r in gone if gone[r] >= set(trains)}
    assert sorted(trained) == [
        (n, r) for n in trains for r in (1, 2, 3) if n not in gone[r] or r in back
    ]
    absent = {(x.client, x.round) for x in folder.metrics() if x.kind == "absent"}
    assert absent == {(n, r) for r in gone if r not in back for n in gone[r]}
    for mine in personal(folder).values():
        assert all(bool(t.isfinite().all()) for t in mine.values())


@pytest.mark.parametrize("gone", ABSENCES)
@pytest.mark.parametrize("method", ["fedavg", "rolora"])
@pytest.mark.few(3)
def test_all_end_with_the_same_shared_tensors_whoever_was_gone_in_between(tmp_path, method, gone):
    """rolora sends B and A by turns: who is back gets the newest of both."""
    config = config_of(tmp_path, method)
    models, receives = (
        personal(run(config, tmp_path / "run", ABSENCES[gone])),
        load_method(config).receives,
    )
    shared = [{slot: t for slot, t in model.items() if receives(slot)} for model in models.values()]
    assert shared[0] and all(same(shared[0], other) for other in shared[1:])


def changed_by(tensors):
    """(layer, site) -> scale * B @ A of the LoRA there."""
    return {at[:2]: ALPHA / np.sqrt(len(A)) * (B @ A) for at, (A, B) in factors(tensors).items()}


@pytest.mark.parametrize("gone", ABSENCES)
@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
@pytest.mark.few(3)
def test_what_is_merged_is_merged_once_by_everybody_whoever_was_gone(tmp_path, method, gone):
    """Against numpy, which adds up the rounds: all end with the sum of what each round's senders
    learnt, on average.
    """
    rounds = []
    config = config_of(tmp_path, method, client={"steps": 2, "batch_size": 4, "lr": 5e-2})

    def watch(uploads, memory):  # which are on the disk until the round ends
        rounds.append({name: dict(upload) for name, upload in uploads.items()})

    models = personal(run(config, tmp_path / "run", ABSENCES[gone], watch))
    merged, whole = {}, {}
    for uploads in filter(None, rounds):
        mean = mean_of({name: changed_by(upload) for name, upload in uploads.items()})
        whole = {at: merged.get(at, 0) + mean[at] for at in mean}
        merged = whole
        if method == "fedex-lora":  # the means of the factors stay with the clients as LoRA
            first = next(iter(uploads.values()))
            factor_means = {
                s: sum(u[s].double() for u in uploads.values()) / len(uploads) for s in first
            }
            lora = changed_by(factor_means)
            merged = {at: whole[at] - lora[at] for at in whole}
    for model in models.values():
        lora = changed_by(model)
        mine = {at: lora[at] + double(model[Slot(*at, "merged", "W")]) for at in whole}
        assert_close(mine, whole, 1e-5)


@pytest.mark.parametrize("method", ["flora", "hetlora"])
def test_a_run_stopped_while_a_download_waits_and_gone_on_with_equals_one_never_stopped(
    tmp_path, method
):
    config, gone = config_of(tmp_path, method), ABSENCES["two rounds"]
    whole = run(config, tmp_path / "whole", gone)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", gone, stop_in=3)
    packed = RunFolder.open(tmp_path / "stopped").load("server/state")
    assert unpack_server(packed)[0].keys() == set(NAMES)
    run(config, tmp_path / "stopped", gone)
    wanted, given = personal(whole), personal(RunFolder.open(tmp_path / "stopped"))
    assert all(same(wanted[name], given[name]) for name in NAMES)
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (
        whole.path / "metrics.jsonl"
    ).read_bytes()


def test_nobody_notices_that_another_is_gone_where_nothing_is_shared(tmp_path):
    config = config_of(tmp_path, "local", rounds=2)
    gone = {"one": {1: {"bob"}}, "whole": {}}
    one, whole = (personal(run(config, tmp_path / name, gone[name])) for name in gone)
    assert same(one["ada"], whole["ada"]) and same(one["cyd"], whole["cyd"])
    assert not same(one["bob"], whole["bob"])  # it is a round behind
