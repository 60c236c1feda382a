"""A client's own model is that of its best round on valid: whoever reads it, whatever happens."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import safetensors.torch

from comigs.app import api
from comigs.client.client import Client
from comigs.personal.model import PersonalModel
from comigs.runs.folder import RunFolder
from comigs.runs.report.page import report_page
from comigs.runs.report.read import read_run
from tests.conftest import run_config, same

ROUNDS = 6
# large steps on text that valid has little in common with: the longer, the worse for valid
LEARNT_BY_HEART = {"rounds": ROUNDS, "client": {"lr": 0.04, "steps": 6}}
OTHER = "0123456789 %&/()=? +*#<>| "


def measured_on(root, name):
    """Folders of a valid and a test of digits and signs."""
    folders = {split: f"{name}-{split}" for split in ("valid", "test")}
    for place, folder in enumerate(folders.values()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            start = 5 + 4 * ord(name[0]) + 2 * place + number
            text = "".join(OTHER[start * k * k // 7 % len(OTHER)] for k in range(90))
            (root / folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folders


def config_of(root, keep="best", names="ada bob", **tree):
    """What a method may do to a model at the end is left out where it can be."""
    entries = {name: {"text": {"train": name, **measured_on(root, name)}} for name in names.split()}
    evaluation = {"keep": keep, **tree.pop("evaluation", {})}
    options = {"finish": "mixture"} if tree.get("method", "comigs") == "comigs" else {}
    tree = {**LEARNT_BY_HEART, "evaluation": evaluation, "options": options, **tree}
    return run_config(root, names, entries, **tree)


def personal(folder, name):
    return safetensors.torch.load_file(folder.path / "clients" / name / "personal.safetensors")


def without_b(tensors):
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".B")}


def valid_by_round(folder, name):
    found = {}
    for line in folder.metrics():
        if line.kind == "evaluation" and (line.client, line.split) == (name, "valid"):
            found[line.round] = line.nats_per_token
    del found[0]  # the base
    return found


def lowest(values):
    return min(values, key=lambda round: values[round])


class Watched:
    """Copies of what each client's tensors were whenever its valid was measured, in order."""

    def __init__(self):
        self.seen = {}

    def __enter__(self):
        measure = Client.evaluate

        def evaluate(client, split, untouched_base=False):
            if split == "valid" and not untouched_base:
                copies = {str(s): t.clone() for s, t in client.train_state.tensors.items()}
                self.seen.setdefault(client.name, []).append(copies)
            return measure(client, split, untouched_base)

        self._patch = patch.object(Client, "evaluate", evaluate)
        self._patch.start()
        return self.seen

    def __exit__(self, *_):
        self._patch.stop()


@pytest.mark.parametrize("method", ["comigs", "fdlora", "flora", "centralized"])
@pytest.mark.few(1)
def test_it_is_the_model_that_was_measured_in_the_round_with_the_lowest_valid(tmp_path, method):
    with Watched() as seen:
        folder = api.run(config_of(tmp_path, method=method), tmp_path / "run")
    measured, summary = api.evaluate(folder.path), folder.summary()
    rounds = {}
    for name in ("ada", "bob"):
        best = rounds[name] = lowest(valid_by_round(folder, name))
        client, figures = summary.clients[name], measured[name]["personal"]
        assert client.kept_round == best
        own, then = personal(folder, name), seen[name][best - 1]
        if method == "fdlora" and best != ROUNDS:
            # Its two LoRA are weighed at the end, through B, and so in no round before the last.
            own, then = without_b(own), without_b(then)
        assert same(own, then)
        assert figures["perplexity"] == pytest.approx(client.test.perplexity, rel=1e-9)
        assert (client.last_test is None) == (best == ROUNDS)
    assert set(rounds.values()) != {ROUNDS}  # else nothing is shown here
    tests = [client.test.perplexity for client in summary.clients.values()]
    assert summary.mean.test.perplexity == pytest.approx(sum(tests) / 2)


def test_what_finishing_costs_never_makes_the_kept_model_worse_on_valid_than_the_last(tmp_path):
    """fdlora gives up some of valid for smaller weights; here it would do that in each round."""
    tree = {"method": "fdlora", "rounds": 3, "options": {"l1": 0.3}}
    tree["client"] = {"lr": 0.005, "steps": 3}
    best = api.run(run_config(tmp_path, **tree), tmp_path / "best")
    tree["evaluation"] = {"keep": "last"}
    last = api.run(run_config(tmp_path, **tree), tmp_path / "last")
    kept, ended = (api.evaluate(folder.path, "valid") for folder in (best, last))
    for name, client in best.summary().clients.items():
        rounds = valid_by_round(best, name)
        assert rounds[2] < rounds[3]  # as it was finished, the last one looks worse
        assert kept[name]["personal"] == ended[name]["personal"]
        assert (client.kept_round, client.last_test) == (3, None)
        assert client.test == last.summary().clients[name].test


@pytest.mark.slow  # two runs of six rounds
def test_training_and_the_last_round_are_what_they_are_without_it(tmp_path):
    best = api.run(config_of(tmp_path), tmp_path / "best")
    last = api.run(config_of(tmp_path, "last"), tmp_path / "last")
    assert [x for x in best.metrics() if x.kind != "kept"] == last.metrics()
    for name, client in last.summary().clients.items():
        kept = best.summary().clients[name]
        assert (client.kept_round, client.last_test) == (None, None)
        assert (kept.last_test or kept.test) == client.test
        assert same(personal(best, name), personal(last, name)) == (kept.kept_round == ROUNDS)


@pytest.mark.parametrize("stop", [2, 1, *range(3, ROUNDS + 1)])
@pytest.mark.few(1)
def test_while_a_run_goes_on_it_is_the_best_so_far_and_stopping_changes_nothing(tmp_path, stop):
    def stopping(event):
        if event.kind == "server" and event.round == stop:
            raise KeyboardInterrupt

    with Watched() as seen, pytest.raises(KeyboardInterrupt):
        run_until(config_of(tmp_path), tmp_path / "run", stopping)
    folder = RunFolder.open(tmp_path / "run")
    for name in ("ada", "bob"):
        values = valid_by_round(folder, name)
        kept = sorted((folder.path / "clients" / name).glob("*.best.safetensors"))
        assert len(kept) == (1 if values else 0)  # one copy
        model = PersonalModel(folder, name, api.base_of(folder))
        if values:
            own = {str(slot): t for slot, t in model.tensors.items()}
            assert same(own, seen[name][lowest(values) - 1])
        model.close()
    api.resume(folder.path)
    whole = api.run(config_of(tmp_path), tmp_path / "whole")
    assert folder.metrics() == whole.metrics() and folder.summary() == whole.summary()
    assert all(same(personal(folder, n), personal(whole, n)) for n in ("ada", "bob"))
    assert not list(folder.path.glob("clients/*/round-*"))


def run_until(config, out, report):
    """`api.run` as it is when it is stopped: the interrupt comes through."""
    with patch("comigs.app.api.Stopped", KeyboardInterrupt):
        api.run(config, out, report=report)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.few(1)
def test_a_client_that_misses_rounds_keeps_the_best_of_those_it_was_measured_in(tmp_path, workers):
    tree = {"participation": {"clients_per_round": 2}, "names": "ada bob cyd"}
    with Watched() as seen:
        folder = api.run(config_of(tmp_path, **tree, workers=workers), tmp_path / "run")
    for name, client in folder.summary().clients.items():
        values = valid_by_round(folder, name)
        assert client.kept_round == lowest(values)
        if workers == 1:
            assert same(personal(folder, name), seen[name][list(values).index(lowest(values))])
    if workers == 2:
        alone = api.run(config_of(tmp_path, **tree), tmp_path / "alone")
        assert folder.metrics() == alone.metrics()
        for name in ("ada", "bob", "cyd"):
            assert same(personal(folder, name), personal(alone, name))


@pytest.mark.slow  # two runs for a word
def test_the_report_says_which_round_it_is(tmp_path):
    folder = api.run(config_of(tmp_path), tmp_path / "run")
    page = report_page(read_run(folder.path))
    assert "best round on valid" in page
    for client in folder.summary().clients.values():
        assert f"{client.kept_round} of {ROUNDS}" in page
    assert "best round on valid" not in report_page(
        read_run(api.run(config_of(tmp_path, "last"), tmp_path / "last").path)
    )
