"""What a device holds after a federation is a model of its owner's: every command takes it."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from comigs.app import api
from comigs.personal.serve import catalogue
from comigs.runs.environment import require_one_base
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Evaluation
from tests.conftest import run_config
from tests.local_grid import Federation
from tests.runs import comigs, refused

NAMES = ("ada", "bob")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    """Ada's own run folder after a federated run, as a device leaves it."""
    root = tmp_path_factory.mktemp("device")
    config = run_config(root / "text", " ".join(NAMES), options={"finish": "mixture"})
    federation = Federation(root, NAMES, root / "text")
    federation.run(root / "server", config)
    return federation.device_run("ada")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Its owner is in some other folder."""
    monkeypatch.chdir(tmp_path)


def said_by_the_run(device):
    """The test perplexity that the device measured itself in the run."""
    lines = RunFolder.open(device).metrics()
    (last,) = [
        line
        for line in lines
        if isinstance(line, Evaluation) and (line.split, line.model) == ("test", "personal")
    ]
    return last.perplexity


def test_it_is_measured_as_in_the_run(device, capsys):
    figures = json.loads(comigs(capsys, "evaluate", device, "--json").out)
    assert list(figures) == ["ada"]
    assert figures["ada"]["personal"]["perplexity"] == pytest.approx(said_by_the_run(device))


@pytest.mark.parametrize("to", ["flat", "peft"])
def test_it_is_exported(device, capsys, tmp_path, to):
    done = comigs(capsys, "export", device, "--client", "ada", "--to", to, "--out", tmp_path / to)
    assert done.code == 0, done
    words = ("evaluate", device, "--model", tmp_path / to, "--json")
    figures = json.loads(comigs(capsys, *words).out)
    if to == "peft":  # flat is another model, fitted to this one
        perplexity = figures["ada"]["personal"]["perplexity"]
        assert perplexity == pytest.approx(said_by_the_run(device), rel=1e-3)


def test_it_writes_and_talks(device, capsys, monkeypatch):
    written = comigs(capsys, "generate", device, "--client", "ada", "--prompt", "engine number")
    assert written.code == 0 and len(written.out) > len("engine number\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("engine number\n/routes\n"))
    words = ("chat", device, "--client", "ada", "--max-new-tokens", 8)
    done = comigs(capsys, *words)
    assert done.code == 0 and "weight of what all know" in done.out


def test_it_is_served(device):
    folder = api.open_run(device)
    require_one_base([folder], "serve them apart")
    models = catalogue.read_models([folder], api.base_of(folder), lambda line: None)
    assert list(models) == [f"{device.name}/ada"]


def test_only_its_own_client_is_there(device, capsys, tmp_path):
    line = refused(capsys, "export", device, "--client", "bob", "--out", tmp_path / "out")
    assert 'no client "bob" in this run; there are: ada' in line
    copy = shutil.copytree(device, tmp_path / "run")
    assert "it goes on when its server asks" in refused(capsys, "resume", copy)
