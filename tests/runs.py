"""What the tests of the command line share: a small config over made-up text, one finished run,
`comigs` in-process.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch

from comigs import load_config
from comigs.app import api, cli

TINY = """\
rounds = {rounds}
[base]
name = "tiny-gpt2"
dtype = "float32"
device = "cpu"
threads = 1
[data]
cache = "cache"
sequence_length = 32
[client]
steps = 2
batch_size = 2
router_every = 3
router_steps = 1
[evaluation]
batch_size = 8
[[clients]]
name = "ann"
text = "ann"
[[clients]]
name = "bob"
text = "bob"
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}


class Done(NamedTuple):
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


def write_text(folder: Path, name: str, documents: int = 5) -> None:
    """Documents of made-up words that no other client has."""
    words, where = random.Random(name), folder / name
    where.mkdir(parents=True)
    for number in range(documents):
        text = " ".join(
            words.choice(["the", "cat", "sat", name, "on", "mats", "dogs"]) for _ in range(25)
        )
        (where / f"{number}.txt").write_text(f"{number} {text}\n", encoding="utf-8")


def write_config(folder: Path, rounds: int = 2) -> Path:
    """A config of two clients and their text: about half a second to run."""
    for name in ("ann", "bob"):
        write_text(folder, name)
    path = folder / "tiny.toml"
    path.write_text(TINY.format(rounds=rounds), encoding="utf-8")
    return path


@functools.cache
def finished() -> Path:
    """A folder with tiny.toml, its text and the finished run `run`, made once. Copy it before
    changing it.
    """
    folder = Path(tempfile.mkdtemp(prefix="comigs-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = load_config(write_config(folder), [f'data.cache="{folder / "cache"}"'])
    api.run(config, folder / "run")
    return folder


def copied_run(folder: Path) -> Path:
    """The finished run, copied to where it may be harmed."""
    return Path(shutil.copytree(finished() / "run", folder / "run"))


def comigs(capsys, *words: object) -> Done:
    """`comigs WORDS...` in this process."""
    capsys.readouterr()
    before = signal.getsignal(signal.SIGTERM)
    with patch.object(sys, "argv", ["comigs", *map(str, words)]):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    torch.set_num_threads(1)
    return Done(int(code or 0), printed.out, printed.err)


def refused(capsys, *words: object) -> str:
    """The one line a wrong command gives: exit code 2, nothing else."""
    done = comigs(capsys, *words)
    assert done.code == 2, done
    assert (
        done.err.startswith("error: ") and done.err.count("\n") == 1 and done.err.endswith("\n")
    ), done.err
    return done.err.strip()


def start(*words: object, **settings) -> subprocess.Popen[str]:
    """`comigs WORDS...` as a process of its own."""
    command = [sys.executable, "-c", "from comigs.app.cli import main; main()", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        **settings,
    )


def outcome(run: Path) -> dict[str, bytes]:
    """Everything of a run that must be the same whenever it is run."""
    names = [
        "metrics.jsonl",
        "summary.json",
        *(str(p.relative_to(run)) for p in sorted(run.rglob("*.safetensors"))),
    ]
    return {name: (run / name).read_bytes() for name in names}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
