"""A budget for memory changes how a step is computed, and nothing of what it is."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref

import pytest
import torch

from comigs.app import api, dry_run
from comigs.client import memory
from comigs.client.memory import all_ways, windows_at_once, within_memory
from comigs.client.state import new_train_state
from comigs.client.steps import StepSettings, accumulate, gradients_for
from comigs.config import ClientSection, parse_config
from comigs.data.batches import Batch
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.experts.mixture import Mixture
from comigs.methods.loading import load_method
from comigs.server.validation import shapes_of_clients
from comigs.text import parsed_size
from tests.conftest import random_tensors, run_config, shape_of, tiny
from tests.exports import base_of
from tests.runs import ENVIRONMENT, comigs, refused, write_config


def gradients(base, batch, settings, recompute=False, micro=None):
    """The loss and every gradient of a batch for a client with two experts and a router."""
    with Attachment(base.model, base.architecture, settings, recompute=recompute) as attachment:
        client = ClientSection(micro_batch_size=micro)
        state = new_train_state(random_tensors(attachment, shape_of(1, 1), True), client)
        attachment.bind(state.tensors)
        plan = StepSettings(client, lr=1.0, router_lr=1.0, total_steps=1, dtype=torch.float32)
        with gradients_for(state, ("experts", "router"), lambda slot: True):
            outcome = accumulate(attachment, plan, batch)
            found = {slot: tensor.grad.clone() for slot, tensor in state.tensors.items()}
    return outcome.nats, found


@pytest.mark.parametrize("routing", ["token", "sequence"])
@pytest.mark.parametrize("packed", [False, True], ids=["windows", "several-examples"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_gradients_are_the_same_however_little_is_in_memory(name, packed, routing):
    base, random = tiny(name), torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (4, 21), generator=random).numpy()
    positions = torch.arange(20).remainder(7).expand(4, 20).numpy() if packed else None
    batch = Batch(tokens[:, :-1], tokens[:, 1:], positions)
    settings = run_settings(routing)
    before = set(vars(base.model.get_submodule(base.architecture.blocks)[0]))
    nats, exact = gradients(base, batch, settings)
    for recompute, micro in ((True, None), (False, 1), (True, 3)):
        again, found = gradients(base, batch, settings, recompute, micro)
        assert again == pytest.approx(nats, rel=1e-6)
        for slot, gradient in exact.items():
            assert (found[slot] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-9, slot
    # And the blocks are the base's own again.
    assert set(vars(base.model.get_submodule(base.architecture.blocks)[0])) == before


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_after_a_step_nothing_is_left_of_blocks_that_were_computed_again(name, monkeypatch):
    """A mixture remembers its decision, which came of what the block read."""
    base, read, own = tiny(name), [], Mixture.forward

    def forward(mixture, x):
        read.append(weakref.ref(x.untyped_storage()))
        return own(mixture, x)

    monkeypatch.setattr(Mixture, "forward", forward)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (4, 21), generator=random).numpy()
    with Attachment(base.model, base.architecture, run_settings("token"), recompute=True) as at:
        client = ClientSection()
        state = new_train_state(random_tensors(at, shape_of(1, 1), True), client)
        at.bind(state.tensors)
        plan = StepSettings(client, lr=1.0, router_lr=1.0, total_steps=1, dtype=torch.float32)
        with gradients_for(state, ("experts", "router"), lambda slot: True):
            accumulate(at, plan, Batch(tokens[:, :-1], tokens[:, 1:]))
            assert all(mixture.routing is not None for mixture in at.mixtures)
            assert len(read) == 2 * len(at.mixtures)
            assert [of() for of in read] == [None] * len(read)


def run_settings(routing):
    config = parse_config(
        {"experts": {"routing": routing}, "clients": [{"name": "a", "text": "a"}]}
    )
    return config.experts


def prepared(**tree):
    """A config of mini, the base, and experts attached to it."""
    base = {"name": "mini", "dtype": "float32", "device": "cpu", **tree.pop("base", {})}
    config = parse_config({
        "base": base, "method": "local", "clients": [{"name": "ann", "text": "ann"}], **tree,
    })  # fmt: skip
    found = tiny("mini")
    attachment = Attachment(found.model, found.architecture, config.experts)
    return config, found, shapes_of_clients(config, load_method(config), attachment), attachment


def test_each_choice_needs_less_than_the_one_before_it(monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda: 0)
    config, *place = prepared(client={"batch_size": 12, "micro_batch_size": 8})
    ways = all_ways(config, *place)
    assert windows_at_once(ways[0].config) == 8 and not ways[0].config.base.recompute
    assert windows_at_once(ways[-1].config) == 1 and ways[-1].config.base.recompute
    needs = [way.needed for way in ways]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)


def test_the_first_choice_below_the_budget_is_taken_and_the_smallest_named(monkeypatch):
    monkeypatch.setattr(memory, "peak_memory", lambda: 0)
    free, *place = prepared(client={"batch_size": 16})
    assert within_memory(free, *place) is None
    config = parse_config(
        {**free.model_dump(mode="json"), "base": {"name": "mini", "memory": "9GB"}}
    )
    ways = all_ways(config, *place)
    for number in (0, 1, len(ways) - 1):
        section = config.base.model_copy(update={"memory": ways[number].budget})
        taken = within_memory(config.model_copy(update={"base": section}), *place)
        assert taken.needed <= parsed_size(ways[number].budget)
        assert windows_at_once(taken.config) >= windows_at_once(ways[number].config)
    small = config.base.model_copy(update={"memory": "20MB"})
    with pytest.raises(UserError, match=r'given "20MB", .* the smallest that would do') as raised:
        within_memory(config.model_copy(update={"base": small}), *place)
    assert f'"{ways[-1].budget}"' in str(raised.value)


def test_a_run_within_a_budget_makes_the_same_model(tmp_path, monkeypatch):
    """The last one's budget leaves it nothing but one window at once."""
    monkeypatch.setattr(memory, "peak_memory", lambda: 0)
    texts, models = tmp_path / "texts", []
    for micro, base in (
        (None, {}),
        (None, {"recompute": True}),
        (3, {}),
        (None, {"memory": "9GB"}),
    ):
        if "memory" in base:
            monkeypatch.setattr(dry_run, "within_memory", lambda *place: all_ways(*place)[-1])
        tree = {"base": {"name": "tiny-llama", **base}, "client": {"micro_batch_size": micro}}
        folder = api.run(run_config(texts, "ada", **tree), tmp_path / f"run{len(models)}")
        models.append(folder.load("clients/ada/personal"))
    chosen = folder.config()
    assert windows_at_once(chosen) == 1 and chosen.base.memory == "9GB"
    for other in models[1:]:
        for name, tensor in models[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


RUN = """
import atexit
from comigs.app.cli import main
from comigs.processes import peak_memory
atexit.register(lambda: print("peak", peak_memory()))
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["whole", "int4"])
def test_a_whole_command_stays_below_the_smallest_budget_that_it_names(tmp_path, weights):
    """With its report, which is drawn at the end."""
    config, named = write_config(tmp_path), "50MB"
    for code in (2, 0):
        sets = [f"base.name={base_of('llama')}", f"base.weights={weights}", f"base.memory={named}",
                "data.sequence_length=16"]  # fmt: skip
        words = [word for text in sets for word in ("--set", text)]
        done = subprocess.run(
            [sys.executable, "-c", RUN, "run", config, "--out", tmp_path / "run", *words],
            capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code:
            named = re.search(r'the smallest that would do is "([^"]+)"', done.stderr)[1]
    peak = int(re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)[1])
    assert (tmp_path / "run/report.html").exists() and peak <= parsed_size(named)


def test_a_budget_below_what_is_possible_is_refused_in_one_line(tmp_path, capsys):
    config = write_config(tmp_path)
    line = refused(capsys, "run", config, "--set", "base.memory=90MB", "--out", tmp_path / "run")
    assert 'base.memory: given "90MB"' in line and 'the smallest that would do is "' in line
    assert not (tmp_path / "run").exists()
    assert "is no size; allowed: a number of kB, MB, GB, KiB, MiB or GiB" in refused(
        capsys, "run", config, "--set", "base.memory=much", "--out", tmp_path / "run"
    )


def test_a_dry_run_shows_what_less_memory_costs(tmp_path, capsys):
    done = comigs(capsys, "run", write_config(tmp_path), "--dry-run", "--set", "base.memory=9GB")
    assert done.code == 0
    for words in ("base.memory", "relative speed", "2 windows at once", "1.00"):
        assert words in done.out
    assert "of the 9GB allowed" in done.err + done.out


def test_a_dry_run_names_budgets_by_which_a_run_chooses(tmp_path, capsys, monkeypatch):
    """What the dry run itself leaves in memory is none of the run's."""
    left, timed = [], dry_run.measured_throughput

    def heavy(*place):
        left.append(torch.ones(1 << 27))  # half a gigabyte
        return timed(*place)

    monkeypatch.setattr(dry_run, "measured_throughput", heavy)
    done = comigs(capsys, "run", write_config(tmp_path), "--dry-run", "--set", "base.memory=9GB")
    chosen = re.search(r"about ([\d.]+ [MG]B) of the 9GB allowed", done.err + done.out)
    named = re.findall(r"([\d.]+GB) +\d+ windows? at once", done.out)
    assert parsed_size(named[0]) == pytest.approx(parsed_size(chosen[1]), abs=1e8)
    # A budget that is named twice, or a second figure for what was chosen, would tell nothing.
    assert len(set(named)) == len(named) and "at its peak" not in done.out


@pytest.mark.parametrize(
    ("text", "bytes"), [("1.5GB", 1.5e9), ("900 MB", 9e8), ("64kB", 64e3), ("1.5", None),
                        ("1gb", 1e9), ("1.5GiB", 1.5 * 2**30), ("2 mib", 2**21),
                        ("GB", None), ("-1GB", None), ("1TB", None)],
)  # fmt: skip
def test_sizes_are_read(text, bytes):
    assert parsed_size(text) == bytes
