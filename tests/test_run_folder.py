"""The run folder: a commit is whole or not there, whatever moment a kill comes at; damage is found
and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from itertools import count
from unittest.mock import patch

import pytest
import torch

from comigs.config import parse_config
from comigs.errors import UserError
from comigs.files import require_free, write_whole
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Absent, RoundEnd, Timing
from tests.kills import killed_at
from tests.runs import files

CONFIG = parse_config({"clients": [{"name": "ann", "text": "x"}]})


def staged_in(round):
    """What a round stages: bob is at work in the first round only."""
    tensors = {
        "clients/ann/experts": {"A": torch.full((2, 3), float(round)), "B": torch.ones(4)},
        "server/state": {"memory": torch.tensor(round)},
    }
    return tensors | ({"clients/bob/experts": {"A": torch.zeros(3)}} if round == 1 else {})


def held_after(round):
    """path -> (the round it is of, its tensors)."""
    held = {}
    for r in range(1, round + 1):
        held |= {path: (r, tensors) for path, tensors in staged_in(r).items()}
    return held


def file_of(path, round):
    parent, _, name = path.rpartition("/")
    return f"{parent}/round-{round:04d}.{name}.safetensors"


def lines_of(round):
    return [
        Absent(round=round, client="ann", reason="gone"),
        RoundEnd(round=round, drift=1 / round),
    ]


def commit(folder, round):
    for path, tensors in staged_in(round).items():
        folder.stage(path, tensors, round)
    folder.scratch.mkdir(exist_ok=True)
    (folder.scratch / "upload").write_bytes(b"in between")
    folder.commit(round, lines_of(round), [Timing(round=round, seconds=0.5)])


def new_run(path, rounds=1):
    folder = RunFolder.create(path, CONFIG, {"versions": {}})
    for round in range(1, rounds + 1):
        commit(folder, round)
    return folder


def check_whole(folder, round):
    """The folder, rewound, holds exactly the first `round` rounds and nothing else."""
    assert folder.rewind().round == round
    assert folder.metrics() == [line for r in range(1, round + 1) for line in lines_of(r)]
    expected = held_after(round)
    for path, (_, tensors) in expected.items():
        assert folder.holds(path)
        loaded = folder.load(path)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    others = {"config.toml", "env.json", "metrics.jsonl", "timings.jsonl", "checkpoint.json"}
    newest = {file_of(path, of) for path, (of, _) in expected.items()}
    assert {name for name in files(folder.path) if name != ".lock"} == others | newest
    assert set(folder.checkpoint().files) == newest | {"metrics.jsonl"}
    timings = (folder.path / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in timings] == list(range(1, round + 1))


def test_a_kill_at_any_touch_of_a_commit_leaves_a_whole_round(tmp_path):
    whole = files(new_run(tmp_path / "whole", rounds=2).path)
    for moment in count(1):
        path = tmp_path / str(moment)
        folder = new_run(path)
        if not killed_at(moment, path, lambda: commit(folder, 2)):  # noqa: B023
            break
        found = RunFolder.open(path).checkpoint().round
        check_whole(RunFolder.open(path), found)
        if found == 1:
            commit(folder, 2)
        check_whole(folder, 2)
        assert files(path) == whole, f"after a kill at touch {moment}"
    assert moment > 15


def test_a_kill_at_any_touch_of_create_leaves_a_run_or_nothing(tmp_path):
    for moment in count(1):
        parent = tmp_path / str(moment)
        if not killed_at(moment, parent, lambda: RunFolder.create(parent / "run", CONFIG, {})):  # noqa: B023
            break
        if not (parent / "run").exists():
            RunFolder.create(parent / "run", CONFIG, {})  # it can be made again at once
        check_whole(RunFolder.open(parent / "run"), 0)
    assert moment > 10


def test_equal_runs_have_equal_bytes(tmp_path):
    first, second = (files(new_run(tmp_path / name, rounds=3).path) for name in "ab")
    assert first == second


def test_rewind_drops_what_was_not_committed(tmp_path):
    folder = new_run(tmp_path / "run", rounds=2)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "rou')
    with (folder.path / "timings.jsonl").open("a") as file:
        file.write('{"round": 3}\n')
    (folder.path / "clients" / "ann" / "round-0003.experts.safetensors").write_bytes(b"half")
    (folder.path / "clients" / "ann" / ".round-0003.optimizer.safetensors.unfinished").write_bytes(
        b"half"
    )
    folder.stage("clients/eve/experts", {"A": torch.zeros(2)}, 3)
    folder.scratch.mkdir()
    (folder.scratch / "upload").touch()
    check_whole(folder, 2)
    assert not folder.holds("clients/eve/experts", staged=True)


def test_rewind_leaves_what_somebody_else_put_into_the_folder(tmp_path):
    """A run inside the run, an export: only what a killed process of this run may leave is
    dropped.
    """
    folder = new_run(tmp_path / "run", rounds=2)
    inner = new_run(folder.path / "second", rounds=2)
    before = files(inner.path)
    mine = [
        folder.path / name for name in ("export/model.safetensors", "clients/ann/mine.safetensors")
    ]
    for file in mine:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"mine")
    folder.rewind()
    assert files(inner.path) == before and all(file.read_bytes() == b"mine" for file in mine)


def test_the_round_before_is_deleted_and_who_is_idle_keeps_its_file(tmp_path):
    folder = new_run(tmp_path / "run")
    bob = folder.path / "clients" / "bob" / "round-0001.experts.safetensors"
    before = bob.stat()
    for round in (2, 3):
        commit(folder, round)
        check_whole(folder, round)
    assert (bob.stat().st_ino, bob.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    bob.write_bytes(b"damaged")
    commit(folder, 4)  # nor is it read
    assert folder.checkpoint().files["clients/bob/round-0001.experts.safetensors"]


def test_what_is_staged_is_not_part_of_the_run_before_the_commit(tmp_path):
    folder = new_run(tmp_path / "run")
    folder.stage("clients/ann/experts", {"A": torch.tensor(2.0)}, 2)
    folder.stage("clients/eve/experts", {"A": torch.tensor(3.0)}, 2)
    for reader in (folder, RunFolder.open(folder.path)):
        assert float(reader.load("clients/ann/experts")["A"][0, 0]) == 1
        assert not reader.holds("clients/eve/experts")
    assert float(folder.load("clients/ann/experts", staged=True)["A"]) == 2
    assert (
        float(folder.load("clients/bob/experts", staged=True)["A"][0]) == 0
    )  # of which nothing is staged
    folder.stage("clients/ann/experts", {"A": torch.tensor(4.0)}, 2)  # asked again
    folder.commit(2, [], [])
    for reader in (folder, RunFolder.open(folder.path)):
        assert float(reader.load("clients/ann/experts")["A"]) == 4
        assert float(reader.load("clients/eve/experts")["A"]) == 3


def test_a_finished_run_keeps_personal_models_and_nothing_else(tmp_path):
    folder = new_run(tmp_path / "run", rounds=2)
    for name in ("ann", "bob"):
        folder.stage(f"clients/{name}/personal", {"A": torch.tensor(7.0)}, 3)
    folder.stage("clients/ann/experts", {"A": torch.tensor(4.0)}, 3)
    folder.commit(2, [], [], finished=True)
    for reader in (folder, RunFolder.open(folder.path)):
        assert reader.rewind().finished and not reader.holds("clients/ann/experts")
        assert float(reader.load("clients/bob/personal")["A"]) == 7
    found = {str(p.relative_to(folder.path)) for p in folder.path.rglob("*.safetensors")}
    assert found == {"clients/ann/personal.safetensors", "clients/bob/personal.safetensors"}


def test_a_commit_that_fails_leaves_the_last_one_and_can_be_made_again(tmp_path):
    whole, folder = new_run(tmp_path / "whole", rounds=2), new_run(tmp_path / "run")
    full = patch(
        "comigs.runs.folder.RunFolder._write_checkpoint",
        side_effect=OSError(28, "No space left on device"),
    )
    with full, pytest.raises(UserError, match="no space left on the disk"):
        commit(folder, 2)
    assert RunFolder.open(folder.path).checkpoint().round == 1
    commit(folder, 2)
    assert files(folder.path) == files(whole.path)


def test_the_hash_of_the_metrics_is_of_all_of_them_however_they_came(tmp_path):
    folder = new_run(tmp_path / "run", rounds=2)
    commit(RunFolder.open(folder.path), 3)  # by a process that was not there before
    expected = hashlib.sha256((folder.path / "metrics.jsonl").read_bytes()).hexdigest()
    assert folder.checkpoint().files["metrics.jsonl"] == expected


@pytest.mark.parametrize("at", [0, 9, 60, -1])
def test_a_flipped_byte_in_a_tensor_file_is_found(tmp_path, at):
    folder = new_run(tmp_path / "run")
    file = folder.path / "clients" / "ann" / "round-0001.experts.safetensors"
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"round-0001\.experts\.safetensors: damaged"):
        folder.load("clients/ann/experts")


def test_a_flipped_byte_in_the_metrics_is_found(tmp_path):
    folder = new_run(tmp_path / "run", rounds=2)
    metrics = folder.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match=r"metrics\.jsonl: damaged \(changed since round 2 ended\)"):
        folder.rewind()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"round": 1}',
        "\x00\x01",
        '{"round": "1", "finished": false, "metrics_bytes": 0, "timings_bytes": 0, "files": {}}',
        '{"round": 1, "finished": false, "metrics_bytes": 0, "timings_bytes": -1, "files": {}}',
    ],
)
def test_a_damaged_checkpoint_file_is_named(tmp_path, text):
    folder = new_run(tmp_path / "run")
    (folder.path / "checkpoint.json").write_text(text)
    with pytest.raises(UserError, match=r"checkpoint\.json: damaged"):
        folder.checkpoint()


@pytest.mark.parametrize("name", ["metrics.jsonl", "timings.jsonl"])
def test_lines_that_are_gone_are_noticed(tmp_path, name):
    folder = new_run(tmp_path / "run", rounds=2)
    os.truncate(folder.path / name, 5)
    with pytest.raises(UserError, match="shorter than when round 2 ended"):
        folder.rewind()


def test_a_missing_tensor_file_is_named(tmp_path):
    folder = new_run(tmp_path / "run")
    (folder.path / "server" / "round-0001.state.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"round-0001\.state\.safetensors: cannot be read: No such file"
    ):
        folder.load("server/state")


def test_only_committed_tensors_are_loaded(tmp_path):
    with pytest.raises(UserError, match="not of this run"):
        new_run(tmp_path / "run").load("clients/ann/optimizer")


def test_only_one_process_works_on_a_run(tmp_path):
    folder = new_run(tmp_path / "run")
    with (
        folder,
        pytest.raises(UserError, match="another process is working on this run"),
        RunFolder.open(folder.path),
    ):
        pass
    with RunFolder.open(folder.path):  # free again
        pass


def test_the_config_comes_back_equal(tmp_path):
    written = new_run(tmp_path / "run").config()
    assert (
        written.model_copy(update={"data": CONFIG.data}) == CONFIG
    )  # its data.root is now absolute


def test_write_whole_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail(unfinished):
        unfinished.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert files(tmp_path) == {"x.json": b"old"}


def test_a_new_name_is_on_the_disk_before_anything_follows_from_it(tmp_path, monkeypatch):
    """A loss of power must not take back what a ledger has counted, or bring back a checkpoint."""
    done = []

    def fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(old, new):
        done.append("name")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_whole(tmp_path / "x.json", lambda p: p.write_text("new"))
    assert done == ["file", "name", "folder"]


def test_write_whole_is_there_or_not_after_a_kill(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    for moment in count(1):
        if not killed_at(
            moment, tmp_path, lambda: write_whole(path, lambda p: p.write_text("new"))
        ):
            break
        assert path.read_text() in ("old", "new")
    assert moment > 3
    assert path.read_text() == "new"


def test_what_a_killed_writer_left_is_removed_by_a_later_writer_of_the_same_file(tmp_path):
    path, other, fresh = tmp_path / "x[1].json", tmp_path / "y.json", ".x[1].json."
    names = {"old": f"{fresh}{'0' * 16}", "young": f"{fresh}{'1' * 16}", "y": ".y.json." + "2" * 16}
    names = {key: f"{name}.unfinished" for key, name in names.items()}
    for name in (*names.values(), f"{fresh}mine.unfinished"):
        (tmp_path / name).write_text("half")
        if name != names["young"]:
            os.utime(tmp_path / name, (0, 0))
    write_whole(path, lambda p: p.write_text("new"))
    assert names["old"] not in files(tmp_path)
    assert {names["young"], names["y"], f"{fresh}mine.unfinished", path.name} <= set(
        files(tmp_path)
    )
    write_whole(other, lambda p: p.write_text("new"))
    assert names["y"] not in files(tmp_path)


def test_a_new_run_needs_a_free_place(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "two words").mkdir()
    require_free(tmp_path / "new" / "deeper")
    for name, reason in {
        "file": "exists",
        "link": "exists",
        "file/run": "is a file",
        "two words": "'.*two words'",
    }.items():
        with pytest.raises(UserError, match=reason):
            require_free(tmp_path / name)
