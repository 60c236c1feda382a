"""Clients that are not at work are on the disk, cost no memory, and go on from there as if they had
never left it.
"""

from __future__ import annotations

import gc
import math
import signal
import weakref

import pytest
import torch

from comigs.app import api
from comigs.bases.load import load_base
from comigs.client.client import Client
from comigs.data.prepare import Texts, prepare
from comigs.errors import UserError
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Task
from tests.conftest import copy_of, run_config, same, start_engine
from tests.kills import in_child, kill_self, killed_at
from tests.runs import outcome

QUIET = lambda level, nats: None  # noqa: E731
NAMES = "ada bob cyd dan"


def exchange(engine, round, names="ada bob", downloads=None, train=True):
    """Ask these clients to train, and nothing else; their replies."""
    tasks = {
        name: Task(round=round, train=train, evaluate=(), evaluate_base=())
        for name in names.split()
    }
    answers = engine.exchange(tasks, downloads or {})
    assert not answers.absent and not answers.late and list(answers.replies) == list(tasks)
    assert all(reply.round == round for reply in answers.replies.values())
    return answers.replies


def sampled(root, **tree):
    """A run in which half of the clients are asked in a round."""
    settings = {
        "rounds": 4,
        "participation": {"clients_per_round": 2},
        "evaluation": {"every": 2},
        **tree,
    }
    return run_config(root, NAMES, **settings)


def state_of(client):
    return {part: copy_of(tensors) for part, tensors in client.state().items()}


def assert_equal(one, other):
    assert all(same(one[part], other[part]) for part in ("experts", "optimizer"))


def test_a_client_that_was_idle_goes_on_as_one_that_stayed(tmp_path):
    """To the bit: tensors, moments, counts and what it sends, over rounds in which others were at
    work.
    """
    engine = start_engine(run_config(tmp_path, NAMES, rounds=6)).engine
    stayed = engine.host.client("bob")
    for round, names in enumerate(("ada bob", "cyd", "dan ada", "bob cyd", "bob"), 1):
        replies = exchange(engine, round, names)
        if "bob" in names:
            stayed.receive({}, round)
            stayed.train(round, QUIET)
            assert same(replies["bob"].upload, stayed.send(round))
            assert_equal(state_of(engine.host.client("bob", staged=True)), state_of(stayed))
        engine.host.folder.commit(round, [], [])
        assert_equal(state_of(engine.host.client("bob")), state_of(stayed))
    assert stayed.train_state.local_steps == 6


def test_a_client_is_asked_as_it_was_committed_until_the_next_commit(tmp_path):
    """Asked again in the same round it gives the same answer, and does not train twice."""
    engine = start_engine(run_config(tmp_path)).engine
    exchange(engine, 1)
    engine.host.folder.commit(1, [], [])
    first, second = (
        {slot: t.clone() for slot, t in exchange(engine, 2, "ada")["ada"].upload.items()}
        for _ in "12"
    )
    assert same(first, second)
    assert engine.host.client("ada").train_state.local_steps == 2
    assert engine.host.client("ada", staged=True).train_state.local_steps == 4


def test_files_of_idle_clients_are_neither_written_nor_read(tmp_path):
    engine = start_engine(run_config(tmp_path, NAMES)).engine
    exchange(engine, 1, NAMES)
    engine.host.folder.commit(1, [], [])
    idle = sorted((engine.host.folder.path / "clients" / "cyd").iterdir())
    assert [path.name for path in idle] == [
        "round-0001.experts.safetensors",
        "round-0001.optimizer.safetensors",
    ]
    for path in idle:
        path.write_bytes(b"whoever reads this fails")
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in idle]
    exchange(engine, 2, "ada bob")
    engine.host.folder.commit(2, [], [])
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in idle] == before
    with pytest.raises(UserError, match=r"cyd/round-0001\.experts\.safetensors: damaged"):
        exchange(engine, 3, "cyd")


def test_nothing_of_a_client_stays_in_memory_when_its_exchange_is_over(tmp_path):
    engine, built = start_engine(run_config(tmp_path, NAMES)).engine, []
    make = Client.train

    def watch(client, round, *rest):
        built.extend(
            map(
                weakref.ref,
                (
                    client,
                    *client.train_state.tensors.values(),
                    *client.train_state.optimizers.values(),
                ),
            )
        )
        return make(client, round, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "train", watch)
        replies = exchange(engine, 1, NAMES)
    gc.collect()
    assert len(built) > 4 * 20 and not [ref for ref in built if ref() is not None]
    for tensors in (reply.upload for reply in replies.values()):
        assert not any(
            isinstance(value, torch.Tensor) for value in vars(tensors).values()
        )  # it is in a file


def test_a_run_with_idle_clients_that_is_killed_and_resumed_equals_one_that_was_not(tmp_path):
    config = sampled(
        tmp_path,
        rounds=3,
        client={"steps": 1, "batch_size": 2, "router_every": 2, "router_steps": 1},
    )
    whole = outcome(api.run(config, tmp_path / "whole").path)
    for number, touch in enumerate((40, 80)):
        path = tmp_path / str(number)
        assert killed_at(touch, path, lambda: api.run(config, path))  # noqa: B023
        if path.exists():
            api.resume(path)
        else:
            api.run(config, path)
        assert outcome(path) == whole


def test_a_round_costs_files_for_those_that_were_asked_only(tmp_path):
    path = tmp_path / "run"

    def stop(event):
        if event.kind == "server" and event.round == 2:
            kill_self()

    assert in_child(lambda: api.run(sampled(tmp_path), path, report=stop)) == signal.SIGKILL
    folder = RunFolder.open(path)
    trained = {}
    for line in folder.metrics():
        if line.kind == "train":
            trained[line.client] = line.round
    assert 2 <= len(trained) <= 4
    found = {str(p.relative_to(path)) for p in path.rglob("*.safetensors")}
    assert found == {"server/round-0002.state.safetensors"} | {
        f"clients/{name}/round-{round:04d}.{part}.safetensors"
        for name, round in trained.items() for part in ("experts", "optimizer")
    }  # fmt: skip


def test_at_the_end_everybody_has_a_model_of_its_own(tmp_path):
    """Also who was never asked: it gets the last download."""
    config = sampled(tmp_path, rounds=1)
    folder = api.run(config, tmp_path / "run")
    trained = {line.client for line in folder.metrics() if line.kind == "train"}
    assert len(trained) == 2
    found = {
        str(p.relative_to(folder.path / "clients")) for p in folder.path.rglob("*.safetensors")
    }
    assert found == {f"{name}/personal.safetensors" for name in NAMES.split()}
    for name, result in api.evaluate(folder.path).items():
        assert (
            result["personal"]["nats_per_token"]
            == folder.summary().as_json()["clients"][name]["test"]["nats_per_token"]
        )
        assert math.isfinite(result["base"]["nats_per_token"])


def test_the_text_of_a_client_is_tokenised_when_it_is_first_asked(tmp_path, monkeypatch):
    config, looks = sampled(tmp_path, rounds=1), []
    look = Texts.load
    monkeypatch.setattr(
        Texts, "load", lambda texts, name: (looks.append(name), look(texts, name))[1]
    )
    lines, seen = [], []

    def report(event):
        if event.kind == "train":
            seen.append((event.client, set(looks)))

    folder = api.run(config, tmp_path / "run", report=report, say=lines.append)
    asked = {client for client, _ in seen}
    assert len(asked) == 2 and all(looked == asked for _, looked in seen)
    assert "4 clients: a client's text is tokenised when it is first asked" in lines
    described = folder.environment()["data"]
    texts = prepare(config, load_base(config.base).encoder).outlines()
    assert list(described) == NAMES.split()
    for name, splits in described.items():
        for split, facts in splits.items():
            assert facts["sha256"] == [text.text_sha256 for text in getattr(texts[name], split)]
            assert "tokens" not in facts and facts["documents"] > 0 and facts["bytes"] > 0


@pytest.mark.parametrize("method", ["pcl", "comigs", "fedalt", "flexlora", "hetlora", "rolora"])
@pytest.mark.few(3)
def test_every_kind_of_method_runs_with_idle_clients(tmp_path, method):
    folder = api.run(sampled(tmp_path, method=method, rounds=3), tmp_path / "run")
    assert folder.checkpoint().finished
    for name in NAMES.split():
        assert all(
            bool(t.isfinite().all()) for t in folder.load(f"clients/{name}/personal").values()
        )


def test_peers_are_measured_by_clients_as_they_left_their_training(tmp_path):
    """And by nobody else."""
    engine = start_engine(run_config(tmp_path, "ada bob cyd", method="pcl", options={})).engine
    uploads = {name: reply.upload for name, reply in exchange(engine, 1, "ada cyd").items()}
    nats = engine.probe(uploads, 1)
    assert nats.keys() == {"ada", "cyd"} and all(
        row.keys() == {"ada", "cyd"} for row in nats.values()
    )
    trained = engine.host.client("ada")
    trained.receive({}, 1)
    trained.train(1, QUIET)
    assert nats["ada"] == trained.probe({name: dict(upload) for name, upload in uploads.items()}, 1)
