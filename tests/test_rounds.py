"""The round loop: one exchange a round, each round kept, nothing measured that changes what is
trained.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.errors import UserError
from comigs.methods.method import Method, RoundContext
from comigs.runs.folder import RunFolder
from comigs.server.communication import traffic, traffic_by_client
from comigs.server.diagnostics import drift
from comigs.server.pending import pack_server, unpack_server
from comigs.slots import Slot
from tests.conftest import APART, copy_of, run_config, same, start_engine
from tests.fake_engine import SHAPE, A, B, Numbers, averaging, lines_of, rounds_of

ATTENTION = Slot(1, "q", "attention", "A")


def halves(uploads, memory, context=None):
    """A method with a memory, and a download of its own for each client: nothing in it may get lost
    or mixed up.
    """
    total = sum(u[A] for u in uploads.values()) + memory.get("carried/over", torch.zeros(2, 3))
    return {name: {A: (total + u[A]) / 2} for name, u in uploads.items()}, {
        "carried/over": total / 3
    }


METHOD = Method("halves", "a test's own", "-", lambda slot: True, lambda slot: True, halves)


def test_one_exchange_a_round_and_one_more_to_deliver_the_last_download(tmp_path):
    engine = Numbers()
    rounds_of(tmp_path, engine, METHOD, rounds=4)
    asked = [(task.round, task.train) for tasks in engine.tasks for task in tasks.values()]
    assert asked == [(r, True) for r in (1, 2, 3, 4) for _ in "ab"] + [(5, False)] * 2
    assert engine.received[0] == {}
    memory = {}
    for sent, received in zip(engine.sent[:-1], engine.received[1:], strict=True):
        downloads, memory = halves(sent, memory)
        assert all(same(downloads[name], received[name]) for name in ("ada", "bob"))


@pytest.mark.parametrize(
    ("every", "splits", "expected"),
    [
        (1, ("valid",), [(), ("valid",), ("valid",), ("valid",), ("valid", "test")]),
        (2, ("valid", "train"), [(), (), ("valid", "train"), (), ("valid", "train", "test")]),
        (3, ("valid",), [(), (), (), ("valid",), ("valid", "test")]),
        (0, ("valid",), [(), (), (), (), ("test",)]),
        (1, ("test",), [(), ("test",), ("test",), ("test",), ("test",)]),
    ],
)
def test_a_round_is_evaluated_after_its_download_and_test_at_the_end(
    tmp_path, every, splits, expected
):
    engine = Numbers()
    rounds_of(tmp_path, engine, METHOD, rounds=4, evaluation={"every": every, "splits": splits})
    for name in engine.names:
        assert [tasks[name].evaluate for tasks in engine.tasks] == expected
        base = tuple(dict.fromkeys((*(splits if every else ()), "test")))
        assert [tasks[name].evaluate_base for tasks in engine.tasks] == [base, (), (), (), ()]


@pytest.mark.parametrize("round", [1, 2, 3, 4])
@pytest.mark.parametrize("client", ["ada", "bob"])
def test_a_run_stopped_anywhere_and_resumed_equals_one_never_stopped(tmp_path, round, client):
    whole = rounds_of(tmp_path, Numbers(), METHOD, "whole", rounds=3)
    with pytest.raises(KeyboardInterrupt):
        rounds_of(tmp_path, Numbers(fail_at=(round, client)), METHOD, "stopped", rounds=3)
    resumed = rounds_of(tmp_path, engine := Numbers(), METHOD, "stopped", rounds=3)
    assert engine.tasks[0]["ada"].round == round  # at most the current round is done again
    assert (resumed.path / "metrics.jsonl").read_bytes() == (
        whole.path / "metrics.jsonl"
    ).read_bytes()
    for name in ("ada", "bob"):
        assert same(
            resumed.load(f"clients/{name}/personal"), whole.load(f"clients/{name}/personal")
        )


def test_a_finished_run_is_not_run_again(tmp_path):
    folder = rounds_of(tmp_path, Numbers(), METHOD)
    before = (folder.path / "metrics.jsonl").read_bytes()
    rounds_of(tmp_path, again := Numbers(), METHOD)
    assert again.tasks == [] and (folder.path / "metrics.jsonl").read_bytes() == before


def test_where_nobody_takes_the_last_download_there_is_no_result_until_the_run_is_resumed(tmp_path):
    def gone(name, task, reply):
        return reply if task.train else "gone"

    with pytest.raises(
        UserError, match=r"nobody took the last download.* go on with: comigs resume \S*run$"
    ):
        rounds_of(tmp_path, Numbers(trouble=gone))
    folder = rounds_of(tmp_path, engine := Numbers())
    assert [task.train for tasks in engine.tasks for task in tasks.values()] == [False, False]
    assert folder.checkpoint().finished
    whole = rounds_of(tmp_path, Numbers(), name="whole")
    assert (folder.path / "metrics.jsonl").read_bytes() == (
        whole.path / "metrics.jsonl"
    ).read_bytes()


def test_the_configs_weights_replace_train_tokens(tmp_path):
    seen = []

    def aggregate(uploads, memory, context):
        seen.append(context)
        return {}, memory

    method, weights = averaging(aggregate=aggregate), {"ada": {"weight": 0.5}, "bob": {"weight": 3}}
    rounds_of(tmp_path, Numbers(), method, rounds=1)
    rounds_of(
        tmp_path, Numbers(), method, "weighed", rounds=1, entries=weights, upload={"trim": 0.1}
    )
    assert [context.weights for context in seen] == [{"ada": 9, "bob": 9}, {"ada": 0.5, "bob": 3}]
    assert [context.upload.trim for context in seen] == [0.25, 0.1]


def uploads_of(*values):
    return {
        name: {A: torch.full((2, 2), float(v)), ATTENTION: torch.zeros(3)}
        for name, v in zip("xyz", values, strict=False)
    }


def test_drift_is_the_distance_between_clients_over_the_length_of_their_common_step():
    random = np.random.default_rng(0)
    uploads, sent = (
        {n: {A: random.normal(size=(4, 5)), B: random.normal(size=7)} for n in "xyz"}
        for _ in range(2)
    )
    flat = lambda tensors: np.concatenate([tensors[A].ravel(), tensors[B].ravel()])  # noqa: E731
    mean = np.mean([flat(u) for u in uploads.values()], axis=0)
    start = np.mean([flat(d) for d in sent.values()], axis=0)
    apart = np.mean([np.linalg.norm(flat(u) - mean) for u in uploads.values()])
    as_tensors = [
        {n: {s: torch.from_numpy(x) for s, x in u.items()} for n, u in x.items()}
        for x in (uploads, sent)
    ]
    assert drift(*as_tensors) == pytest.approx(apart / np.linalg.norm(mean - start), rel=1e-12)


def test_drift_is_zero_for_clients_that_agree_and_unknown_where_it_means_nothing():
    sent = uploads_of(1, 1, 1)
    assert drift(uploads_of(3, 3, 3), sent) == 0
    assert drift(uploads_of(2, 3, 4), sent) == pytest.approx((1 + 0 + 1) / 3 / 2)
    assert drift(uploads_of(2, 3, 4), {}) is None  # the first round has no download to start from
    assert drift(uploads_of(0, 1, 2), sent) is None  # no common step
    assert drift({"x": {}, "y": {}}, {"x": {}, "y": {}}) is None  # nothing is shared
    unequal = {"x": {A: torch.zeros(2, 2)}, "y": {A: torch.zeros(3, 2)}}
    assert drift(unequal, unequal) is None


def test_a_huge_upload_that_nobody_can_call_unusual_does_not_stop_the_run(tmp_path):
    """Of two clients neither is the usual one; what cannot be written as JSON could never be
    committed.
    """
    huge = lambda name, task, reply: (  # noqa: E731
        replace(reply, upload={A: torch.full(SHAPE, 1e25)})
        if name == "bob" and task.round == 2
        else reply
    )
    folder = rounds_of(tmp_path, Numbers(trouble=huge), rounds=2)
    assert folder.checkpoint().finished
    assert all(
        math.isfinite(line["drift"])
        for line in lines_of(folder, "server")
        if line["drift"] is not None
    )


def test_traffic_counts_the_bytes_of_what_was_sent_by_role():
    upload = {A: torch.zeros(2, 3), B: torch.zeros(5, 2), ATTENTION: torch.zeros(7, 1)}
    expected = {
        "uploaded_bytes": 24 + 40 + 28,
        "downloaded_bytes": 24,
        "uploaded_by_role": {
            "generalist": {"slots": 2, "bytes": 64},
            "attention": {"slots": 1, "bytes": 28},
        },
    }
    download = {A: torch.zeros(2, 3)}
    assert traffic(upload, download).as_json() == expected
    assert traffic(upload, download, "bfloat16").uploaded_bytes == 12 + 20 + 14
    int8 = traffic(upload, download, "int8")
    # A as a step: 6 numbers and a float32 scale for each of 2 rows
    assert int8.uploaded_by_role["generalist"].bytes == (6 + 2 * 4) + 20
    uploads, downloads = {"ada": upload, "bob": download}, {"ada": download}
    own = traffic_by_client(uploads, downloads, reads_peers=False)
    assert own["ada"].as_json() == expected
    both = traffic_by_client(uploads, downloads, reads_peers=True)
    assert both["ada"].downloaded_bytes == 24 + 24 and both["bob"].downloaded_bytes == 92


@pytest.mark.parametrize(
    "kind", ["one for all", "one each", "none", "views of one", "one that is remembered"]
)
def test_what_the_server_goes_on_from_survives_its_file(tmp_path, kind):
    merged = torch.arange(12.0).reshape(4, 3)
    one, memory = (
        {A: merged, B: torch.ones(2)},
        {"some/thing": torch.zeros(3, dtype=torch.bfloat16)},
    )
    downloads = {
        "one for all": {"ada": one, "bob": one},
        "one each": {"ada": one, "bob": {A: torch.zeros(1)}},
        "none": {"ada": {}, "bob": {}},
        "views of one": {
            "ada": {A: merged[:3], B: merged[:2]},
            "bob": {A: merged[:2], B: merged.T},
        },
        "one that is remembered": {"ada": one, "bob": dict(one)},
    }[kind]
    if kind == "one that is remembered":
        memory["last"] = merged
    folder = RunFolder.create(tmp_path / "run", run_config(tmp_path), {})
    folder.stage("server/state", pack_server(downloads, memory), 1)
    folder.commit(1, [], [])
    loaded, loaded_memory = unpack_server(folder.load("server/state"))
    assert loaded.keys() == downloads.keys() and same(dict(loaded_memory), memory)
    assert all(same(downloads[name], dict(loaded[name])) for name in downloads)


def test_each_tensor_is_kept_once_and_a_client_is_a_number():
    one, other = {A: torch.ones(100, 100), B: torch.ones(2)}, {B: torch.zeros(50)}
    downloads = {f"c{n}": one for n in range(500)} | {f"d{n}": one | other for n in range(500)}
    packed = pack_server(downloads, {"last": one[A]})
    assert sum(t.numel() for t in packed.values() if t.is_floating_point()) == 10000 + 2 + 50
    assert len(packed) == 3 + 2 * (
        501 + 2
    )  # a table for each download that differs, for the memory, for the clients
    loaded, memory = unpack_server(packed)
    assert len({id(d) for d in loaded.values()}) == 501  # what is one object stays one
    assert len({id(t) for d in loaded.values() for t in d.values()} | {id(memory["last"])}) == 3


def test_drift_is_of_those_who_sent_something():
    one, other = {A: torch.zeros(2), B: torch.zeros(3)}, {A: torch.zeros(5)}
    sent = {"x": one, "y": one, "z": one, "w": other}
    uploads = {
        name: {A: torch.full((2,), 1.0 + n), B: torch.zeros(3)} for n, name in enumerate("xyz")
    }
    assert drift(uploads, sent) == pytest.approx((1 + 0 + 1) / 3 / 2)


def personal(path):
    return {
        p.parent.name: safetensors.torch.load_file(p)
        for p in sorted(path.glob("clients/*/personal.safetensors"))
    }


def test_measuring_does_not_change_training(tmp_path):
    """A run with everything evaluated and reported equals one without, to the bit."""
    api.run(run_config(tmp_path, evaluation={"every": 0, "keep": "last"}), tmp_path / "quiet")
    splits = ["train", "valid", "test"]
    settings = {"every": 1, "splits": splits, "batch_size": 3, "keep": "last"}
    watched = run_config(tmp_path, evaluation=settings)
    events = []
    api.run(watched, tmp_path / "watched", report=events.append)
    quiet, loud = personal(tmp_path / "quiet"), personal(tmp_path / "watched")
    assert quiet.keys() == loud.keys() == {"ada", "bob"} and all(
        same(quiet[n], loud[n]) for n in quiet
    )
    assert len(events) > 20


def test_a_client_that_shares_nothing_trains_the_same_whoever_else_takes_part(tmp_path):
    api.run(run_config(tmp_path, "bob", method="local"), tmp_path / "alone")
    api.run(run_config(tmp_path, "ada bob cyd", method="local"), tmp_path / "together")
    assert same(personal(tmp_path / "alone")["bob"], personal(tmp_path / "together")["bob"])


def test_what_is_reported_is_what_is_written_and_the_summary_follows_from_it(tmp_path):
    config, events = run_config(tmp_path, rounds=3), []
    folder = api.run(config, tmp_path / "run", report=events.append)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    kept = [event.as_json() for event in events if event.kind not in ("step", "note")]
    assert kept == lines
    summary = folder.summary().as_json()
    for name, figures in summary["clients"].items():
        own = [line for line in lines if line.get("client") == name]
        (base,) = [
            x
            for x in own
            if x["kind"] == "evaluation" and x["split"] == "test" and x["model"] == "base"
        ]
        (final,) = [
            x
            for x in own
            if x["kind"] == "evaluation" and x["split"] == "test" and x["model"] == "personal"
        ]
        assert base["round"] == 0 and final["round"] == 3
        assert figures["test"]["nats_per_token"] == final["nats_per_token"] < base["nats_per_token"]
        trained = [x for x in own if x["kind"] == "train"]
        assert [x["round"] for x in trained] == [1, 2, 3]
        upload = start_engine(config).clients[name].send(1)
        assert {x["uploaded_bytes"] for x in trained} == {
            sum(t.numel() * 4 for t in upload.values())
        }
        assert figures["uploaded_bytes"] == sum(x["uploaded_bytes"] for x in trained)
    nats = [figures["test"]["nats_per_token"] for figures in summary["clients"].values()]
    assert summary["mean"]["test"]["nats_per_token"] == pytest.approx(np.mean(nats))
    assert summary["mean"]["test"]["perplexity"] == pytest.approx(np.mean(np.exp(nats)))
    assert summary["mean"]["test"]["perplexity_of_mean"] == pytest.approx(math.exp(np.mean(nats)))


def test_the_personal_model_is_what_was_evaluated_last(tmp_path):
    """And `comigs evaluate` finds the run's own figures again."""
    folder = api.run(run_config(tmp_path), tmp_path / "run")
    again = api.evaluate(folder.path)
    for name, figures in folder.summary().as_json()["clients"].items():
        assert again[name]["personal"]["nats_per_token"] == figures["test"]["nats_per_token"]
        assert again[name]["base"]["nats_per_token"] == figures["base_test"]["nats_per_token"]


def test_every_client_ends_with_the_servers_generalists(tmp_path):
    api.run(run_config(tmp_path, options={"adopt": "all", **APART}), tmp_path / "run")
    ada, bob = personal(tmp_path / "run").values()
    for name in ada:
        shared = Slot.parse(name).role in ("generalist", "attention")
        assert torch.equal(ada[name], bob[name]) == shared, name


# Nats of every local step, then every router step, round by round; made in float32 with one thread.
# A change of the code that does not mean to change numbers keeps them. Other processors differ by
# 2e-6.
TRACE = {
    "comigs": {
        "ada": [
            6.319801,
            5.838453,
            6.05479,
            5.853823,
            6.06927,
            5.813423,
            5.744671,
            5.913553,
            5.64476,
            5.558568,
            5.929279,
            5.802425,
        ],
        "bob": [
            5.991876,
            5.980242,
            5.808345,
            5.834038,
            5.810578,
            5.700279,
            5.708633,
            5.824619,
            5.356643,
            5.739204,
            5.721069,
            5.543645,
        ],
    },
    "fedavg": {
        "ada": [6.319801, 5.825119, 6.038758, 5.778898, 5.623752, 5.527885],
        "bob": [5.991876, 5.930283, 5.766317, 5.634039, 5.304466, 5.699196],
    },
    "local": {
        "ada": [6.319801, 5.846428, 6.065901, 5.831417, 5.666181, 5.60908],
        "bob": [5.991876, 5.978836, 5.819285, 5.728109, 5.372751, 5.748871],
    },
}


@pytest.mark.parametrize("method", TRACE)
def test_losses_at_a_fixed_seed_stay_what_they_were(tmp_path, method):
    as_published = {"adopt": "all", **APART} if method == "comigs" else {}
    experts = {"rank": 2, "specialists": 2, "strength": "each"}
    engine = start_engine(
        run_config(tmp_path, method=method, experts=experts, options=as_published)
    )
    losses = {"ada": [], "bob": []}
    downloads, memory = {}, {}
    for round in (1, 2, 3):
        uploads = {}
        for name, client in engine.clients.items():
            client.receive(downloads.get(name, {}))
            log = client.train(round, lambda level, nats: None)
            losses[name] += [*log.train_losses, *log.router_losses]
            uploads[name] = client.send(round)
        context = RoundContext(tuple(engine.clients))
        downloads, memory = client.method.aggregate(
            {n: copy_of(u) for n, u in uploads.items()}, memory, context
        )
    for name, values in losses.items():
        assert values == pytest.approx(TRACE[method][name], abs=1e-5, rel=0)
