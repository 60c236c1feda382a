"""A run folder that somebody else made: whatever is in it, opening it changes nothing outside of it
and runs no code of theirs. All victims here are harmless.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest

from comigs import load_config
from comigs.app import api
from comigs.errors import Stopped
from comigs.runs.layout import METRICS, TIMINGS
from tests.runs import comigs, files, finished, refused
from tests.test_report_runs import change_metrics

COMMANDS = {
    "resume": (),
    "report": (),
    "evaluate": (),
    "routes": ("--client", "ann"),
    "generate": ("--client", "ann", "--prompt", "the cat"),
}
USES = {
    "chat": ("--client", "ann"),
    "serve": (),
    "export": ("--client", "ann", "--out", "out"),
    "compare": (),
}
TEXTS = ("config.toml", "env.json", METRICS, TIMINGS, "checkpoint.json", "summary.json")
PAGES = (
    "report.html", "audit.json", "audit.html", ".lock", ".run-id", ".progress.jsonl",
    ".answer-0001", ".sum.json", "clients/ann/privacy.json",
)  # fmt: skip
FOLDERS = ("clients", "clients/ann", "server", ".scratch")
TENSORS = (
    "clients/ann/round-0001.experts.safetensors",
    "clients/ann/round-0001.optimizer.safetensors",
    "clients/ann/round-0002.experts.safetensors",  # which the next round writes
    "clients/ann/personal.safetensors",
    "server/round-0001.state.safetensors",
)
MAKING = (".report.html.unfinished", ".checkpoint.json.unfinished", ".summary.json.unfinished")
LAYOUT = (*TEXTS, *PAGES, *FOLDERS, *TENSORS, *MAKING)


@functools.cache
def begun() -> Path:
    """A run of three rounds that was stopped after its first, made once."""
    folder = finished()
    cache = f'data.cache="{folder / "cache"}"'

    def stop(event) -> None:
        if getattr(event, "kind", "") == "server" and event.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        api.run(load_config(folder / "tiny.toml", ["rounds=3", cache]), folder / "begun", stop)
    return folder / "begun"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the stopped run, as it may have been sent to somebody."""
    monkeypatch.chdir(tmp_path)
    return received(begun(), tmp_path / "run")


def received(run, path):
    """A copy of a run, whose text and tokens are where they were."""
    data = load_config(run / "config.toml").data
    shutil.copytree(run, path)
    field(path, "root", data.root)
    field(path, "cache", data.cache)
    return path


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def field(run, name, value):
    """Write another value for a field of config.toml."""
    file = run / "config.toml"
    lines = file.read_text().splitlines()
    assert any(line.startswith(f"{name} = ") for line in lines)
    kept = [line for line in lines if not line.startswith(f"{name} = ")]
    where = 0 if name == "method" else kept.index("[data]") + 1
    file.write_text("\n".join([*kept[:where], f'{name} = "{value}"', *kept[where:]]))


def everything_below(folder):
    """name -> what is there: bytes, or that it is a folder or a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


def link_outside(run, name, victims):
    """Put a link in the place of a file or folder of the run; what was there is outside now."""
    place, victim = run / name, victims / Path(name).name
    victims.mkdir()
    if place.exists():
        place.rename(victim)
    elif name in FOLDERS:
        victim.mkdir()
        (victim / "mine").write_text("somebody's own")
    else:
        victim.write_text("somebody's own")
    place.symlink_to(victim)


@pytest.mark.parametrize("name", LAYOUT)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_link_in_a_run_leads_no_command_out_of_it(tmp_path, capsys, run, command, name):
    victims = tmp_path / "victims"
    link_outside(run, name, victims)
    before = everything_below(victims)
    done = comigs(capsys, command, run, *COMMANDS[command])
    assert everything_below(victims) == before
    if name in MAKING:
        assert done.code == 0
    else:
        assert done.code == 2 and done.err.count("\n") == 1
        assert f"error: {run / name}: a symbolic link" in done.err


@pytest.mark.parametrize("name", ["checkpoint.json", "summary.json", "clients/ann", "report.html"])
@pytest.mark.parametrize("command", COMMANDS | USES)
def test_nor_does_a_link_in_a_finished_run(tmp_path, capsys, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    run, victims = received(finished() / "run", tmp_path / "run"), tmp_path / "victims"
    link_outside(run, name, victims)
    before = everything_below(victims)
    done = comigs(capsys, command, run, *(COMMANDS | USES)[command])
    assert everything_below(victims) == before
    assert done.code == 2 and f"error: {run / name}: a symbolic link" in done.err


@pytest.mark.parametrize("name", ["runs.csv", "compare"])
def test_a_comparison_beside_runs_goes_through_no_link(tmp_path, capsys, monkeypatch, name):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    received(finished() / "run", tmp_path / "sent" / "run")
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "mine").write_text("somebody's own")
    place = tmp_path / "sent" / "compare"
    if name != "compare":
        place.mkdir()
        (place / name).symlink_to(victims / "mine")
    else:
        place.symlink_to(victims)
    before = everything_below(victims)
    assert "error: " in refused(capsys, "compare", "sent")
    assert everything_below(victims) == before


@pytest.mark.parametrize(
    "name",
    [
        "{outside}/mine",
        "../victims/mine",
        "clients/../../victims/mine",
        "clients/../../victims/mine.safetensors",
        "clients/ann/deep/round-0001.experts.safetensors",
        "clients/./round-0001.experts.safetensors",
        "config.toml",
        "notes/mine.safetensors",
        "clients/ann/round-1.experts.safetensors",
        "server/../clients/ann/personal.safetensors",
        "",
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_names_files_of_a_run_only(tmp_path, capsys, run, command, name):
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "mine").write_text("somebody's own")
    (victims / "mine.safetensors").write_text("somebody's own")
    named = name.format(outside=victims)
    checkpoint = json.loads((run / "checkpoint.json").read_text())
    checkpoint["files"][named] = "0" * 64
    (run / "checkpoint.json").write_text(json.dumps(checkpoint))
    before, own = everything_below(victims), everything_below(run)
    done = comigs(capsys, command, run, *COMMANDS[command])
    assert everything_below(victims) == before
    if command != "report":  # which reads no checkpoint
        line = f'checkpoint.json: damaged (files: "{named}" is no name of a file of a run)'
        assert done.code == 2 and line in done.err
        del own[".lock"]
        assert everything_below(run).items() >= own.items()


def test_a_pipe_in_a_run_makes_nobody_wait(tmp_path, capsys, run):
    import os

    (run / TIMINGS).unlink()
    os.mkfifo(run / TIMINGS)
    assert "timings.jsonl" in refused(capsys, "resume", run)
    assert "timings.jsonl" in refused(capsys, "report", run)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *((name, "report") for name in (METRICS, TIMINGS, "tasks.json", "env.json")),
        *((name, "resume") for name in ("env.json", "checkpoint.json")),
    ],
)
def test_json_that_is_more_than_python_reads_is_one_line(capsys, run, name, command):
    for text in ("[" * 100_000, '{"a": ' * 100_000, "1" * 5_000):
        (run / name).write_text(text + "\n")
        said = refused(capsys, command, run)
        assert name in said and len(said) < 400


@pytest.mark.parametrize("name", [METRICS, TIMINGS, "checkpoint.json", "config.toml"])
def test_a_file_with_a_second_name_elsewhere_is_not_written_to(tmp_path, capsys, run, name):
    """What is written anew gets a file of its own; what would be changed in place is refused."""
    victim = tmp_path / "victim"
    victim.hardlink_to(run / name)
    before = victim.read_bytes()
    done = comigs(capsys, "resume", run)
    assert victim.read_bytes() == before
    if name in (METRICS, TIMINGS):
        assert done.code == 2 and f"error: {run / name}: has another name" in done.err
    else:
        assert done.code == 0
    assert comigs(capsys, "report", run).code == 0


def test_nobody_can_prepare_the_name_of_a_file_in_the_making(tmp_path, run, monkeypatch):
    """Even where the name is known, a link that is there is not followed."""
    from comigs.files import write_whole

    victim = tmp_path / "victim"
    victim.write_text("somebody's own")
    monkeypatch.setattr("comigs.files.secrets.token_hex", lambda n: "0" * 16)
    (tmp_path / f".page.{'0' * 16}.unfinished").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "page", lambda path: path.write_text("new"))
    assert victim.read_text() == "somebody's own" and not (tmp_path / "page").exists()


@pytest.mark.parametrize("command", ["evaluate", "resume"])
@pytest.mark.few(1)
def test_the_reader_says_where_the_readers_own_files_go(tmp_path, capsys, run, command):
    there = tmp_path / "anywhere"
    there.mkdir()
    (there / "mine").write_text("somebody's own")
    for theirs in (there, tmp_path / "new", run / "cache"):
        copy = tmp_path / f"run-{theirs.name}"
        shutil.copytree(run, copy)
        field(copy, "cache", theirs if theirs.parent != run else copy / "cache")
        before = files(there)
        assert comigs(capsys, command, copy).code == 0
        assert files(there) == before and not (tmp_path / "new").exists()
        assert not (copy / "cache").exists()
    assert list((tmp_path / ".cache" / "comigs").iterdir())
    field(run, "cache", there)
    assert comigs(capsys, command, run, "--cache", tmp_path / "mine").code == 0
    assert files(there) == before and list((tmp_path / "mine").iterdir())


def test_tokens_that_a_reader_has_already_are_used_where_they_are(tmp_path, capsys, run):
    assert comigs(capsys, "evaluate", run).code == 0
    assert not (tmp_path / ".cache").exists()


@pytest.fixture
def their_method(tmp_path, monkeypatch):
    """A method of somebody's own, which leaves a mark where it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "way.py").write_text(
        "from pathlib import Path\nfrom comigs.methods.fedavg import *\n"
        f"Path({str(mark)!r}).touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    for name in ("theirs", "theirs.way"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "report"])
def test_code_of_a_run_is_imported_only_where_the_command_line_says_so(
    capsys, run, their_method, command
):
    field(run, "method", "theirs.way")
    before = everything_below(run)
    line = refused(capsys, command, run, *COMMANDS[command])
    assert 'method: "theirs.way" is code that is no part of comigs' in line
    assert line.endswith("--allow-code")
    assert not their_method.exists() and everything_below(run) == before
    comigs(capsys, command, run, *COMMANDS[command], "--allow-code")
    assert their_method.exists()


def test_an_export_and_a_server_ask_for_that_word_too(tmp_path, capsys, run, their_method):
    field(run, "method", "theirs.way")
    export = ("export", run, "--client", "ann", "--out", tmp_path / "out")
    serve = ("serve", run, "--keys", tmp_path / "none.toml")
    chat = ("chat", run, "--client", "ann")
    for words in (export, serve, chat):
        assert refused(capsys, *words).endswith("--allow-code")
    assert not their_method.exists()
    assert "none.toml" in refused(capsys, *serve, "--allow-code")
    comigs(capsys, *export, "--allow-code", "--cache", tmp_path / "mine")
    assert their_method.exists() and list((tmp_path / "mine").iterdir())


def test_a_report_imports_no_code_of_a_run(capsys, run, their_method):
    field(run, "method", "theirs.way")
    change_metrics(run, adopted_share=0.5)  # of which the report has a table
    assert comigs(capsys, "report", run).code == 0 and not their_method.exists()


def test_a_method_of_ones_own_runs_from_ones_own_config(
    tmp_path, capsys, monkeypatch, their_method
):
    monkeypatch.chdir(finished())
    config, out = finished() / "tiny.toml", tmp_path / "own"
    assert comigs(capsys, "run", config, "--method", "theirs.way", "--out", out).code == 0
    assert their_method.exists()


def test_no_code_comes_with_a_base(tmp_path, capsys, run):
    """A base beside the config of a run, whose config.json says that it brings its own classes."""
    from tests.conftest import tiny

    mark, base = tmp_path / "imported", run / "bases" / "b"
    tiny("tiny-gpt2").model.save_pretrained(base)
    tiny("tiny-gpt2").tokenizer.save_pretrained(base)
    (base / "code.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()")
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "code.Theirs", "AutoModelForCausalLM": "code.Theirs"}
    config |= {"auto_map": classes, "model_type": "theirs"}
    (base / "config.json").write_text(json.dumps(config))
    edit(run / "config.toml", 'name = "tiny-gpt2"', 'name = "bases/b"')
    for command, words in COMMANDS.items():
        if command != "report":
            assert 'base.name: "' in refused(capsys, command, run, *words)
    assert not mark.exists()


NASTY = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e<script>alert(1)</script>\ud800 $x^$ \r\nerror: no\x00"


def shows_nothing_but_text(text):
    """No character that a terminal obeys, and none that turns a line around."""
    return not any(c in text for c in "\x00\x07\x1b\x9b\u202e\ud800")


def test_what_commands_print_is_text(tmp_path, capsys, monkeypatch):
    """A prompt, a piece of text, a path and a name of a folder may hold anything."""
    nasty = NASTY.replace("\ud800", "").replace("\x00", "")

    def stream(self, prompt, **settings):
        yield from (nasty, nasty)

    def prepare(config, say):
        say(nasty)
        return prepared(config)

    prepared = api.prepare
    monkeypatch.setattr("comigs.personal.model.PersonalModel.stream", stream)
    monkeypatch.setattr("comigs.app.api.prepare", prepare)
    generate = ("generate", finished() / "run", "--client", "ann", "--prompt", nasty)
    federation = tmp_path / nasty.replace("/", "")
    commands = [generate, ("prepare", finished() / "tiny.toml")]
    commands += [("federation", "init", federation), ("federation", "status", federation)]
    commands += [("federation", "invite", federation, "ann", "--out", tmp_path / "a\x1b[2J")]
    for words in commands:
        done = comigs(capsys, *words)
        assert done.code == 0 and shows_nothing_but_text(done.out + done.err), words
        assert "\N{REPLACEMENT CHARACTER}" in done.out


def test_what_a_run_says_is_shown_as_text_everywhere(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    run = received(finished() / "run", tmp_path / "sent" / "run")
    absent = {"kind": "absent", "round": 2, "client": "ann", "reason": NASTY}
    warned = {"kind": "warning", "round": 2, "client": "ann", "sign": "overfitting"}
    with (run / METRICS).open("a") as file:
        file.write(json.dumps(absent) + "\n" + json.dumps(warned | {"message": NASTY}) + "\n")
    environment = json.loads((run / "env.json").read_text())
    environment["machine"]["processor"] = NASTY
    (run / "env.json").write_text(json.dumps(environment))
    for words in (("report", run), ("compare", tmp_path / "sent")):
        done = comigs(capsys, *words)
        assert done.code == 0 and shows_nothing_but_text(done.out + done.err)
    pages = [run / "report.html", *(tmp_path / "sent" / "compare").glob("*.*")]
    for page in pages:
        if page.suffix in (".html", ".md", ".tex", ".svg"):
            text = page.read_text(encoding="utf-8")
            assert shows_nothing_but_text(text) and "<script>" not in text


def test_a_refusal_is_one_line_whatever_it_quotes(capsys, run):
    (run / METRICS).write_text(json.dumps({"kind": "train", NASTY: 1, "round": NASTY}))
    assert shows_nothing_but_text(refused(capsys, "report", run))
    field(run, "method", "x")
    edit(run / "config.toml", 'method = "x"', 'method = "\\u001b[2J\\u202e\\n"')
    for command in ("resume", "evaluate"):
        assert shows_nothing_but_text(refused(capsys, command, run))


@pytest.mark.parametrize("value", ["=1+1", "+1+1", "-1+1", "@x", "\uff1d1", "\t=1"])
def test_a_cell_of_a_table_is_no_formula(value):
    from comigs.experiments.csv_file import to_csv

    assert to_csv([{"a": value}]).splitlines()[1].strip('"').startswith("'")


def test_two_runs_of_one_config_started_together_both_run(tmp_path, monkeypatch):
    """The second begins when the first has looked for a name and not yet made its folder."""
    monkeypatch.chdir(tmp_path)
    config = load_config(finished() / "tiny.toml")
    others = []

    def say(line) -> None:
        if not others:
            others.append(None)
            others[0] = api.run(config).path

    paths = [api.run(config, say=say).path, *others]
    assert sorted(map(str, paths)) == ["runs/tiny", "runs/tiny-2"]
    first, second = (path / "summary.json" for path in paths)
    assert first.read_bytes() == second.read_bytes()
