"""What a device's trainer touches, as Python itself sees it: its own folder, its owner's text and
base, and what is installed; never a place or a machine that a request names.
"""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from comigs import csrc
from comigs.federation.bundle import Bundle
from comigs.federation.device import trainer_socket
from comigs.federation.messages import REQUESTS, Answered, Refusal, config_for
from comigs.server import wire
from tests.device import Setting, lying, opened
from tests.runs import ENVIRONMENT

TRAINER = """
import json, os, sys
log = open(sys.argv.pop(1), "w", buffering=1)
WATCHED = ("open", "os.", "shutil.", "subprocess.", "socket.", "ctypes.dlopen", "import")

def plain(argument):
    return argument if isinstance(argument, int | str) else os.fsdecode(argument) if isinstance(
        argument, bytes | os.PathLike) else repr(argument)

def audit(event, arguments):
    if event.startswith(WATCHED):
        log.write(json.dumps([event, [plain(argument) for argument in arguments]]) + "\\n")

sys.addaudithook(audit)
from comigs.federation.device.trainer_main import main
main()
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # audit events of what changes a file system -> how many of the arguments are paths
    "os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1,
    "os.link": 2, "os.symlink": 2, "os.chown": 1, "shutil.rmtree": 1, "shutil.move": 2,
    "shutil.copyfile": 2, "os.utime": 1,
}  # fmt: skip
LOOKS = {"open": 1, "os.listdir": 1, "os.scandir": 1}
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


class Watched:
    """A trainer in a process of its own, as `comigs federation client` starts it."""

    def __init__(self, root, setting):
        self.root, self.setting, self.log = root, setting, root / "log.jsonl"
        self.socket, device = root / "s" / "t", setting.device
        own = {"name": "ada", "home": str(device.home), "root": str(root / "owner"), "text": "ada"}
        own |= {"accelerator": "cpu", "threads": 1, "base": None}
        own |= {"pinned": None, "limits": {"memory": None, "minutes": 120}}
        (device.home / "device.json").write_text(json.dumps(own), encoding="utf-8")
        environment = {
            **ENVIRONMENT,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root / "lures")]),
        }
        words = [str(self.log), str(self.socket), "device.json"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *words],
            cwd=device.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until = time.monotonic() + 120
        while not self.socket.exists():
            assert self.process.poll() is None and time.monotonic() < until, self.end()
            time.sleep(0.05)

    def ask(self, raw):
        """The answer, and what was touched meanwhile."""
        begin = self.log.stat().st_size
        head, _ = opened(trainer_socket.ask(self.socket, raw))
        with self.log.open(encoding="utf-8") as log:
            log.seek(begin)
            return head, [json.loads(line) for line in log]

    def end(self):
        self.process.kill()
        return self.process.communicate()[0]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A trainer, the owner's text in a folder of its own, and decoys that nobody should touch."""
    root = tmp_path_factory.mktemp("reach")
    setting = Setting(root / "owner", home=root / "home")
    for name in ("base", "text", "cache"):
        (root / "decoy" / name).mkdir(parents=True)
        (root / "decoy" / name / "config.json").write_text("{}", encoding="utf-8")
    # Python itself looks into this folder whenever it imports anything.
    (root / "lures").mkdir()
    for name in ("lure.py", "lures.py"):
        lure = f"open({str(root / 'decoy' / 'ran')!r}, 'w')"
        (root / "lures" / name).write_text(lure, encoding="utf-8")
    csrc.attempt()  # what experts are compiled to is there before the first run
    made = Watched(root, setting)
    yield made
    made.end()


def below(path, folders):
    """Whether a path lies in one of these folders. What is opened by its bare name is opened from a
    folder that is open (comigs.files.ClosedFolder).
    """
    if not os.path.isabs(path):
        return "/" not in path and path != ".."
    return any(Path(os.path.normpath(path)).is_relative_to(folder) for folder in folders)


def touched(events, kinds):
    """The paths of these events."""
    for event, arguments in events:
        for path in arguments[: kinds.get(event, 0)]:
            if isinstance(path, str):  # a number is a file that is open already
                yield event, path


def written(events):
    yield from touched(events, CHANGES)
    for event, arguments in events:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & WRITING:
            yield event, arguments[0]


def require_own(watched, events):
    """All that was touched is the device's, the owner's, or installed."""
    home, owner = watched.setting.device.home, watched.root / "owner"
    scratch = watched.socket.parent
    lures = watched.root / "lures"
    cache = Path(os.environ.get("COMIGS_CACHE", Path.home() / ".cache" / "comigs"))
    installed = [Path(p) for p in (*site.getsitepackages(), *sysconfig.get_paths().values())]
    package = Path(sys.modules["comigs"].__file__).parent
    system = [Path(p) for p in ("/proc", "/sys", "/usr", "/lib", "/etc", "/dev", sys.base_prefix)]
    for event, path in written(events):
        assert below(path, [home, scratch, Path("/dev/null")]), (event, path)
    for event, path in touched(events, LOOKS):
        allowed = [home, owner, scratch, lures, cache, package.parent, *installed, *system]
        assert below(path, allowed), (event, path)
    assert not [event for event in events if event[0] in NETWORK]
    assert str(watched.root / "decoy") not in json.dumps(events)
    assert not (watched.root / "decoy" / "ran").exists()


def test_an_honest_run_stays_in_the_devices_folder(watched):
    """From its first request to its last; nothing is started but what says which source and which
    machine this is.
    """
    for round in (1, 2, 3):
        head, events = watched.ask(watched.setting.request(round))
        assert isinstance(head, Answered)
        require_own(watched, events)
        started = [event[1][0] for event in events if event[0] == "subprocess.Popen"]
        assert set(started) <= {"git", "uname", "/usr/sbin/sysctl"}
        assert any(event == "os.rename" for event, _ in written(events))


HOSTILE = {
    "a run elsewhere": {"run": "../../decoy/run"},
    "a run that is a path": {"run": "/tmp/decoy-run"},
    "code as a method": {"config": {"method": "lure"}},
    "a module as a method": {"config": {"method": "lures.lure"}},
    "a folder as a base": {"config": {"base": {"name": "DECOY/base"}}},
    "a link of the hub as a base": {"config": {"base": {"name": "org/model"}}},
    "text of the server's": {"config": {"clients": [{"name": "ada", "text": "DECOY/text"}]}},
    "a source": {"config": {"clients": [{"name": "ada", "text": "hub:org/data"}]}},
    "a root": {"config": {"data": {"root": "DECOY"}}},
    "a cache": {"config": {"data": {"cache": "DECOY/cache"}}},
    "a client elsewhere": {"config": {"clients": [{"name": "../../decoy"}]}},
    "a name with a path": {"config": {"name": "../DECOY"}},
    "an option with a path": {"config": {"options": {"adopt": "DECOY"}}},
    "a device": {"config": {"base": {"device": "DECOY"}}},
    "a split with a path": {"evaluate": ("DECOY",)},
    "a base's fingerprint": {"base": "DECOY"},
    "another release": {"comigs": "DECOY"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_request_is_refused_and_reaches_nothing(watched, what):
    decoy = str(watched.root / "decoy")
    changes = json.loads(json.dumps(HOSTILE[what]).replace("DECOY", decoy))
    config = config_for(watched.setting.config, "ada")
    for section, value in changes.pop("config", {}).items():
        both = isinstance(value, dict) and isinstance(config.get(section), dict)
        config[section] = config[section] | value if both else value

    raw = lying(watched.setting.request(1), **({"config": config} | changes))
    before = sorted(watched.setting.device.home.rglob("*"))
    answer, events = watched.ask(raw)
    assert isinstance(answer, Refusal) and answer.code in (
        "unreadable",
        "refused",
        "base",
        "version",
    )
    require_own(watched, events)
    assert not list(written(events))
    assert not [event for event in events if event[0].startswith("subprocess.")]
    assert sorted(watched.setting.device.home.rglob("*")) == before


def test_a_tensor_that_is_no_slot_names_no_file(watched):
    import torch

    head, _ = wire.unpack(watched.setting.request(run="run-of-a-liar"), REQUESTS, 1 << 24)
    raw = wire.pack(head, {"../../decoy/x": torch.ones(2)})
    answer, events = watched.ask(raw)
    assert answer.code == "unreadable"
    require_own(watched, events)


def test_the_hook_sees(watched, tmp_path):
    """What this page says is worth as much as what the hook would have seen."""
    seen = tmp_path / "seen.jsonl"
    probe = TRAINER.partition("from comigs")[0] + (
        f"open({str(tmp_path / 'x')!r}, 'w').close(); os.rename({str(tmp_path / 'x')!r}, "
        f"{str(tmp_path / 'y')!r})\nimport socket\n"
        "try: socket.create_connection(('127.0.0.1', 1), 1)\nexcept OSError: pass\n"
    )
    subprocess.run([sys.executable, "-c", probe, str(seen)], check=True, env=ENVIRONMENT)
    events = [json.loads(line) for line in seen.read_text(encoding="utf-8").splitlines()]
    assert {event for event, _ in written(events)} == {"open", "os.rename"}
    assert any(event in NETWORK for event, _ in events)
    with pytest.raises(AssertionError):
        require_own(watched, events)
    assert Bundle.model_fields["base"].default is None  # such a device has no pin to be saved by
