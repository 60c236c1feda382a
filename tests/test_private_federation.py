"""A private run over Flower's carrier: the server's own files have gaps, and a run still ends."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from comigs.federation.device.limits import Limits
from comigs.methods.loading import load_method
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Absent, Evaluation, Kept, Train, Warned
from comigs.runs.report.page import write_report
from comigs.runs.summary import write_summary
from tests.conftest import run_config
from tests.local_grid import Federation, TestTrainer

NAMES = ("ada", "bob")
PRIVACY = {"level": "document", "delta": 1e-3, "expected_batch": 3, "noise_multiplier": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three rounds, of which ada's owner allows two."""
    root = tmp_path_factory.mktemp("private-federation")
    config = run_config(root / "text", privacy=PRIVACY, rounds=3, upload={"format": "int8"})
    federation = Federation(root / "federation", NAMES, root / "text")
    ada = federation.trainers["ada"]
    ada.device = replace(ada.device, limits=Limits(epsilon=6.5))  # at delta 1e-5: 4.5, 6.1, 7.3
    grid = federation.run(root / "run", config)
    return federation, RunFolder.open(root / "run"), b"".join(grid.seen)


def test_the_servers_files_say_what_was_spent_and_nothing_of_the_text(run):
    federation, folder, _ = run
    lines = folder.metrics()
    assert not [line for line in lines if isinstance(line, Evaluation | Kept)]
    trained = [line for line in lines if isinstance(line, Train)]
    assert [(t.client, t.round, t.epsilon) for t in trained if t.client == "ada"] == [
        ("ada", 1, 2.9),
        ("ada", 2, 4.0),
    ]
    for line in trained:
        assert line.train_nats_per_token is None and line.train_nats_per_token_by_step == []
        assert line.trained_tokens == 0 and line.expert_share_by_layer is None
        assert line.uploaded_bytes > 0 and line.local_steps == 2
    timings = [json.loads(x) for x in (folder.path / "timings.jsonl").read_text().splitlines()]
    assert all(timing["seconds"] is None for timing in timings if timing["client"])

    # The devices have it all.
    own = RunFolder.open(federation.device_run("bob")).metrics()
    assert len([line for line in own if isinstance(line, Evaluation) and line.perplexity]) > 3
    assert [line for line in own if isinstance(line, Kept)]


def test_a_device_whose_owner_allows_no_more_is_named_and_the_others_go_on(run):
    federation, folder, seen = run
    absent = [line for line in folder.metrics() if isinstance(line, Absent)]
    assert [(a.client, a.round, a.reason) for a in absent] == [("ada", 3, "privacy budget spent")]
    assert not [line for line in folder.metrics() if isinstance(line, Warned)]
    assert folder.checkpoint().finished and b"--max-epsilon" not in seen
    assert RunFolder.open(federation.device_run("ada")).checkpoint().finished
    assert any("(--max-epsilon)" in line for line in federation.said["ada"])


def test_a_summary_without_figures_is_one_and_so_is_a_report(run, tmp_path):
    _, folder, _ = run
    config = folder.config()
    write_summary(folder, config, load_method(config))
    assert folder.summary().clients["bob"].test.perplexity is None
    page = write_report(folder.path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "whatever counted is (4.9, 0.001)-differentially private" in page
    assert "What was sent later and did not count has spent more" in page


class Heard(TestTrainer):
    """Remembers what it has answered."""

    def __init__(self, *given):
        super().__init__(*given)
        self.answers = []

    def answer(self, raw):
        self.answers.append(super().answer(raw))
        return self.answers[-1]


def heads(root, privacy, replaced=None):
    """All that devices say in a run beside the numbers of tensors, by client; and those numbers.

    replaced: words of ada's, and what she has written instead.
    """
    config = run_config(root / "text", privacy=privacy)
    for path in sorted((root / "text" / "ada").iterdir()) if replaced else ():
        path.write_text(path.read_text().replace(*replaced), encoding="utf-8")
    federation = Federation(root / "federation", NAMES, root / "text", Heard)
    federation.run(root / "run", config)
    said, numbers = {}, {}
    for name, trainer in federation.trainers.items():
        run = federation.device_run(name).name.encode()
        ends = [8 + int.from_bytes(raw[:8], "little") for raw in trainer.answers]
        pairs = list(zip(trainer.answers, ends, strict=True))
        said[name] = [raw[:end].replace(run, b"RUN") for raw, end in pairs]
        numbers[name] = b"".join(raw[end:] for raw, end in pairs)
    return said, numbers


@pytest.mark.parametrize("privacy", [PRIVACY, {}])
def test_what_devices_say_beside_noised_numbers_is_the_same_whatever_their_text(privacy, tmp_path):
    """To the byte: no loss, share or count that depends on it can be in there, as it is without."""
    one, numbers = heads(tmp_path / "one", privacy)
    words = ("engine", "a much longer word, and a second one")
    other, others = heads(tmp_path / "other", privacy, words)
    assert (one["ada"] == other["ada"]) == (privacy == PRIVACY)
    assert [len(said) for said in one.values()] == [3, 3]
    assert numbers["ada"] != others["ada"] and len(numbers["ada"]) == len(others["ada"])
