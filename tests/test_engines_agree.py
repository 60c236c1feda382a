"""In-process and Flower are one product: what is trained, sent, merged and measured is the same to
the bit.
"""

from __future__ import annotations

import pytest

from comigs.app import api
from comigs.config import TrackSection
from comigs.engines.in_process import InProcess
from comigs.federation.flower.engine import Flower
from comigs.methods.loading import list_methods, load_method
from comigs.runs.folder import RunFolder
from tests.conftest import bits, run_config
from tests.local_grid import Federation
from tests.test_best_round import lowest, valid_by_round
from tests.trackers import of_tensorboard

NAMES = ("ada", "bob", "cyd")
WEIGHED = {
    name: {"weight": 1.0} for name in NAMES
}  # a federation does not weigh by tokens, which clients claim
UNEQUAL = {
    "ada": {"weight": 1.0},
    "bob": {"weight": 2.0, "specialist_rank": 3},
    "cyd": {"weight": 0.5},
}
RANKS = {name: {**WEIGHED[name], "rank": rank} for name, rank in zip(NAMES, (2, 3, 1), strict=True)}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three resident trainers, for all runs of this file."""
    root = tmp_path_factory.mktemp("federation")
    run_config(root / "text", " ".join(NAMES))
    return Federation(root, NAMES, root / "text")


@pytest.fixture
def both(federation, monkeypatch, tmp_path):
    """Runs a config on both engines and compares everything."""

    def run(config, out):
        moved = {kind: [] for kind in (InProcess, Flower)}
        for kind, seen in moved.items():
            monkeypatch.setattr(kind, "exchange", recorded(kind.exchange, seen))
        api.run(config, tmp_path / out / "in-process")
        federation.run(tmp_path / out / "flower", config)
        one, other = (RunFolder.open(tmp_path / out / kind) for kind in ("in-process", "flower"))
        assert (one.path / "metrics.jsonl").read_bytes() == (
            other.path / "metrics.jsonl"
        ).read_bytes()
        assert moved[InProcess] == moved[Flower] and len(moved[Flower]) == config.rounds + 1
        for name in (client.name for client in config.clients):
            own = federation.root / "devices" / name / "runs" / (other.path / ".run-id").read_text()
            models = [
                folder.load(f"clients/{name}/personal") for folder in (one, RunFolder.open(own))
            ]
            assert all_bits(models[0]) == all_bits(models[1])
        assert not list(other.path.glob("clients/*"))  # nothing personal was ever on the server
        return one, other

    return run


def recorded(exchange, seen):
    """Everything that went to clients and came back, as bits."""

    def observed(self, tasks, downloads):
        answers = exchange(self, tasks, downloads)
        uploads = {n: r.upload and all_bits(r.upload) for n, r in answers.replies.items()}
        lines = {n: (as_json(r.metrics), r.round) for n, r in answers.replies.items()}
        given = {n: all_bits(d) for n, d in downloads.items() if d}
        seen.append((dict(tasks), given, uploads, repr(lines), answers.absent, answers.late))
        return answers

    return observed


def as_json(lines):
    """Return lines as they travel: over a network they are read only where they are checked."""
    return [line if isinstance(line, dict) else line.as_json() for line in lines]


def all_bits(tensors):
    return {str(slot): bits(tensor) for slot, tensor in tensors.items()}


FEDERABLE = [name for name in list_methods() if name != "centralized"]


@pytest.mark.parametrize("name", FEDERABLE)
@pytest.mark.few(3)
def test_every_method_is_the_same_on_both_engines(name, both, federation):
    config = run_config(federation.root / "text", "ada bob", WEIGHED, method=name, rounds=3)
    assert not load_method(config).centralized
    both(config, name)


@pytest.mark.parametrize("name", ["comigs", "hetlora", "flora"])
@pytest.mark.few(1)
def test_so_it_is_with_clients_that_differ(name, both, federation):
    entries = UNEQUAL if name == "comigs" else RANKS
    both(
        run_config(federation.root / "text", " ".join(NAMES), entries, method=name, rounds=3), name
    )


@pytest.mark.parametrize(
    "tree",
    [
        {"participation": {"clients_per_round": 1}, "method": "flora"},
        {"upload": {"format": "int8"}, "participation": {"clients_per_round": 2}},
        {
            "evaluation": {"every": 2, "splits": ["valid", "test"]},
            "client": {"router_data": "crossfit"},
        },
        {"participation": {"clients_per_round": 2}},
        {
            "upload": {"merge": "median"},
            "options": {"attention": "mean"},
            "evaluation": {"every": 0, "keep": "last"},
        },
        {"upload": {"format": "bfloat16"}, "method": "pcl"},
        {"upload": {"format": "int8"}},
    ],
    ids=repr,
)
@pytest.mark.few(2)
def test_so_it_is_with_other_settings(tree, both, federation):
    both(
        run_config(federation.root / "text", " ".join(NAMES), WEIGHED, **{"rounds": 3, **tree}),
        "run",
    )


def test_so_it_is_where_a_router_follows_similar_clients(both, federation):
    entries = {**WEIGHED, "cyd": {"weight": 1.0, "router_data": "prior"}}
    one, _ = both(run_config(federation.root / "text", " ".join(NAMES), entries, rounds=3), "prior")
    assert [list(line.prior) for line in one.metrics() if line.kind == "server"] == [["cyd"]] * 3


def test_trackers_are_told_by_whoever_commits(both, federation):
    pytest.importorskip("tensorboard", reason="comigs[tensorboard] is not installed")
    config = run_config(federation.root / "text", " ".join(NAMES), entries=WEIGHED)
    track = TrackSection(to=("tensorboard",))
    one, other = both(config.model_copy(update={"track": track}), "tracked")
    points = of_tensorboard(one.path)
    assert points == of_tensorboard(other.path) and len(points) > 30
    assert not list((federation.root / "devices").rglob("track"))


def test_each_device_keeps_its_best_round_at_home(both, federation):
    settings = {"lr": 0.08, "steps": 4}
    config = run_config(
        federation.root / "text", " ".join(NAMES), WEIGHED, rounds=4, client=settings
    )
    _, other = both(config, "best")
    kept = {line.client: line.round for line in other.metrics() if line.kind == "kept"}
    assert kept.keys() == set(NAMES)
    for name in NAMES:
        assert kept[name] == lowest(valid_by_round(other, name))
        own = federation.root / "devices" / name / "runs" / (other.path / ".run-id").read_text()
        assert RunFolder.open(own).summary().clients[name].kept_round == kept[name]
