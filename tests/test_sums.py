"""Runs whose uploads are summed unseen: `privacy.secure_aggregation`, in one process."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from comigs.app import api
from comigs.app.dry_run import dry_run
from comigs.engines.in_process import InProcess
from comigs.errors import UserError
from comigs.methods.loading import list_methods, load_method
from comigs.runs.folder import RunFolder
from comigs.server.secure_sum import fixed_point, uploads
from tests.conftest import run_config, same

NAMES = "ada bob cyd dan"
ON = {"secure_aggregation": True}
MEAN = {"attention": "mean"}  # what comigs needs for sums


def config_of(root, **tree):
    settings = {"privacy": ON, "client": {"steps": 2, "router_steps": 0}, **tree}
    if settings.get("method", "comigs") == "comigs":
        settings = {"options": MEAN, **settings}
    return run_config(root, NAMES, **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with its uploads in sight and summed unseen, and what the server received."""
    root, seen = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as patch:
        exchange = InProcess.exchange
        for name, privacy in (("plain", {}), ("summed", ON)):
            moved = seen[name] = []

            def observed(self, tasks, downloads, moved=moved):
                answers = exchange(self, tasks, downloads)
                got = {n: dict(reply.upload or {}) for n, reply in answers.replies.items()}
                moved.append((downloads, got))
                return answers

            patch.setattr(InProcess, "exchange", observed)
            api.run(config_of(root, privacy=privacy), root / name)
    return root, seen


def test_the_mean_is_the_plain_mean_to_the_fixed_point_step(runs):
    """In the first round, whose uploads are the same in both runs."""
    _, seen = runs
    plain, summed = seen["plain"][0][1], seen["summed"][0][1]
    step, different = fixed_point.step_of(uploads.REACH, 4), 0
    for slot in plain["ada"]:
        wanted = np.mean([upload[slot].double().numpy() for upload in plain.values()], axis=0)
        mean = summed["ada"][slot].double().numpy()
        np.testing.assert_allclose(mean, wanted, rtol=2**-24, atol=step)
        different += int((mean != plain["ada"][slot].double().numpy()).sum())
    assert different > 100
    for one, other in itertools.pairwise(summed.values()):
        assert all(one[slot] is other[slot] for slot in one)  # nobody's own


def test_so_the_run_is_nearly_the_same_and_drift_is_unknown(runs):
    root, _ = runs
    lines = {name: RunFolder.open(root / name).metrics() for name in ("plain", "summed")}
    ends = {
        name: [line.drift for line in of if line.kind == "server"] for name, of in lines.items()
    }
    assert ends["plain"][1] > 0 and ends["summed"] == [None, None]
    for one, other in zip(lines["plain"], lines["summed"], strict=True):
        assert one.kind == other.kind
        if one.kind == "evaluation":
            assert one.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-4)
        if one.kind == "train":
            assert one.uploaded_bytes == other.uploaded_bytes


def test_masks_are_drawn_anew_and_change_nothing(runs, tmp_path):
    root, _ = runs
    again = api.run(config_of(root), tmp_path / "again")
    assert (again.path / "metrics.jsonl").read_bytes() == (
        root / "summed" / "metrics.jsonl"
    ).read_bytes()
    for name in NAMES.split():
        path = f"clients/{name}/personal"
        assert same(again.load(path), RunFolder.open(root / "summed").load(path))


def test_the_norm_of_the_sum_is_checked_and_each_client_cuts_its_own(runs, tmp_path, monkeypatch):
    """Where a client does not cut its step, the mean is too long and no upload counts."""
    root, _ = runs
    tree = {"rounds": 1, "upload": {"max_norm": 1e-3}, "participation": {"max_failures": 1}}
    folder = api.run(config_of(root, **tree), tmp_path / "cut")
    assert not [line for line in folder.metrics() if line.kind == "absent"]

    monkeypatch.setattr(uploads, "CUT", 50.0)
    monkeypatch.setattr(uploads, "bound_of", lambda limits: 1.0)
    with pytest.raises(UserError, match="0 of the 1 usable uploads"):
        api.run(config_of(root, **tree), tmp_path / "long")


def test_rounds_with_some_of_the_clients_and_methods_that_take_turns(runs, tmp_path):
    root, _ = runs
    drawn = {"participation": {"clients_per_round": 3}, "method": "rolora", "rounds": 3}
    folder = api.run(config_of(root, **drawn), tmp_path / "drawn")
    trained = [line.client for line in folder.metrics() if line.kind == "train"]
    assert len(trained) == 9


def refusal(config):
    with pytest.raises(UserError) as refused:
        dry_run(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


AVERAGES = {"comigs", "comigs-others", "fedavg", "fedprox", "ffa-lora", "fedsa-lora", "rolora"}
AVERAGES |= {"pfedmoe", "fdlora"}


@pytest.mark.parametrize("method", sorted(set(list_methods()) - AVERAGES - {"local"}))
def test_methods_that_look_at_single_uploads_are_refused(method, tmp_path):
    said = refusal(config_of(tmp_path, method=method))
    assert said.startswith("privacy.secure_aggregation: given true, but " + method)


@pytest.mark.parametrize("method", sorted(AVERAGES))
def test_methods_that_average_are_not(method, tmp_path):
    assert load_method(config_of(tmp_path, method=method)).averages


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"upload": {"merge": "median"}}, 'upload.merge: given "median" beside privacy.secure_a'),
        ({"upload": {"merge": "trimmed"}}, 'upload.merge: given "trimmed" beside'),
        ({"upload": {"format": "int8"}}, 'upload.format: given "int8" beside'),
        ({"upload": {"format": "bfloat16"}}, 'upload.format: given "bfloat16" beside'),
        ({"participation": {"late": "discount"}}, 'participation.late: given "discount" beside'),
        ({"privacy": {**ON, "threshold": 0.5}}, "privacy.threshold: given 0.5"),
        ({"privacy": {**ON, "threshold": 1.5}}, "privacy.threshold: given 1.5"),
    ],
    ids=str,
)
def test_settings_that_look_at_single_uploads_are_refused(tree, said, tmp_path):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        config_of(tmp_path, **tree)
    assert "\n" not in str(refused.value)


def test_a_sum_is_of_three_clients_at_least(tmp_path):
    few = config_of(tmp_path, participation={"clients_per_round": 2})
    assert "but 2 of 4 clients are asked in a round; a sum hides one among 3 to 256" in refusal(few)
    for names in ("ada", "ada bob"):
        config = run_config(tmp_path, names, privacy=ON, options=MEAN)
        assert f"but {len(names.split())} of {len(names.split())} clients" in refusal(config)


def test_a_round_needs_no_more_uploads_than_a_sum_is_opened_with(tmp_path):
    """Who missed it could never be added."""
    config = config_of(tmp_path, participation={"min_clients": 4})
    assert "participation.min_clients: given 4, but a sum of 4 clients is opened when 3" in (
        refusal(config)
    )
    load_method(config_of(tmp_path, participation={"min_clients": 3}))


def test_what_is_not_simulated_and_what_looks_for_similar_uploads_is_refused(tmp_path):
    entries = {"ada": {"router_data": "valid"}}
    tree = {"client": {"router_data": "prior"}, "options": MEAN}
    prior = run_config(tmp_path, NAMES, entries, privacy=ON, **tree)
    assert 'client.router_data: given "prior" beside privacy.secure_aggregation' in refusal(prior)
    with pytest.raises(UserError, match="conditions: given beside"):
        config_of(tmp_path, conditions={"latency": 2.0})
