"""The base is measured once on a text, and again where anything about the measurement differs."""

from __future__ import annotations

import pytest
import torch

from comigs.app import api
from comigs.engines import base_evaluation_cache
from comigs.runs.folder import RunFolder
from tests.conftest import run_config
from tests.runs import outcome


@pytest.fixture
def measured(monkeypatch):
    """Every measurement that is really made."""
    made, measure = [], base_evaluation_cache.measure_base
    monkeypatch.setattr(
        base_evaluation_cache,
        "measure_base",
        lambda client, split: made.append((client.name, split)) or measure(client, split),
    )
    return made


def test_a_second_run_measures_nothing_anew_and_is_the_same_to_the_bit(tmp_path, measured):
    config = run_config(tmp_path)
    for name in ("one", "two"):
        api.run(config, tmp_path / name)
    assert sorted(measured) == [(c, s) for c in ("ada", "bob") for s in ("test", "valid")]
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")


@pytest.mark.parametrize(
    "other",
    [
        {"evaluation": {"batch_size": 3}},
        {"data": {"sequence_length": 10}},
        {"base": {"name": "tiny-llama"}},
    ],
)
@pytest.mark.few(1)
def test_another_way_to_measure_is_another_measurement(tmp_path, measured, other):
    for number, settings in enumerate(({}, other)):
        api.run(run_config(tmp_path, **settings), tmp_path / f"run-{number}")
    assert len(measured) == 8


def test_threads_count_for_they_change_the_order_of_sums(tmp_path, measured):
    api.run(run_config(tmp_path), tmp_path / "one")
    api.run(run_config(tmp_path, base={"threads": 2}), tmp_path / "two")
    torch.set_num_threads(1)
    assert len(measured) == 8


@pytest.mark.parametrize("content", [b"", b"{}", b"[1.0, 2]", b"\xff", b"[null, 1, 1]"])
@pytest.mark.few(1)
def test_a_damaged_figure_is_measured_again(tmp_path, measured, content):
    config = run_config(tmp_path)
    first = api.run(config, tmp_path / "one")
    for path in (tmp_path / "cache" / "base").iterdir():
        path.write_bytes(content)
    again = api.run(config, tmp_path / "two")
    assert len(measured) == 8 and first.metrics() == again.metrics()


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path, measured):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "base").touch()
    api.run(run_config(tmp_path), tmp_path / "run")
    assert len(measured) == 4 and RunFolder.open(tmp_path / "run").checkpoint().finished
