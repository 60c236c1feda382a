"""Whatever a person gets wrong is one line that says what, where and what to do; exit code 2;
nothing is changed.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

from comigs.config import VERSION
from comigs.runs.folder import RunFolder
from tests.runs import comigs, copied_run, files, finished, refused, write_config, write_text


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A working config in a folder of its own, in which the test also stands."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run_refused(capsys, config, *words):
    """The line, and a check that no run folder and no file of the user's changed."""
    before = files(config.parent)
    line = refused(capsys, "run", config, *words)
    after = {
        name: content
        for name, content in files(config.parent).items()
        if not name.startswith("cache/")
    }
    assert after == {
        name: content for name, content in before.items() if not name.startswith("cache/")
    }
    return line


# the config file


@pytest.mark.parametrize(
    "old, new, line",
    [
        ("rounds = 2", "rounds = ", "cannot be read as TOML: Invalid value (at line 1, column 10)"),
        (
            "rounds = 2",
            "ruonds = 2",
            'ruonds: unknown key. Did you mean "rounds"? Allowed: version, name, seed',
        ),
        ("rounds = 2", "rounds = 0", "rounds: given 0; must be 1 or more"),
        (
            "rounds = 2",
            f"rounds = 2\nversion = {VERSION + 1}",
            f"version: written for config format {VERSION + 1}, this comigs reads up to {VERSION}",
        ),
        ("rounds = 2", "rounds = 2\nversion = 0", "version: given 0; must be 1 or more"),
        ("rounds = 2", 'name = "../x"', "name: given '../x'; must be a folder's name"),
        (
            "rounds = 2",
            'method = "comgis"',
            'method: unknown method "comgis". Did you mean "comigs"? Known: ',
        ),
        ("rounds = 2", 'method = "no.such"', 'method: "no.such" cannot be used: No module named'),
        ("rounds = 2", 'method = "./my.py"', 'method: unknown method "./my.py". Known: '),
        ("rounds = 2", 'method = ".x"', 'method: unknown method ".x".'),
        ("threads = 1", "threads = 100000", "base.threads: given 100000; must be 1024 or less"),
        (
            '"tiny-gpt2"',
            '"tiny-gtp2"',
            'base.name: unknown base "tiny-gtp2". Did you mean "tiny-gpt2"? Known: ',
        ),
        ('"cpu"', '"gpu"', 'base.device: "gpu" is no device; allowed: auto, cpu, cuda'),
        ('"cpu"', '"cuda:97"', 'base.device: "cuda:97" is not on this machine'),
        ('"cpu"', '"meta"', 'base.device: "meta"'),
        ('"cpu"', '"mps"', 'base.device: "mps"'),
        (
            '"float32"',
            '"float23"',
            "must be 'auto', 'float64', 'float32' or 'bfloat16'. Did you mean \"float32\"?",
        ),
        (
            "sequence_length = 32",
            "sequence_length = 65",
            "data.sequence_length: given 65, but base tiny-gpt2 reads",
        ),
        (
            "steps = 2",
            "stepz = 2",
            'client.stepz: unknown key. Did you mean "steps"? Allowed: steps, batch_size',
        ),
        ("steps = 2", 'steps = "two"', "client.steps: given 'two'; must be a whole number"),
        ("steps = 2", "lr = nan", "client.lr: given nan; must be a finite number"),
        ("[data]", "[experts]\nrank = 0\n[data]", "experts.rank: given 0; must be 1 or more"),
        ("[data]", "[experts]\nrank = -3\n[data]", "experts.rank: given -3; must be 1 or more"),
        (
            "[data]",
            "[experts]\ntop_k = 3\n[data]",
            'experts.top_k: 3 experts per token, but client "ann" has 2',
        ),
        (
            "[data]",
            "[experts]\ngeneralists = 0\nspecialists = 0\n[data]",
            "clients.ann: 0 experts; give it at least",
        ),
        ("[data]", "[expert]\nrank = 2\n[data]", 'expert: unknown key. Did you mean "experts"?'),
        ('name = "bob"', 'name = "ann"', 'clients: the name "ann" is given twice'),
        (
            'name = "bob"',
            'name = "ANN"',
            'clients: the name "ANN" is given twice; names must differ (case aside)',
        ),
        ('name = "bob"', 'name = "b/b"', "clients.b/b.name: given 'b/b'; 1 to 64 letters"),
        (
            'text = "bob"',
            'text = "bob"\nrnak = 2',
            'clients.bob.rnak: unknown key. Did you mean "rank"?',
        ),
        (
            'text = "bob"',
            "text = 3",
            'clients.bob.text: given 3; must be "source:argument" or a path',
        ),
        ('text = "bob"', 'text = {train = "bob", valid = "bob"}', "clients.bob.text.test: missing"),
        ('text = "bob"', 'text = "bob"\ngeneralists = 2', "clients.bob.generalists: unknown key"),
        ('text = "bob"', 'text = "nobody"', "nobody: no such file or folder"),
        (
            'text = "bob"',
            'text = "~nobody-here/x"',
            "~nobody-here/x: no such user; give the whole path",
        ),
        (
            'text = "bob"',
            'text = "debian-fax:fr"',
            'no source "debian-fax"; there are: chatterbot, csv, debian-faq',
        ),
        (
            'text = "bob"',
            'text = "debian-faq:en"',
            "debian-faq:en: no such language; there are: de, fr, it, nl",
        ),
        ('text = "bob"', 'text = "ann"', "the same text is in client"),
        ("[[clients]]", "[clients]", "cannot be read as TOML"),
    ],
)
def test_a_wrong_config(config, capsys, old, new, line):
    edit(config, old, new)
    assert line in run_refused(capsys, config)
    assert not Path("runs").exists()


def test_every_message_names_the_file_or_the_field(config, capsys):
    edit(config, "steps = 2", "stepz = 2")
    assert run_refused(capsys, config).startswith(f"error: {config}: client.stepz: ")


@pytest.mark.parametrize(
    "write, line",
    [
        (lambda p: p.unlink(), "no such config file"),
        (
            lambda p: (p.unlink(), p.mkdir()),
            "cannot be read: Is a directory; a config is a TOML file",
        ),
        (
            lambda p: p.write_bytes(b"name = '\xff'"),
            "cannot be read as TOML: 'utf-8' codec can't decode",
        ),
        (lambda p: p.write_text(""), "clients: write [[clients]] (two brackets)"),
        (
            lambda p: p.write_text('[clients]\nname = "a"\ntext = "a"'),
            "clients: write [[clients]] (two brackets)",
        ),
        (lambda p: p.write_text("clients = []"), "clients: none; write at least one [[clients]]"),
        (
            lambda p: p.write_text('base = "mini"\n[[clients]]\nname = "a"\ntext = "a"'),
            "must be a section: [base]",
        ),
    ],
)
def test_a_config_that_is_none(config, capsys, write, line):
    write(config)
    assert line in refused(capsys, "run", config)


@pytest.mark.parametrize(
    "override, line",
    [
        ("client.steps", "--set client.steps: expected KEY=VALUE, for example client.steps=20"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("client.stepz=3", 'client.stepz: unknown key. Did you mean "steps"?'),
        ("clint.steps=3", 'clint: unknown key. Did you mean "client"?'),
        (
            "options.adopt=[1]",
            "options.adopt: given [1]; must be true or false, a number, or text in quotes",
        ),
        ("client.steps=", "client.steps: given ''; must be a whole number"),
        ("rounds.x=3", "--set rounds.x=3: rounds is a value, not a section"),
        (
            "clients.bop.rank=2",
            '--set clients.bop.rank=2: no client "bop"; there are: ann, bob. Did you mean "bob"?',
        ),
        (
            "clients.bob=2",
            "--set clients.bob=2: say which field of the client, for example clients.bob.rank=4",
        ),
        ("clients.bob.rank=0", "clients.bob.rank: given 0; must be 1 or more"),
        ("data=3", "data: given 3; must be a section: [data]"),
    ],
)
def test_a_wrong_override(config, capsys, override, line):
    assert line in run_refused(capsys, config, "--set", override)


# the text


def test_text_that_is_missing_empty_or_not_utf8(config, capsys, tmp_path):
    write_text(tmp_path, "eve")
    edit(config, 'text = "bob"', 'text = "eve"')
    for path in (tmp_path / "eve").iterdir():
        path.write_text("  \n")
    assert 'client "bob": text = "eve": 0 different documents' in run_refused(capsys, config)
    (tmp_path / "eve" / "0.txt").write_bytes(b"caf\xe9 au lait")
    line = run_refused(capsys, config)
    assert "eve/0.txt: not UTF-8 at byte 3 (0xe9); save the file as UTF-8" in line
    for path in (tmp_path / "eve").iterdir():
        path.unlink()
    assert "no .txt or .md file in this folder" in run_refused(capsys, config)


def test_text_shorter_than_a_window(config, capsys, tmp_path):
    for number in range(3):
        (tmp_path / "bob" / f"{number}.txt").write_text(f"{number} short")
    for number in (3, 4):
        (tmp_path / "bob" / f"{number}.txt").unlink()
    line = run_refused(capsys, config)
    assert 'client "bob": train has 9 tokens, but needs 33 (data.sequence_length + 1)' in line


def test_too_few_documents(config, capsys, tmp_path):
    for number in (2, 3, 4):
        (tmp_path / "bob" / f"{number}.txt").unlink()
    assert "2 different documents, but splits by hash need 3 or more" in run_refused(capsys, config)


def test_a_split_that_is_missing(config, capsys, tmp_path):
    edit(config, 'text = "bob"', 'text = {train = "bob", valid = "bob.valid", test = "bob.test"}')
    assert "bob.valid: no such file or folder" in run_refused(capsys, config)


def test_the_same_document_in_two_splits(config, capsys, tmp_path):
    edit(config, 'text = "bob"', 'text = {train = "bob", valid = "bob/0.txt", test = "bob/1.txt"}')
    assert "a document may be in one split of one client: remove one" in run_refused(capsys, config)


# the loss


def test_a_loss_that_is_not_finite_stops_with_the_batch_named_and_the_state_kept(config, capsys):
    line = refused(capsys, "run", config, "--set", "client.lr=1e30")
    assert (
        "client ann: the loss is nan in round 1, train batch 1; this batch was not learnt from"
        in line
    )
    assert (
        "the state after round 0 is kept. Start a new run with client.lr lower than 1e+30" in line
    )
    assert RunFolder.open(Path("runs/tiny")).rewind().round == 0
    assert comigs(capsys, "resume", "runs/tiny").code == 2


def test_a_loss_that_goes_wrong_later_keeps_the_last_good_round(config, capsys):
    from comigs.client.client import Client

    draw = Client._next_batch

    def drift_off(client, level, number):
        if client.name == "bob" and level == "experts" and number == 3:
            client.train_state.tensors[next(iter(client.train_state.tensors))].fill_(float("inf"))
        return draw(client, level, number)

    with patch.object(Client, "_next_batch", drift_off):
        line = refused(capsys, "run", config)
    assert (
        "client bob: " in line
        and "in round 2, train batch 3" in line
        and "the state after round 1 is kept" in line
    )
    folder = RunFolder.open(Path("runs/tiny"))
    assert folder.rewind().round == 1
    assert all(t.isfinite().all() for t in folder.load("clients/bob/round-0001.experts").values())
    assert comigs(capsys, "resume", "runs/tiny").code == 0  # whatever it was is gone


# the run folder


def test_an_existing_folder_is_refused_before_anything_is_loaded(config, capsys):
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("mine")
    with patch("comigs.app.setup.load_base", side_effect=AssertionError("loaded")):
        line = run_refused(capsys, config, "--out", "mine")
    assert line == (
        "error: mine: exists already; nothing was changed. Go on with: comigs resume mine, "
        "or choose another folder with --out"
    )
    assert "exists already" in run_refused(capsys, config, "--out", config)
    assert "is a file, not a folder" in run_refused(
        capsys, config, "--out", "mine/precious.txt/run"
    )
    assert "exists already" in run_refused(capsys, config, "--out", ".")


def test_a_run_that_is_none(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, what in {
        "empty": "not a run folder (it has no config.toml",
        "nothing": "no such run folder",
    }.items():
        run = tmp_path / name
        assert f"{run}: {what}" in refused(capsys, "resume", run)
        assert f"{run}: {what}" in refused(capsys, "evaluate", run)
        assert f"{run}: {what}" in refused(
            capsys, "generate", run, "--client", "ann", "--prompt", "x"
        )
        assert str(run) in refused(capsys, "report", run)


def test_a_run_that_somebody_works_on(tmp_path, capsys):
    run = copied_run(tmp_path)
    with RunFolder.open(run):
        assert "another process is working on this run; wait for it or stop it" in refused(
            capsys, "resume", run
        )
    assert comigs(capsys, "resume", run).code == 0


@pytest.fixture
def half_run(config, capsys):
    """A run of the config that stopped after its first round."""
    from comigs.client.client import Client

    train = Client.train

    def stop(client, round, *rest):
        if round == 2:
            raise KeyboardInterrupt
        return train(client, round, *rest)

    with patch.object(Client, "train", stop):
        assert comigs(capsys, "run", config).code == 130
    return Path("runs/tiny")


def test_changed_text_is_refused(half_run, capsys):
    Path("bob/9.txt").write_text("one more document than before")
    line = (
        "runs/tiny: the text of bob has changed since this run began; put it back or "
        "start a new run"
    )
    assert line in refused(capsys, "resume", half_run)
    assert line in refused(capsys, "evaluate", half_run)
    Path("bob/9.txt").unlink()
    assert comigs(capsys, "resume", half_run).code == 0


def test_a_changed_base_is_refused(half_run, capsys):
    edit(half_run / "config.toml", '"tiny-gpt2"', '"tiny-llama"')
    line = refused(capsys, "resume", half_run)
    assert 'base "tiny-llama" is not the one this run began with (its weights differ)' in line
    assert "not the one" in refused(
        capsys, "generate", half_run, "--client", "ann", "--prompt", "x"
    )


def test_a_changed_config_is_refused(half_run, capsys):
    edit(half_run / "config.toml", "rank = 8", "rank = 4")
    assert "the checkpoint belongs to another config or base" in refused(capsys, "resume", half_run)


@pytest.mark.parametrize("name", ["experts", "optimizer", "state"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "gone"])
def test_a_damaged_checkpoint_is_named(half_run, capsys, name, harm):
    file = next(half_run.rglob(f"round-0001.{name}.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 16
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(raw if harm == "flipped" else raw[:100])
    before = files(half_run)
    line = refused(capsys, "resume", half_run)
    assert str(file) in line and line.endswith("restore it from a copy or start a new run")
    assert files(half_run) == before


@pytest.mark.parametrize("name", ["checkpoint.json", "env.json", "config.toml", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_text_file_of_a_run_is_named(half_run, capsys, name, content):
    (half_run / name).write_bytes(content)
    assert name in refused(capsys, "resume", half_run)


def test_a_damaged_personal_model_is_named(tmp_path, capsys):
    run = copied_run(tmp_path)
    file = run / "clients" / "ann" / "personal.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    line = refused(capsys, "generate", run, "--client", "ann", "--prompt", "x")
    assert f"{file}: damaged" in line


# the disk


def refuse_to_write(monkeypatch, folder, number):
    """From now on, writing below `folder` fails as the operating system would say it."""
    real = {"open": io.open, "replace": os.replace, "mkdir": os.mkdir}

    def check(path):
        if str(os.path.abspath(os.fspath(path))).startswith(str(folder)):
            raise OSError(number, os.strerror(number), str(path))

    def opened(file, mode="r", *args, **kwargs):
        if not isinstance(file, int) and set(mode) & set("wax+"):
            check(file)
        return real["open"](file, mode, *args, **kwargs)

    def made(path, *args, **kwargs):
        check(path)
        return real["mkdir"](path, *args, **kwargs)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "mkdir", made)


@pytest.mark.parametrize(
    "number, line",
    [
        (
            errno.ENOSPC,
            "no space left on the disk; make room or allow writing, then go on with: comigs "
            "resume runs/tiny",
        ),
        (
            errno.EACCES,
            "no permission to write here; make room or allow writing, then go on with: "
            "comigs resume",
        ),
        (errno.EROFS, "no permission to write here"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_a_disk_that_refuses_in_the_middle(half_run, capsys, monkeypatch, number, line):
    before = {name: content for name, content in files(half_run).items() if name != ".lock"}
    with monkeypatch.context() as patched:
        refuse_to_write(patched, half_run.absolute(), number)
        assert line in refused(capsys, "resume", half_run)
    assert {name: content for name, content in files(half_run).items() if name != ".lock"} == before
    assert comigs(capsys, "resume", half_run).code == 0


@pytest.mark.parametrize(
    "where, advice", [("runs", "choose another folder with --out"), ("cache", "data.cache")]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_at_the_start(config, capsys, monkeypatch, where, advice, number):
    folder = config.parent / where
    refuse_to_write(monkeypatch, folder, number)
    line = refused(capsys, "run", config)
    assert where in line and advice in line
    assert ("no space left" if number == errno.ENOSPC else "no permission") in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(config, capsys):
    Path("closed").mkdir(mode=0o500)
    assert "no permission to write here; choose another folder with --out" in run_refused(
        capsys, config, "--out", "closed/run"
    )


def test_text_without_permission_to_read(config, capsys, monkeypatch):
    real = Path.read_bytes

    def read_bytes(path):
        if path.parent.name == "bob":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert "bob/0.txt: no permission to read it" in refused(capsys, "run", config)


def test_any_file_the_system_refuses_is_one_line(config, capsys):
    with patch(
        "comigs.app.api.run",
        side_effect=PermissionError(errno.EACCES, "Permission denied", "/some/file"),
    ):
        assert refused(capsys, "run", config) == "error: /some/file: Permission denied"


def test_a_disk_that_is_really_full(config, capsys, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("no permission to mount")
    try:
        line = refused(capsys, "run", config, "--out", small / "run")
        assert "no space left on the disk" in line
        assert refused(capsys, "resume", small / "run") == line.replace("choose another folder", "")
        subprocess.run(["mount", "-o", "remount,size=2M", small], check=True)
        assert comigs(capsys, "resume", small / "run").code == 0
        assert json.loads((small / "run" / "summary.json").read_text())["rounds"] == 2
    finally:
        subprocess.run(["umount", small], check=True)


# the other commands


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ["evaluate", "--split", "tset"],
            'split: given "tset"; must be train, valid or test. Did you mean "test"?',
        ),
        (
            ["evaluate", "--client", "anne"],
            'no client "anne" in this run; there are: ann, bob. Did you mean "ann"?',
        ),
        (
            ["generate", "--client", "eve", "--prompt", "x"],
            'no client "eve" in this run; there are: ann, bob',
        ),
        (
            ["generate", "--client", "ann"],
            "Missing option '--prompt'. (try: comigs generate --help)",
        ),
        (["generate", "--prompt", "x"], "Missing option '--client'"),
        (
            ["generate", "--client", "ann", "--prompt", "x", "--temperature", "-1"],
            "-1.0 is not in the range x>=0.0",
        ),
        (
            ["generate", "--client", "ann", "--prompt", "x", "--temperature", "nan"],
            "--temperature: given nan",
        ),
        (
            ["generate", "--client", "ann", "--prompt", "x", "--temperature", "inf"],
            "--temperature: given inf",
        ),
        (
            ["generate", "--client", "ann", "--prompt", "x", "--max-new-tokens", "0"],
            "0 is not in the range x>=1",
        ),
        (
            ["generate", "--client", "ann", "--prompt", "x", "--seed", "-1"],
            "--seed: given -1; must be",
        ),
        (["generate", "--client", "ann", "--prompt", "\udcff"], "--prompt: not valid UTF-8"),
        (
            ["generate", "--client", "ann", "--prompt", "x" * 64],
            "--prompt: longer than the 64 tokens this base reads",
        ),
    ],
)
def test_wrong_words_for_a_run(capsys, words, line):
    command, *rest = words
    assert line in refused(capsys, command, finished() / "run", *rest)


@pytest.mark.parametrize(
    "words, line",
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? (try: comigs --help)"),
        (["run"], "Missing argument 'CONFIG'. (try: comigs run --help)"),
        (["run", "x.toml", "--sed", "3"], "No such option '--sed'"),
        (["run", "x.toml", "--seed", "x"], "'x' is not a valid"),
        (
            ["federation", "client", "b", "--text", "t", "--max-epsilon", "nan"],
            "--max-epsilon: given nan; must be a finite number",
        ),
        (
            ["federation", "client", "b", "--text", "t", "--max-memory", "inf"],
            "--max-memory: given inf; must be a finite number",
        ),
        (["report"], "Missing argument 'RUN...'. (try: comigs report --help)"),
    ],
)
def test_wrong_words(capsys, words, line):
    assert line in refused(capsys, *words)


def test_what_only_devices_of_a_federation_can_do(config, tmp_path, capsys):
    words = ("--engine", "flower", "--federation", "fed", "--dry-run")
    assert "--dry-run: the text is on the federation's devices" in refused(
        capsys, "run", config, *words
    )
    run = copied_run(tmp_path)
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(
        json.dumps(environment | {"federation": {"folder": "fed", "id": "1"}})
    )
    assert "whose text and models are on its devices" in refused(capsys, "evaluate", run)


def test_a_run_without_a_round_has_no_model(config, capsys):
    refused(capsys, "run", config, "--set", "client.lr=1e30")
    for command in (
        ["evaluate", "runs/tiny"],
        ["generate", "runs/tiny", "--client", "ann", "--prompt", "x"],
    ):
        assert "no round is finished yet; go on with: comigs resume runs/tiny" in refused(
            capsys, *command
        )


def test_paths_in_advice_can_be_pasted(config, capsys):
    Path("my runs").mkdir()
    assert "comigs resume 'my runs'" in refused(capsys, "run", config, "--out", "my runs")
