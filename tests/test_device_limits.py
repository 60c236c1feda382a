"""A lying server: a device does nothing that it cannot afford, nothing that its owner did not say,
and nothing outside its own folder.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import psutil
import pytest
import torch

from comigs.bases.load import load_base
from comigs.client.estimate import Throughput
from comigs.client.workplace import workplace
from comigs.config import BaseSection, Config
from comigs.errors import UserError
from comigs.federation.device import device_service
from comigs.federation.device.limits import DEFAULTS, REAL, SETTABLE, Limits, Work
from comigs.federation.messages import LARGEST, UPLOADS, Answered, config_for
from comigs.federation.operator.admin import pin
from comigs.methods.loading import list_methods, load_method, method_module
from comigs.processes import peak_memory
from comigs.runs.folder import RunFolder
from comigs.server import wire
from comigs.slots import Slot
from comigs.text import CONTROL
from tests.device import Setting, lying, opened
from tests.exports import base_of

GRACE = 150e6  # bytes beside what the process has


def numbers(schema, definitions, path=""):
    """Every field of a JSON schema that holds a number, or several, as section.key."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if schema.get("type") in ("integer", "number"):
        yield path
    inner = [*schema.get("anyOf", ()), *schema.get("allOf", ()), *schema.get("prefixItems", ())]
    for kind in ("items", "additionalProperties"):
        if isinstance(schema.get(kind), dict):
            inner.append(schema[kind])
    for one in inner:
        yield from numbers(one, definitions, path)
    for key, below in schema.get("properties", {}).items():
        yield from numbers(below, definitions, f"{path}.{key}".lstrip("."))


def numeric(section):
    schema = section.model_json_schema()
    return sorted(set(numbers(schema, schema.get("$defs", {}))))


# Groups and clients of [conditions] have the same numbers as the section, and names of their own.
NAMED = ("options", "conditions.groups.", "conditions.clients.")
NUMERIC = [field for field in numeric(Config) if not field.startswith(NAMED)]
OPTIONS = sorted(
    (method, field)
    for method in list_methods()
    if hasattr(method_module(method), "Options")
    for field in numeric(method_module(method).Options)
)
OWN = {"version", "workers", "base.threads", "privacy.noise_seed"}  # a server is not heard here
OWNERS = ("participation.", "conditions.", "track.")
OWN |= {field for field in NUMERIC if field.startswith(OWNERS)}


def told(setting, field, value):
    """What the server says of a config, with another value of a field."""
    tree = config_for(setting.config, "ada")
    *sections, key = field.split(".")
    section = tree
    for name in sections:
        section = section[name][0] if name == "clients" else section.setdefault(name, {})
    section[key] = [value, 0.9] if field == "client.betas" else value
    return tree


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """A device that allows hardly more than it has, and three seconds."""
    memory = psutil.Process().memory_info().rss + GRACE
    limits = Limits(memory=memory, minutes=0.05)
    setting = Setting(tmp_path_factory.mktemp("poor"), device={"limits": limits})
    setting.ask(run="warm-run-01234567")
    return setting


def test_there_are_numbers_to_hold():
    assert {"experts.rank", "client.betas", "clients.weight", "seed"} <= set(NUMERIC)
    assert ("comigs", "probe_windows") in OPTIONS and len(NUMERIC) > 35


def test_every_field_is_either_the_servers_or_the_owners():
    """Who adds a field to the config decides here, for numbers in SETTABLE with a bound."""
    owners = OWN | {
        "base.device",
        "base.memory",
        "base.chat_template",
        "data.root",
        "data.cache",
        "clients.text",
        "options",
    }
    owners |= {field for field, _ in _flat(DEFAULTS) if field.startswith(OWNERS)}
    assert {field for field, _ in _flat(DEFAULTS)} - owners == SETTABLE.keys() - owners


@pytest.mark.parametrize("field", NUMERIC)
def test_every_number_has_a_bound_or_is_the_owners(poor, field):
    """A field that is new in the config is refused until somebody has thought about its bound."""
    default = dict(_flat(DEFAULTS))[field]
    beyond = (default or 1) + 1 if field in OWN else 1e31
    if field not in OWN and field in SETTABLE and isinstance(SETTABLE[field], int):
        beyond = SETTABLE[field] + 1
    assert (field in OWN) == (field not in SETTABLE)
    assert field in OWN or SETTABLE[field] is not None
    assert poor.refused(config=told(poor, field, beyond)) == "refused"
    assert field.rpartition(".")[2] in poor.said[-1]
    if field not in OWN:
        assert "allow" in poor.said[-1] or "must be" in poor.said[-1], poor.said[-1]


def _flat(config, prefix=""):
    for key, value in config.model_dump().items():
        value = value[0] if key == "clients" else value
        for inner in value.items() if isinstance(value, dict) else [("", value)]:
            yield f"{key}.{inner[0]}".strip("."), inner[1]


@pytest.mark.parametrize("field", [field for field in NUMERIC if field not in OWN])
def test_the_most_that_is_allowed_costs_no_more_than_the_owner_gives(poor, field):
    """Whether it is refused or done: memory and time stay what they were."""
    most = SETTABLE[field]
    most = 0.99 if most == 1 else most
    affordable(poor, told(poor, field, most))


def affordable(setting, config, run="run-of-the-most", **request):
    peak, began = peak_memory(), time.monotonic()
    raw = setting.trainer.answer(setting.request(config=config, run=run, **request))
    head, _ = opened(raw)
    assert time.monotonic() - began < 60
    grown = peak_memory() - peak
    assert grown < 1.5 * GRACE
    assert isinstance(head, Answered) or head.code in {"memory", "time", "refused", "not-ready"} | {
        "loss"
    }, setting.said[-1]
    assert head.kind == "answered" or "\n" not in setting.said[-1]
    return getattr(head, "code", "answered")


@pytest.mark.parametrize(("method", "option"), OPTIONS)
def test_options_of_methods_are_held_likewise(poor, method, option):
    tree = config_for(poor.config, "ada") | {"method": method}
    for value in (LARGEST, LARGEST + 1):
        affordable(poor, tree | {"options": {option: value}}, train=False, round=3, after=0)
    assert poor.refused(config=tree | {"options": {option: 10 * REAL}}) == "refused"


TOO_LARGE = {  # fields at once -> the code, and what the owner reads
    "a batch": ({"client.batch_size": 10**6}, "memory", "asked for: client.batch_size 1,000,000"),
    "an evaluation": ({"evaluation.batch_size": 10**6}, "memory", "evaluation.batch_size"),
    "ranks": ({"experts.rank": 60_000}, "memory", "of memory on cpu, but "),
    "experts": (
        {"experts.specialists": 256, "experts.rank": 4096},
        "memory",
        "experts.specialists 256, experts.rank 4,096",
    ),
    "steps": ({"client.steps": 10**6}, "time", "minutes are allowed (--max-minutes)"),
    "small pieces": ({"client.batch_size": 10**5, "client.micro_batch_size": 1}, "time", "about"),
    "router steps": (
        {"client.router_every": 1, "client.router_steps": 10**6},
        "time",
        "client.router_steps 1,000,000",
    ),
    "windows": ({"data.sequence_length": 10**6}, "not-ready", "reads at most 64 tokens at once"),
}


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_is_too_large_is_refused_with_the_estimate(poor, what):
    fields, code, line = TOO_LARGE[what]
    tree = config_for(poor.config, "ada")
    for field, value in fields.items():
        section, key = field.split(".")
        tree[section] = tree[section] | {key: value}
    assert affordable(poor, tree, "run-too-large") == code
    assert line in poor.said[-1]
    assert not (poor.device.home / "runs" / "run-too-large").exists()


def test_by_default_a_device_allows_most_of_what_is_free_and_two_hours():
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    allowed = Limits().allowed_memory(torch.device("cpu"))
    assert 0.7 < allowed / free < 0.9 and Limits().minutes == 120


@pytest.mark.parametrize("field", ["memory", "minutes", "epsilon"])
@pytest.mark.parametrize("given", [math.nan, math.inf])
def test_a_limit_that_limits_nothing_is_refused(field, given):
    with pytest.raises(UserError, match=f"--max-{field}: given {given}; must be a finite number"):
        Limits(**{field: given})


def test_a_disk_is_never_filled(tmp_path, monkeypatch):
    setting = Setting(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    assert setting.refused() == "disk"
    assert "are allowed in" in setting.said[-1] and "half of what is free" in setting.said[-1]
    assert not list((setting.device.home / "runs").iterdir())


def test_splits_without_end_fill_no_disk(tmp_path):
    """A server says how text is split; each split has tokens of its own in the cache."""
    setting = Setting(tmp_path)
    for number in range(3):
        config = told(setting, "data.train_share", 1 - number / 10)
        head, _ = setting.ask(config=config, run=f"{number}-run-01234567")
        assert head.kind == "answered"
        assert len(list((setting.device.home / "cache").glob("*/tokens.bin"))) == 3
    assert setting.ask(config=told(setting, "data.train_share", 1.0))[0].kind == "answered"


@pytest.mark.parametrize("method", ["comigs", "fedavg", "fdlora", "flora"])
def test_the_time_counts_every_step_and_token_of_a_request(tmp_path, method):
    """What is estimated is what the reply says was done, and what weighing takes besides."""
    client = {"steps": 5, "router_every": 2, "router_steps": 3}
    setting = Setting(tmp_path, method=method, client=client)
    for round in (1, 2, 3):
        request, _ = wire.unpack(setting.request(round), device_service.messages.REQUESTS, 1 << 24)
        config, plan = setting.trainer._plan(request)
        base = setting.trainer._base_for(config.base, request.base)
        place = workplace(config, plan, base)
        data = setting.trainer._data_for(device_service._resolved(config, base), base)
        work = Work(request, place, 0)
        steps = work.seconds(Throughput(1.0, 0.0), data)
        tokens = work.seconds(Throughput(0.0, 1.0), data)
        place.attachment.detach()
        head, _ = setting.ask(round)
        done = sum(
            m["local_steps"] + m["router_steps"] for m in head.metrics if m["kind"] == "train"
        )
        read = sum(m["tokens"] for m in head.metrics if m["kind"] == "evaluation")
        # Phases begin wherever an earlier round ended, so one more may be counted than is done.
        assert done <= steps <= done + client["router_steps"]
        looks = 0 if plan.mix is None else plan.looks
        weighed = looks * plan.probe * config.data.sequence_length
        if plan.finish is not None and round == 3:
            # an earlier round's model may be finished, too, and then both are compared
            weighed += (2 * plan.last_looks + 1) * sum(store.num_tokens for store in data.valid)
        weighed += sum(m["tokens"] for m in head.metrics if m["kind"] == "kept")
        assert 0 <= tokens - read - weighed <= 3 * len(head.metrics)  # a text's first is no target


@pytest.mark.parametrize("method", list_methods())
def test_a_method_looks_no_more_often_than_it_says(tmp_path, method):
    setting = Setting(tmp_path)
    options = {"evaluations": 6} if method == "fdlora" else {}
    config = setting.config.model_copy(update={"method": method, "options": options})
    plan = load_method(config)
    slots = {Slot(0, "up", part, m): torch.randn(2, 2) for part in ("g0", "s0") for m in "AB"}
    if plan.shape(config.shape_of(config.clients[0])).others != "none":
        slots |= {replace(s, part="rest"): t for s, t in slots.items() if s.part == "g0"}
        slots[Slot(0, "mlp", "router", "B")] = torch.ones(1)
    counts = {"mix": 0, "finish": 0}
    values = iter([3.0, 1.0, 2.5] + [1.1, 0.7] * 50)

    def counting(what):
        def nats(tensors):
            counts[what] += 1
            return next(values)

        return nats

    if plan.mix is not None:
        download = {slot: tensor + 1 for slot, tensor in slots.items() if slot.part == "g0"}
        plan.mix(slots, download, counting("mix"))
    if plan.finish is not None:
        plan.finish(slots, counting("finish"))
    assert counts == {"mix": plan.looks, "finish": plan.last_looks}


# Whose base


@pytest.fixture
def pinned(tmp_path):
    base = BaseSection(name="tiny-gpt2", dtype="float32", device="cpu")
    return Setting(tmp_path, device={"pinned": pin(base)})


def test_a_device_whose_bundle_pins_packed_weights_holds_them_so(tmp_path):
    base = {"name": str(base_of("llama")), "weights": "int4"}
    setting = Setting(tmp_path, base=base)
    setting.device = replace(setting.device, base=base["name"], pinned=pin(setting.config.base))
    setting.trainer = setting.restarted()
    assert isinstance(setting.ask(1)[0], Answered)
    tree = config_for(setting.config, "ada")
    tree["base"]["weights"] = "int8"
    assert setting.refused(config=tree) == "base"
    assert 'base.weights: given "int8", but pinned is "int4"' in setting.said[-1]


def test_a_pinned_base_is_used_and_no_other_is_looked_for(pinned, monkeypatch):
    assert isinstance(pinned.ask(1)[0], Answered)
    monkeypatch.setattr(device_service, "load_base", lambda section: pytest.fail("it was loaded"))
    pinned.trainer = pinned.restarted()
    base = config_for(pinned.config, "ada")["base"]
    for change in ({"name": "tiny-llama"}, {"name": "org/model"}, {"dtype": "float64"},
                   {"name": str(pinned.root)}, {"tokenizer": "gpt-2"}):  # fmt: skip
        tree = config_for(pinned.config, "ada") | {"base": base | change}
        assert pinned.refused(config=tree) == "base"
        assert "but pinned is" in pinned.said[-1] and "this device's bundle" in pinned.said[-1]
    assert pinned.refused(base="0" * 64) == "base"
    assert "other weights than those that are pinned" in pinned.said[-1]


def test_without_a_pin_only_what_comes_with_comigs_or_the_owner_names(tmp_path, monkeypatch):
    setting = Setting(tmp_path)
    assert isinstance(setting.ask(1)[0], Answered)
    monkeypatch.setattr(device_service, "load_base", lambda section: pytest.fail("it was loaded"))
    setting.trainer = setting.restarted()
    base = config_for(setting.config, "ada")["base"]
    for name in ("org/model", str(tmp_path), "../model", "mini2"):
        tree = config_for(setting.config, "ada") | {"base": base | {"name": name}}
        assert setting.refused(config=tree) == "base"
        assert "which neither the bundle nor you name" in setting.said[-1]


def test_the_owners_copy_is_loaded_whatever_the_server_calls_it(tmp_path):
    folder = tmp_path / "copy"
    own = load_base(BaseSection(name="tiny-gpt2", dtype="float32", device="cpu"))
    own.model.save_pretrained(folder)
    own.tokenizer.save_pretrained(folder)
    setting = Setting(tmp_path, device={"base": str(folder)})
    base = config_for(setting.config, "ada")["base"] | {"name": "org/model"}
    head, _ = setting.ask(config=config_for(setting.config, "ada") | {"base": base})
    assert isinstance(head, Answered)
    assert RunFolder.open(setting.folder).config().base.name == str(folder)


# What else it may say


def test_what_is_the_owners_cannot_be_set(poor):
    for field, value in {
        "data.root": "/", "data.cache": "/tmp/elsewhere", "base.device": "cuda:1",
        "participation.late": "discount", "track.to": ["tensorboard"], "clients.text": "/etc",
        "workers": 2,
    }.items():  # fmt: skip
        assert poor.refused(config=told(poor, field, value)) == "refused"
        assert f"{field}: given " in poor.said[-1] and "decides that itself" in poor.said[-1]


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 10**6 + 1, "train": False},
        {"round": 4, "train": False},
        {"round": 1, "after": 2},
        {"round": 1, "since": 2},
        {"kind": "probe", "round": 3, "train": False},
    ],
)
def test_rounds_that_a_run_does_not_have_are_refused(poor, changes):
    given = {"after": 0, "since": 0, "train": True}
    assert poor.refused(**{**given, **changes}) == "refused"
    assert "the server asked for round" in poor.said[-1]


@pytest.mark.parametrize("field", ["round", "after", "since", "probed"])
def test_numbers_of_a_request_itself_have_a_bound(poor, field):
    raw = lying(poor.request(), **{field: LARGEST + UPLOADS})
    assert opened(poor.trainer.answer(raw))[0].code == "unreadable"


STRANGE = "\x1b]0;owned\x07\x1b[2Jevil\r\n\u202e" + "x" * 5000


@pytest.mark.parametrize("field", ["method", "name", "base.name", "base.dtype", "clients.name"])
def test_what_a_server_says_is_shown_as_one_short_line(poor, field):
    before = len(poor.said)
    assert poor.refused(config=told(poor, field, STRANGE)) in ("refused", "base")
    tree = config_for(poor.config, "ada")
    assert poor.refused(config=tree | {STRANGE: 1}) == "refused"
    assert poor.refused(config=tree | {"options": {STRANGE: 1}}) == "refused"
    poor.refused(comigs="1.\x1b[2J\u202e")
    for line in poor.said[before:]:
        assert not CONTROL.search(line) and "\n" not in line and len(line) <= 500
    assert len(poor.said) == before + 4


def test_others_uploads_are_held_to_what_a_client_may_receive(tmp_path):
    """In a probe, too: nobody measures a router or specialists of their own here."""
    setting = Setting(tmp_path, method="pcl")
    _, tensors = setting.ask(1)
    for name in ("0.up.s0.A", "0.mlp.router.W", "0.up.g0.A"):
        peers = {f"0/{slot}": tensor for slot, tensor in tensors.items()}
        peers[f"0/{name}"] = torch.ones(7, 7)
        head, _ = wire.unpack(
            setting.request(1, kind="probe", train=False, after=1, probed=1),
            device_service.messages.REQUESTS,
            1 << 24,
        )
        answer, _ = opened(setting.trainer.answer(wire.pack(head, peers)))
        assert (answer.code, answer.error) == ("failed", "AssertionError")
