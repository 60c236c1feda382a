"""The same from Python: `import comigs` and a few functions."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import comigs
from comigs.app import api
from comigs.config import load_config
from comigs.errors import UserError
from comigs.files import cache_folder
from comigs.runs.environment import without_folders
from comigs.runs.new import free_folder
from comigs.text import large
from tests.kills import in_child
from tests.runs import ENVIRONMENT, files, finished, refused, write_config


def test_every_public_name_is_there():
    for name in comigs.__all__:
        assert getattr(comigs, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = comigs.trian


def test_reading_a_config_needs_no_torch():
    code = (
        "import sys, comigs; comigs.load_config; comigs.UserError; assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_a_run_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events, lines = [], []
    config = comigs.load_config(write_config(tmp_path), ["rounds=1"])
    folder = comigs.run(config, report=events.append, say=lines.append)
    assert folder.path == Path("runs/tiny")
    assert folder.summary().rounds == 1
    assert {e.kind for e in events} == {
        "note",
        "step",
        "train",
        "evaluation",
        "kept",
        "server",
        "download",
    }
    assert folder.metrics() == [e for e in events if e.kind not in ("note", "step")]
    assert any(line == "run folder runs/tiny" for line in lines)
    assert comigs.run(config).path == Path("runs/tiny-2")
    assert comigs.run(config, "elsewhere").path == Path("elsewhere")
    before = files(Path("elsewhere"))
    assert comigs.resume("elsewhere").path == Path("elsewhere")
    assert files(Path("elsewhere")) == before
    assert set(comigs.prepare(config).names) == {"ann", "bob"}


def test_what_was_left_to_us_is_written_down():
    written = api.open_run(finished() / "run").config()
    assert (written.client.lr, written.client.router_lr) == (2e-3, 2e-3)
    assert (written.base.device, written.base.dtype, written.base.threads) == ("cpu", "float32", 1)
    assert written.data.root == finished()


def test_the_environment_is_written_down():
    environment = api.open_run(finished() / "run").environment()
    assert environment["versions"].keys() >= {"comigs", "torch", "transformers", "python"}
    assert len(environment["base_fingerprint"]) == 64
    train = environment["data"]["ann"]["train"]
    assert train["tokens"] > 100 and train["documents"] == 3 and len(train["sha256"][0]) == 64
    assert "the cat" not in (finished() / "run" / "env.json").read_text()  # no text


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("/home/ann/patients/clinic.toml", "clinic.toml"),
        ("~/patients/clinic.toml", "clinic.toml"),
        ("--out=/data/st mary/run", "--out=run"),
        ('data.root="/home/ann/text"', 'data.root="text"'),
        ('clients.a.text={train="/a/t.txt", test="/b/t.txt"}', None),
        ("configs/main.toml", "configs/main.toml"),
        ('base.name="https://host/model.gguf"', 'base.name="https://host/model.gguf"'),
        ("client.lr=1e-3", "client.lr=1e-3"),
    ],
)
def test_the_command_that_is_kept_names_no_folder_of_this_machine(word, told):
    told = told or 'clients.a.text={train="t.txt", test="t.txt"}'
    assert without_folders(word) == told


def test_a_run_can_be_moved_with_its_text(tmp_path, monkeypatch):
    there = Path(shutil.copytree(finished(), tmp_path / "over there"))
    monkeypatch.chdir(tmp_path)
    assert api.open_run(there / "run").config().data.root == there
    assert api.evaluate(there / "run", "test", "ann")["ann"]["personal"]["tokens"] > 0


def test_runs_may_lie_behind_a_link(tmp_path, monkeypatch):
    (tmp_path / "big" / "disk").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "runs").symlink_to(tmp_path / "big" / "disk")
    monkeypatch.chdir(tmp_path / "here")
    folder = api.run(comigs.load_config(write_config(tmp_path / "here"), ["rounds=1"]))
    assert folder.config().data.root == tmp_path / "here"
    assert api.evaluate(folder.path, "test", "bob")["bob"]["base"]["tokens"] > 0


def test_evaluate_gives_the_summarys_figures():
    run = finished() / "run"
    summary = api.open_run(run).summary().as_json()["clients"]
    for name, result in api.evaluate(run).items():
        assert result["personal"]["nats_per_token"] == pytest.approx(
            summary[name]["test"]["nats_per_token"], abs=1e-6
        )
        assert result["base"]["nats_per_token"] == pytest.approx(
            summary[name]["base_test"]["nats_per_token"], abs=1e-6
        )


def test_an_unknown_split_is_refused_before_anything_is_read():
    with pytest.raises(
        UserError, match=r'split: given "tets"; must be train, valid or test. Did you mean "test"\?'
    ):
        api.evaluate("nowhere", "tets")


def test_a_full_device_is_said_in_one_line(tmp_path):
    config = comigs.load_config(finished() / "tiny.toml", [f'data.cache="{finished() / "cache"}"'])
    with (
        patch(
            "comigs.engines.host.Client.train",
            side_effect=torch.OutOfMemoryError("CUDA out of memory.\n..."),
        ),
        pytest.raises(
            UserError, match=r"the memory of the device is full; .* lower client\.micro_batch_size"
        ),
    ):
        api.run(config, tmp_path / "run")


def test_a_full_device_is_said_in_one_line_wherever_it_is_full(capsys):
    full = torch.OutOfMemoryError("CUDA out of memory.\nTry")
    with patch("comigs.app.api.run", side_effect=full):
        line = refused(capsys, "run", finished() / "tiny.toml")
    assert line == "error: the memory of the device is full: CUDA out of memory. Try"


@pytest.mark.parametrize(
    "number, words",
    [(950, "950"), (11_728, "11,728"), (4_250_000, "4.2 M"), (135e6, "135 M"), (7.2e9, "7.2 B")],
)
def test_large_numbers(number, words):
    assert large(int(number)) == words


def test_a_free_folder(tmp_path):
    assert free_folder(tmp_path / "a") == tmp_path / "a"
    for name in ("a", "a-2"):
        (tmp_path / name).mkdir()
    assert free_folder(tmp_path / "a") == tmp_path / "a-3"


def test_of_two_runs_for_one_folder_the_second_prepares_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("COMIGS_CACHE", str(tmp_path / "cache"))  # nobody else starts runs there
    config = load_config(write_config(tmp_path / "text"))
    first, lines, inside = tmp_path / "out", [], []

    def second():
        with pytest.raises(UserError, match="out: another process is starting a run there"):
            api.run(config, first, say=lines.append)
        inside.append(True)

    class Ready(Exception):
        """The first run has read its text, and is stopped."""

    def say(line):
        if line.startswith("base "):  # the first run prepares
            in_child(second)
            with pytest.raises(UserError, match="another process"):
                api.run(config, str(first), say=lines.append)
            raise Ready

    with pytest.raises(Ready):
        api.run(config, first, say=say)
    assert lines == [] and not first.exists()
    assert api.run(config, first).path == first  # whoever gave up has let go of it
    assert not list((cache_folder() / "starting").glob("*.lock"))
