"""A device: it does what it is asked once, says it as often as it is asked, and tells the server a
code and no more.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from comigs.app import api
from comigs.bases.load import load_base
from comigs.client.client import Client
from comigs.client.workplace import Workplace, attach
from comigs.data.prepare import prepare_client
from comigs.engines.client_task import run_task
from comigs.errors import UserError
from comigs.federation.device import trainer_socket
from comigs.federation.messages import (
    Answered,
    Probed,
    Request,
    config_for,
    our_version,
)
from comigs.methods.loading import load_method
from comigs.runs.folder import RunFolder
from comigs.server import wire
from comigs.server.protocol import Task
from comigs.slots import Slot
from tests.conftest import run_config, same
from tests.device import RUN, Setting, opened
from tests.kills import begin, killed_at
from tests.local_grid import modes
from tests.runs import refused


def uploaded(tensors):
    return {Slot.parse(name): tensor for name, tensor in tensors.items()}


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


def test_it_answers_as_a_client_in_process_would(setting, tmp_path):
    head, tensors = setting.ask()
    config, base = setting.config, load_base(setting.config.base)
    method = load_method(config)
    with attach(config, method, base) as attachment:
        data = prepare_client(config, "ada", base.encoder)
        _, reply = run_task(
            Client("ada", Workplace(config, method, base, attachment), data),
            Task(1, True, (), ("valid", "test")),
            {},
            lambda event: None,
        )
    assert isinstance(head, Answered) and head.trained
    here = [line.as_json() for line in reply.metrics]
    assert head.metrics == here and [list(line) for line in head.metrics] == [
        list(line) for line in here
    ]
    assert same(uploaded(tensors), reply.upload)
    assert {slot.role for slot in uploaded(tensors)} == {"generalist", "attention"}


def test_asked_again_it_says_the_same_and_trains_nothing_twice(setting):
    steps = []
    setting.report = steps.append
    setting.trainer = setting.restarted()
    first = setting.trainer.answer(setting.request(1))
    count = len(steps)
    assert count and setting.trainer.answer(setting.request(1)) == first
    setting.trainer = setting.restarted()
    assert setting.trainer.answer(setting.request(1)) == first
    assert len(steps) == count
    (folder,) = (setting.device.home / "runs").iterdir()
    assert RunFolder.open(folder).checkpoint().round == 1


def test_an_answer_that_the_server_never_got_is_given_before_anything_new(tmp_path):
    setting = Setting(tmp_path, rounds=5)
    setting.ask(1)
    second = setting.trainer.answer(setting.request(2))
    assert setting.trainer.answer(setting.request(4, after=1, since=1)) == second
    head, _ = setting.ask(4, after=2, since=1)
    assert head.round == 4


def test_the_last_answer_can_be_repeated_too(setting):
    setting.finish()
    last = setting.trainer.answer(setting.request(3))
    assert opened(last)[0].round == 3 and not opened(last)[0].trained
    setting.trainer = setting.restarted()
    assert setting.trainer.answer(setting.request(3, after=2)) == last
    assert setting.refused(2) == "over"


def test_what_was_there_already_is_not_added_again(tmp_path):
    """Updates of a missed round come with those that were delivered but whose answer came too late
    to count.
    """
    draw = torch.Generator().manual_seed(1)
    settings = [Setting(tmp_path, home, method="flora", rounds=3) for home in ("once", "twice")]
    heads = [setting.ask(1) for setting in settings]
    sizes = {slot: t.shape for slot, t in uploaded(heads[0][1]).items()}

    def update(rank):
        shapes = {s: (rank, d[1]) if s.matrix == "A" else (d[0], rank) for s, d in sizes.items()}
        return {
            replace(s, part="update"): torch.randn(d, generator=draw) for s, d in shapes.items()
        }

    one, two, three = update(2), update(3), update(1)
    both = {s: torch.cat([one[s], two[s]], 0 if s.matrix == "A" else 1) for s in one}
    once, twice = settings
    once.ask(2, one)
    once.ask(3, two)
    twice.ask(2, one)
    twice.ask(3, both, after=2, since=1)
    for part in ("experts", "optimizer"):
        assert same(*(RunFolder(s.folder).load(f"clients/ada/{part}") for s in settings))
    once.ask(4, three)
    twice.ask(4, three)
    assert same(*(RunFolder(s.folder).load("clients/ada/personal") for s in settings))


def test_rounds_it_was_not_asked_in_are_left_out(tmp_path):
    setting = Setting(tmp_path, rounds=5)
    setting.ask(2, after=0, since=0)
    head, _ = setting.ask(5, after=2, since=2)
    assert head.round == 5
    assert [line.round for line in RunFolder(setting.folder).metrics() if line.kind == "train"] == [
        2,
        5,
    ]


def test_the_run_on_the_device_is_an_ordinary_one(setting, tmp_path, capsys):
    head = setting.finish()
    folder = RunFolder.open(setting.folder)
    summary = folder.summary().as_json()
    test = summary["clients"]["ada"]["test"]["nats_per_token"]
    assert [line["nats_per_token"] for line in head.metrics if line["kind"] == "kept"] == [test]
    measured = api.evaluate(setting.folder, client="ada")["ada"]
    assert measured["personal"]["nats_per_token"] == pytest.approx(test, rel=1e-6)
    assert (
        api.open_personal_model(setting.folder, "ada")
        .generate("engine", max_new_tokens=3)
        .startswith("engine")
    )
    from comigs.runs.report.page import write_report

    assert write_report(setting.folder).exists()
    assert "goes on when its server asks" in refused(capsys, "resume", setting.folder)
    assert (
        not list(setting.folder.glob("clients/*/round-*"))
        and len(list(setting.folder.glob(".answer*"))) == 1
    )


def test_states_of_a_run_that_goes_on_are_ordinary_too(setting):
    setting.ask(1)
    assert api.evaluate(setting.folder, client="ada")["ada"]["personal"]["tokens"]


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_what_rounding_left_over_stays_on_the_device(tmp_path, format):
    setting = Setting(tmp_path, upload={"format": format}, rounds=3)
    _, first = setting.ask(1)
    assert {t.dtype for t in first.values()} == {torch.bfloat16}
    held = RunFolder(setting.folder).holds("clients/ada/residual")
    assert not held
    download = {slot: tensor.float() for slot, tensor in uploaded(first).items()}
    _, second = setting.ask(2, download)
    if format == "int8":
        scales = {n.removesuffix("/scale"): t for n, t in second.items() if n.endswith("/scale")}
        left = RunFolder(setting.folder).load("clients/ada/residual")
        assert left.keys() == scales.keys() == first.keys()
        assert all(bool((left[name].abs() <= scales[name] / 2).all()) for name in left)
    else:
        assert not RunFolder(setting.folder).holds("clients/ada/residual")


def test_it_measures_the_uploads_of_others_and_keeps_nothing(tmp_path):
    setting = Setting(tmp_path, method="pcl", options={"probe_windows": 2})
    _, tensors = setting.ask(1)
    before = RunFolder(setting.folder).checkpoint()
    peers = {f"{n}/{slot}": t + n * 0.1 for n in range(2) for slot, t in tensors.items()}
    head = Request(
        kind="probe",
        run=RUN,
        round=1,
        after=1,
        since=1,
        config=config_for(setting.config, "ada"),
        comigs=our_version(),
        base=setting.fingerprint,
        probed=2,
    )
    answers = [setting.trainer.answer(wire.pack(head, peers)) for _ in range(2)]
    assert answers[0] == answers[1]
    probed, _ = opened(answers[0])
    assert isinstance(probed, Probed) and len(probed.nats) == 2 and probed.nats[0] != probed.nats[1]
    assert RunFolder(setting.folder).checkpoint() == before
    strange = wire.pack(head, {f"7/{slot}": t for slot, t in tensors.items()})
    assert opened(setting.trainer.answer(strange))[0].code == "unreadable"
    assert (
        opened(setting.trainer.answer(wire.pack(head.model_copy(update={"round": 2}), peers)))[
            0
        ].code
        == "ahead"
    )


CENTRAL = {"method": "centralized"}
REFUSALS = {  # what the server asks -> the code it gets, and what the device's owner reads
    "another comigs": ({"comigs": "9.9.9"}, "version", "the server has comigs 9.9.9, this device"),
    "another base": (
        {"base": "0" * 64},
        "base",
        'base "tiny-gpt2" (float32) is not the one of this run',
    ),
    "no config": ({"config": {"rounds": "many"}}, "refused", "the server's config: rounds"),
    "a round after the last": ({"round": 9}, "refused", "asked for round 9 of 2"),
    "a round whose state is gone": (
        {"round": 2, "after": 1},
        "lost",
        "missing; the server has had answers",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_it_cannot_do_is_said_here_and_is_a_code_there(setting, what):
    changes, code, line = REFUSALS[what]
    given = {"round": 1, "train": True, **changes}
    assert setting.refused(**given) == code
    assert line in setting.said[-1] and "\n" not in setting.said[-1]
    assert not list((setting.device.home / "runs").iterdir())


def test_it_does_nothing_for_another_client_or_with_another_method(tmp_path):
    setting = Setting(tmp_path)
    assert setting.refused(config=config_for(setting.config, "bob")) == "refused"
    assert "asked for bob, but this device is ada" in setting.said[-1]
    told = config_for(setting.config, "ada")
    for method, line in (("centralized", "in one place"), ("os.path", "devices run nothing else")):
        assert setting.refused(config=told | {"method": method}) == "refused"
        assert line in setting.said[-1]
    everyone = config_for(setting.config, "ada") | {"data": {"distribution": "out"}}
    assert setting.refused(config=everyone) == "refused"


def test_bytes_that_are_no_request_are_refused(setting):
    for raw in (b"", b"x" * 100, setting.request()[:-10] + b"?"):
        assert opened(setting.trainer.answer(raw))[0].code == "unreadable"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_download_that_is_not_finite_is_refused_and_changes_nothing(setting, bad):
    _, tensors = setting.ask(1)
    download = {slot: torch.full_like(tensor, bad) for slot, tensor in uploaded(tensors).items()}
    assert setting.refused(2, download) == "unreadable"
    assert RunFolder(setting.folder).checkpoint().round == 1


def test_a_full_device_refuses_for_want_of_memory(setting):
    full = torch.OutOfMemoryError("CUDA out of memory")
    with patch("comigs.federation.device.device_service.run_task", side_effect=full):
        assert setting.refused() == "memory"
    assert setting.said[-1] == "the memory of the device is full: CUDA out of memory"
    setting.ask(1)  # once it has room again
    assert RunFolder(setting.folder).checkpoint().round == 1


def test_a_download_of_private_slots_fails_and_changes_nothing(setting):
    setting.ask(1)
    before = RunFolder(setting.folder).load("clients/ada/experts")
    name = next(name for name in before if ".s0." in name)
    raw = setting.trainer.answer(
        setting.request(2, {Slot.parse(name): torch.ones_like(before[name])})
    )
    refusal, _ = opened(raw)
    assert (refusal.code, refusal.error) == ("failed", "AssertionError") and b"s0" not in raw
    assert same(before, RunFolder(setting.folder).load("clients/ada/experts"))


def test_other_settings_in_the_same_run_are_refused(setting):
    setting.ask(1)
    told = config_for(setting.config, "ada")
    assert setting.refused(2, config=told | {"seed": 7}) == "refused"
    assert "other settings" in setting.said[-1]
    setting.ask(2)


@pytest.mark.parametrize("text", ["missing", "short"])
def test_text_that_does_not_do_is_the_owners_affair(tmp_path, text):
    (tmp_path / "short").mkdir()
    for number in range(9):
        (tmp_path / "short" / f"{number}.txt").write_text(f"page {number}", encoding="utf-8")
    setting = Setting(tmp_path, device={"text": text}, data={"sequence_length": 60})
    assert setting.refused() == "not-ready"
    assert ("tokens, but needs" if text == "short" else "missing") in setting.said[-1]


def test_text_that_has_changed_is_noticed(setting):
    setting.ask(1)
    (setting.root / "ada" / "new.txt").write_text("one more page about an engine", encoding="utf-8")
    setting.trainer = setting.restarted()
    assert setting.refused(2) == "not-ready"
    assert "the text has changed since this run began" in setting.said[-1]
    (setting.root / "ada" / "new.txt").unlink()
    assert setting.ask(2)[0].round == 2


def test_an_error_of_ours_leaves_as_its_type(setting):
    def fail(event):
        raise RuntimeError(f"secret {setting.root} engine")

    whole = setting.trainer
    setting.report = fail
    setting.trainer = setting.restarted()
    raw = setting.trainer.answer(setting.request())
    refusal, _ = opened(raw)
    assert (refusal.code, refusal.error) == ("failed", "RuntimeError")
    assert b"secret" not in raw and b"engine" not in raw
    assert "secret" in setting.said[-1]
    setting.trainer = whole
    assert setting.ask(1)[0].round == 1


def test_a_loss_that_is_not_finite_is_a_code(setting):
    setting.config = setting.config.model_copy(
        update={
            "client": setting.config.client.model_copy(
                update={"lr": 1e30, "router_lr": 1e30, "steps": 6}
            )
        }
    )
    assert setting.refused() == "loss"
    assert "loss" in setting.said[-1] and RunFolder(setting.folder).checkpoint().round == 0


def test_a_full_disk_is_a_code_and_the_next_time_goes_well(setting, tmp_path):
    other = Setting(tmp_path, "other")
    expected = [other.trainer.answer(other.request(round)) for round in (1, 2)]
    setting.ask(1)
    real = os.replace

    def full(source, target):
        if "checkpoint" in str(target) or "answer" in str(target) or "experts" in str(target):
            raise OSError(28, "No space left on device")
        return real(source, target)

    with patch("os.replace", full):
        assert setting.refused(2) == "disk"
    assert "no space left on the disk" in setting.said[-1]
    assert upload_of(setting.trainer.answer(setting.request(2))) == upload_of(expected[1])


def upload_of(raw):
    """An answer without what may differ between two equal runs."""
    head, tensors = opened(raw)
    return head.metrics, {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("touch", [1, 4, 9, 14, 17, 20, 22, 24, 26, 28, 31])
@pytest.mark.few(5)
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(setting, tmp_path, touch):
    other = Setting(tmp_path, "other")
    expected = [upload_of(other.trainer.answer(other.request(round))) for round in (1, 2)]
    setting.ask(1)
    assert killed_at(touch, setting.folder, lambda: setting.trainer.answer(setting.request(2)))
    setting.trainer = setting.restarted()
    answered = setting.trainer.answer(setting.request(2))
    assert upload_of(answered) == expected[1]
    assert setting.trainer.answer(setting.request(2)) == answered
    for part in ("experts", "optimizer"):
        assert same(*(RunFolder(s.folder).load(f"clients/ada/{part}") for s in (setting, other)))


def test_the_base_is_loaded_once_for_all_runs(setting):
    setting.ask(1)
    base = setting.trainer._base
    head, _ = setting.ask(1, run="another-run-0123")
    assert head.run == "another-run-0123" and setting.trainer._base is base
    assert sum("loading base" in line for line in setting.said) == 1


def test_a_request_holds_no_text_no_path_and_nothing_of_others(tmp_path):
    local = run_config(
        tmp_path, "ada bob", {"bob": {"rank": 2, "weight": 2.0}, "ada": {"weight": 1.0}}
    )
    base = local.base.model_copy(update={"name": str(tmp_path)})
    told = json.dumps(config_for(local.model_copy(update={"base": base}), "ada"))
    assert (
        "bob" not in told
        and str(tmp_path) not in told
        and "text" not in json.loads(told)["clients"][0]
    )
    assert json.loads(told)["base"]["name"] == tmp_path.name


def test_a_socket_serves_one_after_the_other_and_only_who_has_the_key(setting, tmp_path):
    """In a process of its own, as on a device; what it writes is for its owner only."""
    socket = tmp_path / "s" / "trainer"
    child = begin(
        lambda: trainer_socket.serve(
            socket, trainer_socket.key_beside(socket), setting.trainer.answer
        )
    )
    try:
        until = time.monotonic() + 30
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.01)
        key = trainer_socket.key_beside(socket).read_bytes()
        trainer_socket.key_beside(socket).write_bytes(b"another key")
        with pytest.raises(Exception, match="digest"):
            trainer_socket.ask(socket, setting.request())
        trainer_socket.key_beside(socket).write_bytes(key)
        answers = {}
        threads = [
            threading.Thread(
                target=lambda n=n: answers.update(
                    {n: trainer_socket.ask(socket, setting.request())}
                )
            )
            for n in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(answers.values())) == 1 and opened(answers[0])[0].round == 1
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert modes(setting.device.home) <= {"0o700", "0o600"}
    assert modes(socket.parent) <= {"0o700", "0o600"}
    assert (setting.device.home / "runs" / RUN / "checkpoint.json").exists()


def test_of_a_request_that_is_too_large_nothing_is_read(tmp_path):
    socket = tmp_path / "trainer"

    def answer(raw):
        return str(len(raw)).encode()

    child = begin(
        lambda: trainer_socket.serve(
            socket, trainer_socket.key_beside(socket), answer, lambda: 1 << 20
        )
    )
    try:
        until = time.monotonic() + 30
        while not socket.exists() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(trainer_socket.LOST):
            trainer_socket.ask(socket, bytes((1 << 20) + 1))
        assert trainer_socket.ask(socket, bytes(1 << 20)) == b"1048576"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_socket_with_a_path_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match="too long for a socket's path"):
        trainer_socket.serve(tmp_path / ("x" * 120), tmp_path / "key", lambda raw: raw)
