"""Numbers and their formatting, against figures worked out by hand or another way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from comigs import text as f
from comigs.errors import UserError
from comigs.runs.metrics import Score
from comigs.runs.report.curves import MAX_STEP_POINTS, drift_points, loss_curves, share_curves
from comigs.runs.report.held_tensors import held_by_role
from comigs.runs.report.kept_models import kept_lines, kept_table
from comigs.runs.report.page import report_page
from comigs.runs.report.read import read_run
from comigs.runs.report.results import gain, results
from comigs.runs.report.routing_heatmap import routing_heatmap
from comigs.runs.report.tables import (
    client_table,
    cost_table,
    expert_share_table,
    headline,
    role_table,
)
from tests.test_report_runs import change_metrics, write_run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.perplexity(9.527), "9.53"),
        (f.perplexity(95.27), "95.3"),
        (f.perplexity(612.4), "612"),
        (f.perplexity(12345.6), "12,346"),
        (f.perplexity(1.2e7), "1.2e+07"),
        (f.perplexity(None), "\N{EN DASH}"),
        (f.percent(0.8442), "84.4 %"),
        (f.percent(-0.0001), "0.0 %"),
        (f.percent(-0.031), "-3.1 %"),
        (f.size(0), "0 B"),
        (f.size(999), "999 B"),
        (f.size(98_304), "98.3 kB"),
        (f.size(999_960), "1.0 MB"),
        (f.size(2.5e12), "2.5 TB"),
        (f.duration(119.96), "120.0 s"),
        (f.duration(131), "2.2 min"),
        (f.duration(7200), "2.0 h"),
        (f.rounds([5, 3, 4, 8, 8]), "3 to 5, 8"),
        (f.plural(1, "client"), "1 client"),
    ],
)
def test_format(text: str, expected: str) -> None:
    assert text == expected


def test_gain() -> None:
    assert gain(Score(perplexity=200), Score(perplexity=50)) == 0.75
    assert gain(Score(perplexity=50), Score(perplexity=75)) == -0.5
    assert gain(Score(), Score(perplexity=75)) is None
    assert gain(Score(perplexity=50), Score()) is None


def test_results_of_a_finished_run_are_those_on_test(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tested = [e for e in lines if e["kind"] == "evaluation" and e["split"] == "test"]
    before = np.array([math.exp(e["nats_per_token"]) for e in tested if e["round"] == 0])
    after = np.array([math.exp(e["nats_per_token"]) for e in tested if e["round"] == 10])
    r = results(run)
    assert [c.gain for c in r.clients] == pytest.approx(list((before - after) / before))
    assert r.gain == pytest.approx(1 - after.sum() / before.sum())
    assert r.uploaded_per_client_and_round == 1_200_000
    assert [c.trained_tokens for c in r.clients] == [819_200] * 4


def test_results_of_an_unfinished_run_are_the_last_on_valid(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, done=4))
    latest = [e for e in run.evaluations if (e.split, e.model, e.round) == ("valid", "personal", 4)]
    r = results(run)
    assert (r.split, r.rounds) == ("valid", 4)
    assert [c.personal for c in r.clients] == [e.score for e in latest]
    assert r.personal.perplexity == pytest.approx(np.mean([e.score.perplexity for e in latest]))
    assert r.uploaded_per_client_and_round == 1_200_000


def test_headline(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, clients=("a",), rounds=1))
    assert headline(run).startswith(
        "1 client, test perplexity 416 \N{RIGHTWARDS ARROW} 90.9 (78 % lower), in 1 round;"
    )


def test_client_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    table = client_table(run)
    assert table.last is not None
    assert {len(row) for row in (*table.rows, table.last)} == {len(table.headers)}
    assert table.rows[0][:2] == ("de", "wiki40b:de")
    brief = client_table(run, brief=True)
    assert brief.headers == (
        "client",
        "base perplexity",
        "personal perplexity",
        "gain",
        "personal bits/byte",
        "upload / round",
    )
    assert brief.rows[0][0] == "de"


def test_ranks_are_shown_apart_only_where_they_differ(tmp_path: Path) -> None:
    folder = write_run(tmp_path, done=1)
    assert {row[10] for row in client_table(read_run(folder)).rows} == {"12 / 4"}
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("specialist_rank = 4", "specialist_rank = 12"))
    assert {row[10] for row in client_table(read_run(folder)).rows} == {"12"}


def test_costs(tmp_path: Path) -> None:
    table = cost_table(read_run(write_run(tmp_path)))
    assert table.rows[0] == ("de", "12.0 MB", "12.0 MB", "32.0 s", "2,675", "900.0 MB")
    assert table.last == ("all", "48.0 MB", "48.0 MB", "2.1 min", "\N{EN DASH}", "900.0 MB")


@pytest.mark.parametrize("done", [None, 2])
def test_held_and_uploaded_by_role(tmp_path: Path, done: int | None) -> None:
    write_run(tmp_path, layers=3, experts=3, clients=("a", "b"), rounds=2, done=done)
    held = held_by_role(tmp_path)
    slots = {
        role: amount.slots for role, amount in held.items()
    }  # layers x sites x experts x (A, B) x clients
    assert slots == {"generalist": 24, "specialist": 48, "attention": 12, "router": 6}
    assert held["router"].bytes == 6 * 256
    table = role_table(read_run(tmp_path))
    assert table is not None
    assert table.rows[0] == ("generalists", "24", "6.1 kB", "48", "3.2 MB", "left the device")
    assert table.rows[2][-1] == "never left"


def test_each_expert_has_a_share_where_there_are_more_than_two(tmp_path: Path) -> None:
    assert expert_share_table(read_run(write_run(tmp_path / "two"))) is None
    folder = write_run(tmp_path, experts=3, method="pfedmoe")
    change_metrics(folder, expert_share_by_layer=[[0.5, 0.25, 0.25], [0.0, 0.75, 0.25]])
    table = expert_share_table(read_run(folder))
    assert table is not None
    assert table.headers == ("client", "generalist 0", "specialist 0", "specialist 1")
    assert table.rows[0] == ("de", "0.25", "0.50", "0.25")


def test_beside_the_rest_of_the_world_stands_how_much_of_it_was_adopted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, method="comigs-others")
    change_metrics(folder, expert_share_by_layer=[[0.5, 0.5], [1.0, 0.0]], adopted_share=0.4)
    table = expert_share_table(read_run(folder))
    assert table is not None
    assert table.headers == (
        "client",
        "its own 0",
        "everybody's",
        "adopted of the last download",
    )
    assert table.rows[0] == ("de", "0.75", "0.25", "0.40")
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('"comigs-others"', '"pfedmoe"'))
    table = expert_share_table(read_run(folder))
    assert table is not None
    assert table.headers == (
        "client",
        "generalist 0",
        "specialist 0",
        "adopted of the last download",
    )


def test_a_client_without_a_router_may_adopt_as_well(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    change_metrics(folder, expert_share_by_layer=None, adopted_share=1.0)
    table = expert_share_table(read_run(folder))
    assert table is not None
    assert (table.headers, table.rows[0]) == (
        ("client", "adopted of the last download"),
        ("de", "1.00"),
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]", b"\x0d" + bytes(7) + b'{"x":{"a":1}}'],
)
def test_broken_tensor_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = write_run(tmp_path, done=1) / "clients" / "fr" / "round-0001.experts.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"round-0001\.experts\.safetensors: cannot be read"):
        held_by_role(tmp_path)


def test_heatmap_leans_from_the_middle(tmp_path: Path) -> None:
    folder = write_run(tmp_path, layers=4)
    change_metrics(folder, generalist_share_by_layer=[0.5, 1.0, 0.0, 0.25])
    heat = routing_heatmap(read_run(folder))
    assert heat is not None
    mean, *cells = heat.rows[0][1]
    assert [(c.text, c.strength) for c in cells] == [
        ("0.50", 0),
        ("1.00", 1),
        ("0.00", 1),
        ("0.25", 0.5),
    ]
    assert [c.role for c in cells[1:]] == ["generalist", "specialist", "specialist"]
    assert mean.text == "0.44"
    assert heat.source == "the test text"


def test_where_no_token_has_a_choice_that_is_said_and_no_share(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "closed", layers=2, method="comigs-others")
    change_metrics(folder, generalist_share_by_layer=[0.0, 0.0], adopted_share=1.0)
    heat = routing_heatmap(read_run(folder))
    assert heat is not None
    assert heat.rows[0] == ("de", (), "closed (adopted 100 %)")
    change_metrics(folder, adopted_share=None)  # as in older runs that kept an earlier round
    heat = routing_heatmap(read_run(folder))
    assert heat is not None and heat.rows[0] == ("de", (), "closed")
    page = report_page(read_run(folder))
    assert '<td class="name" colspan="3">closed</td>' in page
    # where it is not beside the others', a router that gives a generalist nothing has chosen so
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('"comigs-others"', '"pfedmoe"'))
    heat = routing_heatmap(read_run(folder))
    assert heat is not None and heat.rows[0][1][0].text == "0.00" and not heat.rows[0][2]


def test_what_each_personal_model_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path, clients=("a", "b"), rounds=3)
    assert kept_table(read_run(folder)) is None and kept_lines(read_run(folder)) == []
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    a, b = summary["clients"]["a"], summary["clients"]["b"]
    a |= {"kept_round": 2, "last_test": a["test"], "kept_part": "base", "adopted_share": 0.25}
    b |= {"kept_round": 3, "adopted_share": 1.0}
    file.write_text(json.dumps(summary))
    table, lines = kept_table(read_run(folder)), kept_lines(read_run(folder))
    assert table is not None
    assert [(row[1], *row[4:]) for row in table.rows] == [
        ("2 of 3", "25.0 %", "base"),
        ("3 of 3", "100.0 %", f.NONE),
    ]
    assert [line.split(" with ")[-1].split(";")[0] for line in lines] == [
        "1 of 2 clients best on valid in an earlier round",
        "one part of the model alone: base (1)",
        "a model that adopted all of its download",
    ]
    assert table.headers[4:] == ("adopted of its download", "the one part that it is")


def test_curves(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=4, steps=5))
    curve = loss_curves(run)[0]
    assert curve.by_step[0][0] == pytest.approx(0.2)
    assert curve.by_step[-1][0] == pytest.approx(4)
    assert [x for x, _ in curve.by_round] == [0.5, 1.5, 2.5, 3.5]
    assert [x for x, _ in curve.valid] == [1, 2, 3, 4]
    assert curve.base == pytest.approx(6.03)
    assert len(share_curves(run)) == 4
    assert drift_points(run)[0] == (2.0, 0.3)


def test_long_runs_are_thinned_to_means(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, clients=("a",), rounds=2, steps=1000))
    steps = [y for t in run.train for y in t.train_nats_per_token_by_step]
    by_step = loss_curves(run)[0].by_step
    assert len(by_step) <= MAX_STEP_POINTS
    assert by_step[0][1] == pytest.approx(np.mean(steps[:7]))
