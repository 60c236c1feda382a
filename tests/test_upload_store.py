"""Uploads on the disk: the same slots and bits, read when looked at, and nothing of them in memory
in between.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from comigs.app import api
from comigs.engines.upload_store import MAX_OPEN, UploadStore
from comigs.errors import UserError
from comigs.slots import Slot
from tests.conftest import run_config, same
from tests.runs import ENVIRONMENT

A, B, ATTENTION = (
    Slot(3, "up", "g0", "A"),
    Slot(3, "up", "g0", "B"),
    Slot(11, "q", "attention", "A"),
)
UPLOAD = {
    B: torch.tensor([[float("nan"), -0.0], [1e-40, 3.0]]),
    ATTENTION: torch.randn(5, 7, dtype=torch.float64).to(torch.bfloat16),
    A: torch.randn(4, 6).T,  # not contiguous
}


def test_what_comes_back_is_what_was_added_to_the_bit_and_in_order(tmp_path):
    kept = UploadStore(tmp_path / "not" / "there").add("ada", UPLOAD)
    assert list(kept) == list(UPLOAD) and len(kept) == 3
    assert same(kept, UPLOAD) and same(dict(kept.items()), UPLOAD)
    assert A in kept and Slot(3, "up", "g1", "A") not in kept
    with pytest.raises(KeyError):
        _ = kept[Slot(3, "up", "g1", "A")]
    assert dict(UploadStore(tmp_path).add("bob", {})) == {}


def test_each_look_is_a_tensor_of_its_own_aligned_as_torch_aligns_them(tmp_path):
    kept = UploadStore(tmp_path).add("ada", UPLOAD)
    kept[A].fill_(7.0)
    assert same(kept, UPLOAD)
    assert all(kept[slot].data_ptr() % 64 == 0 for slot in kept)


def test_one_client_may_be_there_twice(tmp_path):
    """A late upload beside the one of this round."""
    store = UploadStore(tmp_path)
    late, now = store.add("ada", {A: torch.zeros(2)}), store.add("ada", {A: torch.ones(2)})
    assert not late[A].any() and bool(now[A].all())


def test_no_more_files_are_open_than_a_process_may_have(tmp_path):
    store, before = UploadStore(tmp_path), psutil.Process().num_fds()
    uploads = [
        store.add(f"client{n}", {A: torch.full((2,), float(n))}) for n in range(3 * MAX_OPEN)
    ]
    assert [float(upload[A][0]) for upload in uploads] == list(range(3 * MAX_OPEN))
    assert psutil.Process().num_fds() <= before + MAX_OPEN
    store.clear()
    assert psutil.Process().num_fds() <= before and not tmp_path.exists()
    assert float(store.add("ada", {A: torch.ones(1)})[A]) == 1  # it can be filled again


def test_no_file_of_an_earlier_round_takes_room_in_the_next(tmp_path):
    """What is removed while it is open is on the disk still."""
    held = {}

    def look(event):
        if event.kind == "step":
            links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
            left = [link for link in links if str(tmp_path) in link and "(deleted)" in link]
            held.setdefault(event.round, []).extend(left)

    api.run(run_config(tmp_path, "ada bob", rounds=3), tmp_path / "run", report=look)
    assert held == {1: [], 2: [], 3: []}


def test_a_full_disk_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="make room or allow writing"):
        UploadStore(tmp_path / "file" / "store").add("ada", UPLOAD)


MEASURE = """
import sys, torch
from pathlib import Path
from comigs.engines.upload_store import UploadStore
from comigs.processes import peak_memory
from comigs.methods.merging import mean
from comigs.slots import Slot
store, slots = UploadStore(Path(sys.argv[1])), [Slot(layer, "up", "g0", "A") for layer in range(8)]
upload = lambda n: {slot: torch.full((256, 1024), float(n)) for slot in slots}  # 8 MiB
add = lambda n: store.add(f"client{n}", upload(n))
mean([add(n) for n in range(2)])
before = peak_memory()
merged = mean([add(n) for n in range(40)])
assert float(merged[slots[0]][0, 0]) == 19.5
print(peak_memory() - before)
"""


def test_memory_holds_one_sum_however_many_uploads_are_averaged(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        check=True,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 32 << 20  # of 320 MiB
