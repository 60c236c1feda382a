"""The schema of a run's lines: what is read is written again, to the byte."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from comigs.errors import UserError
from comigs.runs.json_lines import (
    KINDS,
    read_event,
    read_lines,
    read_record,
    read_timings,
    to_lines,
)
from comigs.runs.metrics import Evaluation, Note, RoundEnd, Score, Summary, Train
from tests.fake_engine import evaluation_of, train_of
from tests.test_reading import FILES, SOURCE

OLD_RUNS = sorted((Path(__file__).parent / "old_runs").iterdir())
ROOMS = [f for f in FILES if f.startswith(("app/console", "runs/", "server/"))]
ROOMS.remove("runs/metrics.py")
assert all(kind == event.model_fields["kind"].default for kind, event in KINDS.items())
FIELDS = {field for kind in KINDS.values() for field in kind.model_fields}


@pytest.mark.parametrize("run", OLD_RUNS, ids=lambda run: run.name)
def test_lines_that_are_read_are_written_again_to_the_byte(run):
    metrics, timings = (run / name for name in ("metrics.jsonl", "timings.jsonl"))
    assert to_lines(read_lines(metrics.read_bytes(), "metrics")) == metrics.read_bytes()
    assert to_lines(read_timings(timings.read_bytes(), "timings")) == timings.read_bytes()


def test_a_summary_that_is_read_is_written_again_to_the_byte():
    text = (OLD_RUNS[0] / "summary.json").read_text()
    summary = read_record(Summary, json.loads(text), "summary")
    assert json.dumps(summary.as_json(), indent=1) + "\n" == text


def test_a_client_that_was_gone_has_null_for_its_scores():
    text = json.loads((OLD_RUNS[0] / "summary.json").read_text())
    text["clients"]["ann"]["test"] = None
    summary = read_record(Summary, text, "summary")
    assert summary.clients["ann"].test == Score()
    assert summary.as_json() == text


def test_what_is_not_said_is_not_written():
    assert RoundEnd(round=1).as_json() == {"kind": "server", "round": 1, "drift": None}
    assert RoundEnd(round=1, asked=["ann"]).as_json()["asked"] == ["ann"]
    assert Note(message="x").as_json() == {"kind": "note", "message": "x"}
    assert Note(message="x", say=True).as_json()["say"] is True


def test_a_field_of_a_later_version_is_left_out_when_read_and_refused_when_made():
    line = evaluation_of(1, "ann", "valid", "personal") | {"of_tomorrow": 1}
    assert isinstance(read_event(line, "here"), Evaluation)
    with pytest.raises(ValidationError):
        Evaluation(**line)


@pytest.mark.parametrize("field", ["uploaded_bytes", "local_steps", "trained_tokens", "client"])
def test_a_field_that_is_missing_is_named_with_what_was_expected(field):
    line = train_of(1, "ann") | {"uploaded_bytes": 1, "downloaded_bytes": 1}
    assert isinstance(read_event(line, "here"), Train)
    del line[field]
    with pytest.raises(
        UserError, match=rf"^here: {field}: expected a \w+( number)?, found nothing$"
    ):
        read_event(line, "here")


@pytest.mark.parametrize("file", ROOMS)
def test_nobody_else_knows_the_fields_of_a_line(file):
    """A look-up of a field by its text would be a second schema."""
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    looks = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    named = [n.slice.value for n in looks if isinstance(n.slice, ast.Constant)]
    assert not FIELDS.intersection(named), f"{file} reads {FIELDS.intersection(named)}"
