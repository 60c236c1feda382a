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
from tests.runs import comigs, refused, write_config
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
    assert "behind these conditions" in done.out
    assert "of 4 answers wanted 4 count, 0 are late or lost" in done.out


def test_who_is_in_which_group_is_told(tmp_path):
    groups = {"old": {"share": 1.0, "tokens_per_second": 50}}
    rough = ROUGH | {"conditions": {"groups": groups}}
    lines = forecast_lines(*given(run_config(tmp_path / "text", "ada bob", **rough)))
    assert lines[0] == "group old: ada and bob"
    assert lines[1].startswith("behind these conditions: 4 rounds in ")


def test_what_a_private_client_sends_is_counted_once_where_it_is_all_that_learns(tmp_path):
    private = {"level": "document", "noise_multiplier": 1.0, "delta": 1e-3, "expected_batch": 3}
    for method, twice in (("fedavg", False), ("comigs", True)):
        rough = ROUGH | {"privacy": {**private, "noise_seed": 4}, "participation": {}}
        config = run_config(tmp_path / "text", "ada bob", method=method, **rough)
        run = read_run(api.run(config, tmp_path / method).path)
        told = forecast(*given(config))
        for lines in (run.train, told.train):
            assert {line.sent_tokens is not None for line in lines} == {twice}
        # a batch of documents is drawn, so that tokens are what they are on average
        mean = sum(line.trained_tokens for line in told.train) / len(told.train)
        done = sum(line.trained_tokens for line in run.train) / len(run.train)
        assert mean / 2 < done < mean * 2


def test_a_trace_that_ends_before_the_run_leaves_no_folder(tmp_path, capsys):
    """However far the run would come, nothing is trained."""
    config = write_config(tmp_path)
    trace = "client,seconds,available\nann,0,1\nann,{end},1\nbob,0,1\nbob,{end},1\n"
    slow = ["--set", "conditions.trace=trace.csv", "--set", "conditions.tokens_per_second=5"]
    for end in (1, 60):
        (tmp_path / "trace.csv").write_text(trace.format(end=end))
        line = refused(capsys, "run", config, "--out", tmp_path / "run", *slow)
        assert "conditions.trace: client ann's ends at second" in line
        assert "give one that covers it" in line and not (tmp_path / "run").exists()
    (tmp_path / "trace.csv").write_text(trace.format(end=1e6))
    assert comigs(capsys, "run", config, "--out", tmp_path / "run", *slow).code == 0
