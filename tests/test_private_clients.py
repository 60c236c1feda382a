"""Privacy by client: what one client can change of a round's mean, and what runs say of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from comigs.app import api
from comigs.app.dry_run import dry_run
from comigs.errors import UserError
from comigs.methods.loading import list_methods, load_method
from comigs.privacy.accountant import Steps, epsilon
from comigs.runs.metrics import Evaluation, RoundEnd
from comigs.runs.report.page import write_report
from comigs.server.private_mean import PrivateMean, sampled_clients
from comigs.slots import Slot
from tests.conftest import run_config
from tests.fake_engine import Numbers, lines_of, rounds_of

NAMES = "ada bob cyd dan"
A, B = Slot(0, "up", "g0", "A"), Slot(0, "up", "g0", "B")
SHAPES = {A: (2, 5), B: (4, 2)}


def config_of(root, privacy=None, **tree):
    given = {"level": "client", "delta": 1e-3, "clip": 0.5, "noise_multiplier": 1.0}
    if tree.get("method", "comigs") == "comigs":
        tree = {"options": {"attention": "mean"}, **tree}  # the server has a mean alone
    return run_config(root, NAMES, privacy={**given, **(privacy or {})}, **tree)


def mean_of(config, uploads, download):
    start = {A: torch.ones(2, 5), B: torch.zeros(4, 2)}
    mean = PrivateMean(config, 1, SHAPES, download, lambda slot, dims: start[slot])
    return mean(uploads)


def drawn(seed, scale):
    random = torch.Generator().manual_seed(seed)
    return {slot: torch.randn(dims, generator=random) * scale for slot, dims in SHAPES.items()}


def test_it_is_the_mean_of_cut_steps_over_the_number_that_is_expected(tmp_path):
    """Naive: from the download where there is one, from the start else."""
    privacy = {"noise_multiplier": 0.0}
    config = config_of(tmp_path, privacy, participation={"clients_per_round": 2})
    download = {B: torch.full((4, 2), 3.0)}
    origin = torch.cat([torch.ones(10), torch.full((8,), 3.0)])
    total = torch.zeros(18)
    uploads = [drawn(1, 9.0), drawn(2, 0.01), drawn(3, 9.0)]
    for slot, tensor in uploads[1].items():
        tensor += 1.0 if slot == A else 3.0
    for upload in uploads:
        step = torch.cat([upload[A].flatten(), upload[B].flatten()]) - origin
        total += step * min(1.0, 0.5 / float(step.norm()))
    found = mean_of(config, uploads, download)
    found = torch.cat([found[A].flatten(), found[B].flatten()])
    assert torch.allclose(found, origin + total / 2, atol=1e-6)  # three came, two are expected


def test_one_client_changes_the_sum_by_the_clip(tmp_path):
    config = config_of(tmp_path, {"noise_seed": 3})
    uploads = [drawn(seed, 9.0) for seed in range(4)]
    both = [mean_of(config, them, {}) for them in (uploads, uploads[:3])]
    apart = math.sqrt(sum(float((both[0][s] - both[1][s]).square().sum()) for s in SHAPES))
    assert 0.49 < 4 * apart < 0.5 * (1 + 1e-5)
    assert not torch.equal(mean_of(config_of(tmp_path), [], {})[B], torch.zeros(4, 2))  # noise


def test_noise_is_as_said(tmp_path):
    config = config_of(tmp_path, {"noise_multiplier": 2.0})
    wide = {A: (200, 200)}
    mean = PrivateMean(config, 1, wide, {}, lambda slot, dims: torch.zeros(dims))([])
    assert abs(float(mean[A].std()) - 2.0 * 0.5 / 4) < 0.004


def test_clients_are_sampled_one_by_one_and_by_nobody_who_could_know(tmp_path):
    config = config_of(tmp_path, participation={"clients_per_round": 2})
    sizes = [len(sampled_clients(config, 1)) for _ in range(400)]
    assert set(sizes) == {0, 1, 2, 3, 4} and abs(sum(sizes) / 400 - 2) < 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("private-clients")
    config = config_of(root, rounds=3, participation={"clients_per_round": 1})
    return api.run(config, root / "run")


def test_a_run_commits_epsilon_also_where_nobody_was_drawn(folder, tmp_path):
    ends = [line for line in folder.metrics() if isinstance(line, RoundEnd)]
    assert [end.epsilon for end in ends] == [
        epsilon([Steps(0.25, 1.0, count)], 1e-3) for count in (1, 2, 3)
    ]
    measured = [line for line in folder.metrics() if isinstance(line, Evaluation)]
    assert {m.client for m in measured if m.model == "personal" and m.split == "test"} == {
        *NAMES.split()
    }
    page = write_report(folder.path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"({ends[-1].epsilon:.3g}, 0.001)-differentially private for each client" in page


def test_a_dry_run_says_it(tmp_path):
    shown = []
    config = config_of(tmp_path, {"noise_multiplier": None, "epsilon": 2.0})
    dry_run(config, say=shown.append)
    (line,) = (line for line in shown if line.startswith("private by client"))
    assert "epsilon 2, delta 0.001" in line and "100% of 4 clients" in line


@pytest.mark.parametrize("method", list_methods())
def test_each_method_gives_back_a_mean_or_says_why_not(tmp_path, method):
    config = config_of(tmp_path, method=method)
    able = {"comigs", "comigs-others", "fedavg", "fedprox", "ffa-lora", "fedsa-lora", "pfedmoe"}
    if method in {*able, "fdlora"}:
        load_method(config)
        return
    with pytest.raises(UserError, match=f"privacy.level: given .client., but {method} cannot"):
        load_method(config)


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"upload": {"merge": "median"}}, "upload.merge: given .median. beside privacy.level"),
        ({"participation": {"late": "discount"}}, "participation.late: given .discount. beside"),
        ({"privacy": {"expected_batch": 3.0}}, "privacy.expected_batch: given 3.0 beside"),
        ({"privacy": {"delta": 0.3}}, "privacy.delta: given 0.3, but there are 4 clients"),
        ({"client": {"router_data": "prior"}}, "clients.ada.router_data: .prior. follows the"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, tree, why):
    with pytest.raises(UserError, match=why):
        config_of(tmp_path, **{"privacy": None, **tree})


def test_whose_step_counts_does_not_depend_on_who_else_is_there(tmp_path):
    """Nor is anybody left out by the median of all steps, which one client more would move."""

    def trouble(name, task, reply):
        if name == "bob" and reply.upload:
            return replace(reply, upload={slot: t + 1e6 for slot, t in reply.upload.items()})
        return reply

    level = {"level": "client", "delta": 1e-3, "noise_multiplier": 0.0}
    plain = rounds_of(tmp_path, Numbers(NAMES, trouble), name="plain")
    private = rounds_of(tmp_path, Numbers(NAMES, trouble), name="private", privacy=level)
    assert {line["client"] for line in lines_of(plain, "absent")} == {"bob"}
    assert not lines_of(private, "absent")


def test_where_everybody_is_lost_the_run_says_so(tmp_path):
    """With a sample whose size decides nothing, too."""
    config = config_of(
        tmp_path, rounds=20, conditions={"dropout": 1.0}, participation={"clients_per_round": 4}
    )
    with pytest.raises(UserError, match=r"round 4: 0 of the 0 usable uploads .* 4 of 4 clients"):
        api.run(config, tmp_path / "run")
