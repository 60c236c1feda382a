"""Private runs: what they spend, when they stop, what a crash costs, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from comigs.app import api
from comigs.app.dry_run import dry_run
from comigs.app.privacy import privacy_lines
from comigs.app.setup import attached
from comigs.bases.load import load_base
from comigs.client.estimate import BY_DOCUMENT, training_steps
from comigs.config import parse_config
from comigs.errors import UserError
from comigs.experiments.run_data import read_run_folder
from comigs.methods.loading import list_methods, load_method
from comigs.runs.metrics import Absent, Evaluation, Step, Train, Warned
from comigs.runs.report.privacy_part import privacy_note
from comigs.runs.report.read import read_run
from comigs.runs.simulated import Attempt
from tests.chats import write_lines
from tests.conftest import run_config

PRIVATE = {"level": "document", "delta": 1e-3, "expected_batch": 3}


class Killed(Exception):
    """A process ends in the middle of a round."""


def config_of(root, names="ada bob", privacy=None, **tree):
    return run_config(root, names, privacy={**PRIVATE, **(privacy or {})}, **tree)


def spent(folder, client="ada"):
    """The epsilon of each round of a client."""
    lines = [line for line in folder.metrics() if isinstance(line, Train)]
    return [line.epsilon for line in lines if line.client == client]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("private-runs")


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def crashed(root, said):
    """Three rounds for epsilon 8, of which the second was begun twice."""
    config = config_of(root, "ada bob", {"epsilon": 8.0}, rounds=3)

    def until_round_two(event):
        if isinstance(event, Step) and event.round == 2:
            raise Killed

    with pytest.raises(Killed):
        api.run(config, root / "crashed", until_round_two, said.append)
    return api.resume(root / "crashed")


def test_epsilon_is_committed_and_a_round_that_is_asked_again_counts_again(crashed):
    # Ada was at work when the process died; bob had not begun.
    ada, bob = spent(crashed), spent(crashed, "bob")
    assert ada[0] == bob[0] < bob[1] < bob[2] <= 8
    assert ada[1] == bob[2]  # two rounds in the file, three on the ledger
    ledger = json.loads((crashed.path / "clients/ada/privacy.json").read_bytes())
    assert [entry["round"] for entry in ledger] == [1, 2, 2]


def test_rounds_stop_where_the_budget_ends_for_whom_it_ends(crashed):
    """Bob goes on alone; ada still gets the last download, and has a model."""
    lines = crashed.metrics()
    absent = [line for line in lines if isinstance(line, Absent)]
    assert [(a.client, a.round, a.reason) for a in absent] == [("ada", 3, "privacy budget spent")]
    measured = [line for line in lines if isinstance(line, Evaluation) and line.round == 3]
    assert {line.client for line in measured if line.split == "test"} == {"ada", "bob"}
    assert not [line for line in lines if isinstance(line, Warned)]


@pytest.mark.parametrize("conditions", [{}, {"latency": 0.1, "machine": 1000.0}])
def test_where_nobody_has_any_left_the_run_ends_with_the_model_of_that_round(
    crashed, root, tmp_path, conditions
):
    config = config_of(root, "ada", {"epsilon": 8.0}, rounds=3, conditions=conditions)

    def until_round_two(event):
        if isinstance(event, Step) and event.round == 2:
            raise Killed

    with pytest.raises(Killed):
        api.run(config, tmp_path / "alone", until_round_two)
    folder = api.resume(tmp_path / "alone")
    warned = [line for line in folder.metrics() if isinstance(line, Warned)]
    assert [(line.sign, line.round) for line in warned] == [("privacy-budget-spent", 2)]
    assert warned[0].message.endswith("what clients share is that of round 2")
    assert folder.checkpoint().finished and len(spent(folder)) == 2
    assert folder.summary().clients["ada"].test.perplexity and folder.summary().rounds == 2


def test_a_dry_run_says_epsilon_noise_and_documents(root, crashed, said):
    shown = []
    dry_run(config_of(root, "ada bob", {"epsilon": 8.0}, rounds=3), say=shown.append)
    (bound,) = (line for line in shown if line.startswith("private by document"))
    assert bound in said and "epsilon 8, delta 0.001, noise 0.738" in bound
    has = "documents in train, of which a step has 3 on average: ada 7 and bob 7"
    noise = "noise on each number of a step's mean: 0.25 of privacy.clip for ada"
    loud = (
        "TOO MUCH NOISE to learn much of what is shared, above 0.1 of privacy.clip: ada and bob; "
        "ada would have 0.1 with about 18 documents and privacy.expected_batch = 8"
    )
    at = shown.index(bound)
    assert shown[at + 1 : at + 4] == [has, noise, loud]


class Outlines:
    """Texts with so many documents in train, as a dry run asks for them."""

    def __init__(self, **documents):
        self.documents = documents

    def outlines(self):
        train = {name: [SimpleNamespace(num_documents=n)] for name, n in self.documents.items()}
        return {name: SimpleNamespace(train=of) for name, of in train.items()}


def test_a_dry_run_names_the_clients_with_too_few_documents(root):
    config = config_of(root, "ada", {"epsilon": 8.0, "expected_batch": 8}, rounds=10)
    lines = list(privacy_lines(config, Outlines(cyd=800, ada=40, bob=20, dan=900)))
    assert lines[1].endswith("8 on average: cyd 800, ada 40, bob 20 and dan 900")
    assert (
        lines[2].endswith(" for bob") and ": bob; bob would have 0.1 with about 27 doc" in lines[3]
    )
    # With as many documents, and that batch, nothing is said.
    more, batch = re.search(r"about ([\d,]+) documents .* = ([\d,]+)$", lines[3]).groups()
    config = config_of(root, "ada", {"epsilon": 8.0, "expected_batch": float(batch)}, rounds=10)
    assert len(list(privacy_lines(config, Outlines(bob=int(more))))) == 3


def test_noise_that_counts_as_none_is_promised_nothing_anywhere(root, tmp_path):
    config = config_of(root, "ada", {"noise_multiplier": 0.05})
    line = next(privacy_lines(config, Outlines(ada=9)))
    assert line == "NOT PRIVATE: noise 0.05 times privacy.clip counts as none"
    clients = {"level": "client", "noise_multiplier": 0.05, "delta": 0.1}
    by_client = run_config(root, "ada bob", method="fedavg", privacy=clients)
    assert next(privacy_lines(by_client, Outlines())) == line
    for one in (config, by_client):
        said = "no differential privacy, as noise of 0.05 times the clip counts as none"
        assert one.privacy.promise.startswith(said)
    run = read_run(api.run(config, tmp_path / "run").path)
    assert "Not private." in privacy_note(run)
    assert privacy_note(replace(run, train=())) == ""  # before its first round


@pytest.mark.parametrize("method", list_methods())
def test_each_method_is_private_or_says_why_not(root, method):
    config = config_of(root, "ada bob", {"noise_multiplier": 1.0}, method=method)
    able = {"comigs", "fedavg", "fedprox", "ffa-lora", "fedsa-lora", "rolora", "fedex-lora"}
    if method in able:
        assert load_method(config).leaks == ""
        return
    with pytest.raises(UserError, match=f"privacy.level: .* {method} cannot be private: .+; must"):
        load_method(config)


@pytest.mark.parametrize(("method", "at_home"), [("comigs", 10), ("fedavg", 0), ("rolora", 0)])
def test_the_time_counts_what_a_private_client_trains_at_home(root, tmp_path, method, at_home):
    """Nothing, where it only sends: 4 steps and twice 3 of the router, where it does not."""
    client = {"steps": 4, "batch_size": 3, "router_every": 2, "router_steps": 3}
    noise = {"noise_multiplier": 1.0}
    config = config_of(root, "ada", noise, method=method, client=client, rounds=1)
    with attached(config, load_base(config.base)) as (_, shapes):
        steps = training_steps(config, load_method(config), shapes["ada"], local=4, phases=2)
    assert steps == BY_DOCUMENT * 4 + at_home
    metrics = api.run(config, tmp_path / "run").metrics()
    (done,) = [line for line in metrics if isinstance(line, Train)]
    assert done.router_steps == (at_home and 6) and done.local_steps == 4


@pytest.mark.parametrize("level", ["document", "client"])
def test_where_nothing_is_sent_nothing_is_private(root, level):
    """Two specialists each, and attention LoRA that stays home."""
    home = {"generalists": 0, "specialists": 2, "share_attention": False}
    privacy = {"level": level, "noise_multiplier": 1.0, "delta": 1e-3}
    tree = {"options": {"attention": "mean"}, "privacy": privacy}
    config = run_config(root, experts=home, **tree)
    with pytest.raises(UserError, match="comigs cannot be private: as it is set it sends nothing"):
        load_method(config)
    load_method(run_config(root, experts={**home, "share_attention": True}, **tree))


@pytest.mark.parametrize("method", ["fedprox", "ffa-lora", "fedsa-lora", "rolora", "fedex-lora"])
def test_every_private_method_runs(root, tmp_path, method):
    config = config_of(root, "ada", {"noise_multiplier": 0.5, "noise_seed": 1}, method=method)
    folder = api.run(config, tmp_path / "run")
    assert spent(folder) == [None, None]  # who knows the seed can take the noise away
    assert folder.summary().clients["ada"].test.perplexity


def test_steps_of_what_is_sent_count_as_work_and_as_budget(root, tmp_path, monkeypatch):
    """Naive: every document is drawn in every noised step, and has a window of 12 tokens."""
    everybody = "comigs.client.private_steps.poisson_sample"
    monkeypatch.setattr(everybody, lambda random, population, rate: range(population))
    conditions = {"tokens_per_second": 50.0, "upload": 1e12, "download": 1e12, "latency": 0.0}
    privacy = {"noise_multiplier": 0.5, "noise_seed": 1}
    config = config_of(root, "ada bob", privacy, conditions=conditions, rounds=1)
    folder = api.run(config, tmp_path / "run")
    documents = read_run(folder.path).environment["data"]["ada"]["train"]["documents"]
    own, router, sent = 2 * 4 * 12, 2 * 4 * 12, 2 * documents * 12
    (line,) = [x for x in folder.metrics() if isinstance(x, Train) and x.client == "ada"]
    assert (line.trained_tokens, line.router_tokens, line.sent_tokens) == (own, router, sent)
    (tried,) = [x for x in folder.metrics() if isinstance(x, Attempt) and x.client == "ada"][:1]
    assert tried.tokens == own + router + sent
    (row,) = [row for row in read_run_folder(folder.path).clients if row["client"] == "ada"]
    assert row["trained_tokens"] == own + sent


@pytest.mark.slow
def test_two_workers_come_to_what_one_process_does(root, tmp_path):
    """The noise can be drawn again here; nowhere else would runs be alike."""
    privacy, folders = {"noise_multiplier": 0.5, "noise_seed": 1}, []
    for workers in (1, 2):
        config = config_of(root, "ada bob", privacy, workers=workers)
        folders.append(api.run(config, tmp_path / str(workers)))
    assert folders[0].metrics() == folders[1].metrics()


def test_new_noise_makes_another_run_and_the_seed_has_no_part_in_it(root, tmp_path):
    config = config_of(root, "ada", {"noise_multiplier": 0.5}, rounds=1)
    first, second = (api.run(config, tmp_path / name) for name in "ab")
    assert first.metrics() != second.metrics()
    assert spent(first) == spent(second)


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "noise_multiplier: given 1 beside"),
        ({}, "privacy.epsilon: missing"),
        ({"level": "none", "epsilon": 1.0}, "nothing is private; it must be left out"),
        ({"epsilon": 0.0}, "privacy.epsilon: given 0.0; must be above 0"),
        ({"epsilon": 1.0, "delta": 0.2}, "7 documents in train; must be below 1 / 7 = 0.14"),
        ({"epsilon": 1.0, "expected_batch": 9.0}, "client ada: 7 documents in train, but a step"),
    ],
)
def test_what_cannot_be_is_one_line(root, tmp_path, privacy, why):
    with pytest.raises(UserError) as refused:
        plain = run_config(root, "ada bob").model_dump(mode="json")
        api.run(parse_config({**plain, "privacy": {**PRIVATE, **privacy}}), tmp_path / "run")
    assert why in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", [False, True])
def test_a_text_without_documents_is_refused_with_how_to_split_it(root, tmp_path, split):
    long = "\n\n".join(f"paragraph {n} of a long letter" for n in range(90))
    (tmp_path / "long.txt").write_text(long)
    text = str(tmp_path / "long.txt")
    if split:
        text = {"train": text}
        for other in ("valid", "test"):
            pages = [{"text": f"page {n} of {other}, {'word ' * 20}"} for n in range(9)]
            write_lines(tmp_path / f"{other}.jsonl", pages)
            text[other] = str(tmp_path / f"{other}.jsonl")
    config = config_of(root, "ada", {"epsilon": 1.0}, entries={"ada": {"text": text}})
    with pytest.raises(UserError, match=r"long.txt\" is one document.* a \.jsonl file with a line"):
        api.run(config, tmp_path / "run")


def test_a_share_of_the_text_is_refused_since_each_document_moves_its_end(root):
    with pytest.raises(UserError, match=r"data.train_share: given 0.5 beside privacy.level = "):
        config_of(root, "ada", {"noise_multiplier": 0.5}, data={"train_share": 0.5})
