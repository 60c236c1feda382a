"""One rule for every path in a config: whole, from a home, or from the file that names it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from comigs.app import api
from comigs.bases.load import load_base, loaders
from comigs.config import Config, load_config, relative, to_toml
from comigs.config.base import NAMED_BASES
from comigs.config.sections import DataSection
from comigs.errors import UserError
from comigs.experiments.sweep.plan import read_plan
from comigs.experiments.sweep.spec import to_toml as sweep_to_toml
from comigs.files import write_whole
from tests.runs import write_config

PLACES = {  # a field -> where it is in a config
    "base.name": lambda config: config.base.name,
    "data.root": lambda config: str(config.data.root),
    "data.cache": lambda config: str(config.data.cache),
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home, the folder of a config, and another folder that is worked in."""
    for name in ("home/d", "configs/d", "configs/d e/f", "here", "configs/..d"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "configs/x.toml").write_text('[[clients]]\nname = "ann"\ntext = "ann"\n')
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_every_path_field_is_tried(places):
    paths = {f"data.{n}" for n, f in DataSection.model_fields.items() if f.annotation is Path}
    assert {*PLACES} == paths | {"base.name"}


@pytest.mark.parametrize("field", PLACES)
@pytest.mark.parametrize(
    "given, meant",
    [
        ("~/d", "home/d"),
        ("d", "configs/d"),
        ("./d", "configs/d"),
        ("d e/f", "configs/d e/f"),
        ("..d", "configs/..d"),
        ("../configs/d", "configs/d"),
        ("./none", "configs/none"),
        ("~/none", "home/none"),
        ("{}/home/d", "home/d"),
    ],
)
def test_a_path_means_the_same_in_every_field(places, field, given, meant):
    """From wherever the command is given; and from the config of a run, wherever that is."""
    override = f'{field}="{given.format(places)}"'
    config = load_config(places / "configs/x.toml", [override])
    assert PLACES[field](config) == str(places / meant)
    assert PLACES[field](load_config(Path("../configs/x.toml"), [override])) == str(places / meant)
    for run in (places / "runs/deep/a", places / "configs/d/run"):
        write_run(run, config)
        assert str(places) not in (run / "config.toml").read_text()
        assert PLACES[field](load_config(run / "config.toml")) == str(places / meant)


def write_run(run, config):
    run.mkdir(parents=True, exist_ok=True)
    text = to_toml(relative(config, run))
    write_whole(run / "config.toml", lambda path: path.write_text(text, encoding="utf-8"))


def test_text_and_the_config_of_a_sweep_follow_the_rule(places):
    config = places / "home/tiny.toml"
    config.write_text(
        '[base]\nname = "tiny-gpt2"\n[data]\nroot = "~/d"\n[[clients]]\nname = "ann"\ntext = "x"\n'
    )
    sweep = places / "here/sweep.toml"
    sweep.write_text('config = "~/tiny.toml"\n')
    (run,) = read_plan(sweep).runs
    assert (run.source, run.config.data.root) == (config, places / "home/d")
    copy = places / "here/runs/sweep"
    copy.mkdir(parents=True)
    (copy / "sweep.toml").write_text(sweep_to_toml(read_plan(sweep).sweep, sweep, copy))
    assert os.path.samefile(read_plan(copy / "sweep.toml").runs[0].source, config)
    for document in range(5):
        (places / "home/d/x").mkdir(exist_ok=True)
        (places / f"home/d/x/{document}.txt").write_text(f"text number {document} " * 40)
    for text in ("x", "~/d/x", "folder:~/d/x", str(places / "home/d/x")):
        override = ["data.sequence_length=8", f'clients.ann.text="{text}"', "data.cache=~/store"]
        assert api.prepare(load_config(config, override)).names == ("ann",)
    assert (places / "home/store").is_dir() and not (places / "here/~").exists()


@pytest.mark.parametrize("field", PLACES)
@pytest.mark.parametrize("given", ["~nobody-at-all/d", "a\\u0000b"])
def test_what_cannot_be_a_path_names_the_field(places, field, given):
    with pytest.raises(UserError, match=rf"x\.toml: {field}: ") as refused:
        load_config(places / "configs/x.toml", [f'{field}="{given}"'])
    assert "\0" not in str(refused.value)


@pytest.mark.parametrize("field", PLACES)
@pytest.mark.parametrize("given", ["3", "true", "[]", "{}"])
def test_what_is_no_text_is_no_path(places, field, given):
    with pytest.raises(UserError, match=f"{field}: given .*; must be "):
        load_config(places / "configs/x.toml", [f"{field}={given}"])


def test_our_names_of_bases_are_no_folders(places):
    assert set(NAMED_BASES) == set(loaders())
    for name in (*NAMED_BASES, "org/model", "gpt2"):
        (places / "configs" / name.split("/")[-1]).mkdir(exist_ok=True)
        meant = str(places / "configs/gpt2") if name == "gpt2" else name
        assert load_config(places / "configs/x.toml", [f"base.name={name}"]).base.name == meant


def test_the_default_cache_is_in_the_working_folder_also_where_it_is_written(places):
    """Older runs have it in their configs."""
    default = Config.model_validate({"clients": [{"name": "a"}]}).data.cache
    assert load_config(places / "configs/x.toml").data.cache == default
    assert load_config(places / "configs/x.toml", [f"data.cache={default}"]).data.cache == default


def test_a_run_on_a_folder_beside_the_config_goes_on_from_elsewhere(tmp_path, monkeypatch):
    """Also where text, base, tokens and run have moved together."""
    config = write_config(tmp_path / "a")
    base = load_base(load_config(config).base)
    base.model.save_pretrained(config.parent / "mymodel")
    base.tokenizer.save_pretrained(config.parent / "mymodel")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = load_config(config, ["base.name=mymodel", "rounds=1"])
    api.run(settings, tmp_path / "a/runs/x")
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir("/")
    measured = api.evaluate(tmp_path / "b/runs/x")
    there = load_config(tmp_path / "b/runs/x/config.toml")
    assert there.base.name == str(tmp_path / "b/mymodel")
    assert there.data.cache == tmp_path / "b/cache" and there.data.root == tmp_path / "b"
    assert set(measured) == {"ann", "bob"}


def test_what_is_written_is_on_the_disk_by_the_words_of_the_system(tmp_path, monkeypatch):
    """macOS has another one than Linux; a file system may know neither but the common one."""
    for answers in (True, False):
        asked = []

        def say(file, word, asked=asked, answers=answers):
            asked.append(word)
            if not answers:
                raise OSError(errno.ENOTSUP, "no such word")

        synced = []
        monkeypatch.setattr("comigs.files.fcntl.F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr("comigs.files.fcntl.fcntl", say)
        monkeypatch.setattr("comigs.files.os.fsync", synced.append)
        write_whole(tmp_path / "file", lambda path: path.write_text("whole"))
        assert asked == [51, 51]  # the file, and the folder that has its name
        assert len(synced) == (0 if answers else 2)
