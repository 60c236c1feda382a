"""Runs that comigs 0.1.0 made, before its rooms were moved, can be read and gone on with.

`tests/old_runs` has two runs of one config: one that is finished, and one stopped after its first
round. The config is of version 1 and says no number of experts, which is comigs-others now; and
it has a setting that was retired since.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from comigs.app import api
from comigs.runs.report.page import write_report

OLD_RUNS = Path(__file__).parent / "old_runs"
CLIENTS = ("ann", "bob")


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """Return a function that copies one of the old runs to where it may be written to."""
    monkeypatch.chdir(tmp_path)  # where the tokens of its text are kept

    def copied(name):
        return Path(shutil.copytree(OLD_RUNS / name, tmp_path / name))

    return copied


def figures(summary):
    """Return the test perplexity and the bytes of each client, and of the base."""
    found = {}
    for name in CLIENTS:
        client = summary["clients"][name]
        found[name] = (client["test"]["perplexity"], client["base_test"]["perplexity"])
        found[f"{name} bytes"] = (client["uploaded_bytes"], client["downloaded_bytes"])
    return found


def test_what_it_measured_is_measured_again(old_run):
    folder = api.open_run(old_run("finished"))
    measured, summary = api.evaluate(folder.path), folder.summary().as_json()
    for name in CLIENTS:
        expected = summary["clients"][name]
        assert measured[name]["personal"]["perplexity"] == pytest.approx(
            expected["test"]["perplexity"], rel=1e-5
        )
        assert measured[name]["base"]["perplexity"] == pytest.approx(
            expected["base_test"]["perplexity"], rel=1e-5
        )


def test_a_stopped_run_goes_on_to_the_same_end(old_run):
    stopped, finished = api.open_run(old_run("stopped")), api.open_run(OLD_RUNS / "finished")
    assert stopped.checkpoint().round == 1
    api.resume(stopped.path)
    ours, theirs = figures(stopped.summary().as_json()), figures(finished.summary().as_json())
    for name, expected in theirs.items():
        assert ours[name] == pytest.approx(expected, rel=1e-5), name


def test_it_is_the_method_that_it_was(old_run):
    config = api.open_run(old_run("finished")).config()
    assert (config.method, config.version) == ("comigs-others", 5)
    assert config.evaluation.keep == "last"


def test_its_report_says_what_it_came_to(old_run):
    page = write_report(old_run("finished")).read_text(encoding="utf-8")
    assert "2 clients" in page and "334" in page and "323" in page  # ann's and bob's perplexity


def test_its_personal_models_write(old_run):
    model = api.open_personal_model(old_run("finished"), "bob")
    text = model.generate("Debian", max_new_tokens=4, temperature=0)
    assert isinstance(text, str) and text
