"""What a dry run says of simulated devices, against the run itself."""

from __future__ import annotations

import pytest

from comigs.app import api
from comigs.app.forecast import forecast, forecast_lines
from comigs.app.setup import attached, load
from comigs.config import SPLITS
from comigs.methods.loading import load_method
from comigs.runs.report.read import read_run
from tests.conftest import run_config
from tests.runs import comigs, write_config
from tests.test_conditions import ROUGH


def given(config):
    """What a forecast needs to know of a config: its method, and what its clients have."""
    base, config = load(config)
    texts = api.prepare(config)
    tokens = {}
    for name in texts.names:
        own, length = texts.load(name), config.data.sequence_length
        # of each file, the first token is not predicted
        sizes = {s: sum(f.num_learnt(length) - 1 for f in getattr(own, s)) for s in SPLITS}
        tokens[name] = sizes
    with attached(config, base) as (_, shapes):
        return config, load_method(config), shapes, tokens


@pytest.mark.parametrize(
    "method, more",
    [
        ("comigs", {"evaluation": {"every": 2}}),
        ("flora", {"upload": {"format": "int8"}}),
        ("pcl", {}),
        ("centralized", {"participation": {"deadline": 40, "min_clients": 1, "max_failures": 9}}),
    ],
)
def test_it_is_what_the_run_then_does_to_the_last_digit(tmp_path, method, more):
    config = run_config(tmp_path / "text", "ada bob cyd", method=method, **(ROUGH | more))
    config = config.model_copy(
        update={"conditions": config.conditions.model_copy(update={"dropout": 0.5})}
    )
    run = read_run(api.run(config, tmp_path / "run").path)
    told = forecast(*given(config))
    assert {(t.client, t.round) for t in told.train} == {(t.client, t.round) for t in run.train}
    assert told.exchanges == run.exchanges
    assert told.attempts == run.attempts
    assert told.absent == run.absent
    assert any(attempt.lost for attempt in run.attempts)


def test_a_run_that_would_stop_says_why(tmp_path):
    rough = ROUGH | {"participation": {"deadline": 1, "max_failures": 1}}
    (line,) = forecast_lines(*given(run_config(tmp_path / "text", "ada bob", **rough)))
    assert line.startswith("behind these conditions the run stops: round 1: 0 of the 1 usable")
    assert "resume" not in line and "\n" not in line


def test_a_dry_run_says_how_long_rounds_take_and_who_misses_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    slow = ("--set", "conditions.speed=0.001", "--set", "conditions.latency=60")
    done = comigs(capsys, "run", "tiny.toml", "--dry-run", *slow)
    assert done.code == 0
    assert "behind these conditions" in done.out and "answers count, 0 are late or lost" in done.out


def test_who_is_in_which_group_is_told(tmp_path):
    groups = {"old": {"share": 1.0, "tokens_per_second": 50}}
    rough = ROUGH | {"conditions": {"groups": groups}}
    lines = forecast_lines(*given(run_config(tmp_path / "text", "ada bob", **rough)))
    assert lines[0] == "group old: ada and bob"
    assert lines[1].startswith("behind these conditions: 4 rounds in ")
