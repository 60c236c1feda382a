"""What a run will take is said before it starts, and is about what it takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from comigs import load_config
from comigs.app import dry_run
from comigs.bases.load import load_base
from comigs.client import estimate
from comigs.config import SPLITS
from comigs.data.prepare import prepare
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.methods.loading import load_method
from comigs.server.validation import shapes_of_clients
from tests.runs import ENVIRONMENT, comigs, files, refused, write_config

MEASURE = """
import sys
from comigs.client import estimate
from comigs.config import SPLITS
from comigs.bases.load import load_base
from comigs.config import parse_config
from comigs.server.validation import shapes_of_clients
from comigs.processes import peak_memory
from comigs.experts.attach import Attachment
from comigs.methods.loading import load_method
windows, length, specialists, rank, measured = map(int, sys.argv[1:])
config = parse_config({
    "base": {"name": "mini", "device": "cpu"}, "data": {"sequence_length": length},
    "experts": {"specialists": specialists, "rank": rank}, "client": {"batch_size": windows},
    "evaluation": {"batch_size": measured},
    "clients": [{"name": "ann", "text": "ann"}],
})
base = load_base(config.base)
with Attachment(base.model, base.architecture, config.experts) as attachment:
    shapes = shapes_of_clients(config, load_method(config), attachment)
    needed = estimate.memory_needed(config, base, shapes, attachment)
    estimate.measured_throughput(config, base, shapes, attachment)
print(needed, peak_memory())
"""


@pytest.mark.parametrize(
    "shape",
    [
        (4, 128, 1, 8, 4),
        (24, 128, 1, 8, 24),
        (8, 256, 3, 8, 8),
        (2, 128, 1, 1500, 2),
        (1, 128, 1, 8, 256),
    ],
)
@pytest.mark.slow  # a process each
def test_the_memory_said_is_about_the_memory_taken(shape):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, shape)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=True,
    )
    said, taken = map(float, done.stdout.split())
    assert 0.75 < said / taken < 1.5


def test_a_run_that_does_not_fit_is_refused_before_it_starts():
    there = estimate.available_memory(torch.device("cpu"))
    dry_run.require_memory(there * 0.5, torch.device("cpu"))
    with pytest.raises(UserError, match=r"needs about .* but cpu has .* client.micro_batch_size"):
        dry_run.require_memory(there * 10.0, torch.device("cpu"))


def test_time_counts_every_step_and_every_token_evaluated(tmp_path):
    config = load_config(
        write_config(tmp_path, rounds=6),
        ["evaluation.every=2", f'data.cache="{tmp_path / "cache"}"'],
    )
    base, method = load_base(config.base), load_method(config)
    texts = prepare(config, base.encoder)
    speed = estimate.Throughput(step_seconds=1.0, evaluation_seconds=0.0)
    tokens = {}
    for name, outline in texts.outlines().items():
        tokens[name] = {split: getattr(outline, split)[0].num_bytes for split in SPLITS}
    # 6 rounds of 2 steps, a router step after every 3 steps, two clients
    assert dry_run.run_seconds(config, method, (), speed, tokens) == 2 * (12 + 4)
    speed = estimate.Throughput(step_seconds=0.0, evaluation_seconds=1.0)
    valid, test = (sum(own[split] for own in tokens.values()) for split in ("valid", "test"))
    # the base: valid and test; after rounds 2, 4 and 6: valid; at the end: test, which may be
    # measured again of the best round, and valid of each part alone, of both, which are compared;
    # each download on a few windows
    weighed = 2 * 7 * method.looks * method.probe * config.data.sequence_length
    assert method.looks and method.last_looks
    assert dry_run.run_seconds(config, method, (), speed, tokens) == pytest.approx(
        (5 + 2 * method.last_looks) * valid + 3 * test + weighed
    )


def test_a_dry_run_says_what_a_run_takes_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    done = comigs(capsys, "run", "tiny.toml", "--dry-run")
    assert done.code == 0
    for said in ("ann", "bob", "memory", "about", "a local step", "trained"):
        assert said in done.out
    assert not (tmp_path / "runs").exists()


def test_too_little_memory_is_one_line_and_no_run_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(estimate, "TRAINED", 1e15)  # a machine that is too small for any run
    assert "memory: this run needs about " in refused(capsys, "run", "tiny.toml")
    assert {name: raw for name, raw in files(tmp_path).items() if "cache" not in name} == before


def test_the_largest_client_decides(tmp_path):
    config = load_config(
        write_config(tmp_path), ["clients.bob.specialists=4", "clients.bob.specialist_rank=500"]
    )
    small = load_config(tmp_path / "tiny.toml")
    base = load_base(config.base)
    with Attachment(base.model, base.architecture, config.experts) as attachment:
        needs = [
            estimate.memory_needed(
                c, base, shapes_of_clients(c, load_method(c), attachment), attachment
            )
            for c in (small, config)
        ]
    assert needs[0] + 1e6 < needs[1]
