"""Every setting is read, refused or noted: nothing that is given is passed over in silence."""

from __future__ import annotations

import copy
import functools

import pytest

from comigs.app import api
from comigs.config import SECTIONS, parse_config
from comigs.errors import UserError
from comigs.methods.loading import list_methods, load_method
from comigs.methods.readers import OF_CLIENTS, READERS, unread
from tests.chats import PLAIN, questions, write_lines
from tests.conftest import run_config

CHATS = {"clients.ada.text": "chats.jsonl", "base.chat_template": PLAIN, "data.sequence_length": 40}
OTHERS = {  # a field -> another value than a run here has, and what else must be so for it to count
    "seed": (3, {}),
    "method": ("fedavg", {}),
    "rounds": (3, {}),
    "options": ({"adopt": "all"}, {}),
    "base.name": ("tiny-llama", {}),
    "base.dtype": ("bfloat16", {}),
    "base.weights": ("int4", {}),
    "base.tokenizer": ("gpt-2", {}),
    "base.chat_template": (PLAIN.replace(":", ">"), CHATS),
    "data.sequence_length": (9, {}),
    "data.loss": ("all", CHATS),
    "data.distribution": ("out", {}),
    "data.valid_fraction": (0.4, {}),
    "data.test_fraction": (0.4, {}),
    "data.short_repeat": (100_000, {"clients.ada.text": "bob"}),
    "data.train_share": (0.5, {}),
    "data.valid_share": (0.5, {}),
    "experts.generalists": (2, {}),
    "experts.specialists": (2, {}),
    "experts.rank": (3, {}),
    "experts.specialist_rank": (3, {}),
    "experts.attention_rank": (3, {}),
    "experts.share_attention": (False, {}),
    "experts.alpha": (3.0, {}),
    "experts.scaling": ("lora", {}),
    "experts.strength": ("each", {"method": "pfedmoe"}),
    "experts.top_k": (1, {}),
    "experts.routing": ("sequence", {}),
    "experts.router_start": (0.5, {}),
    "client.steps": (3, {}),
    "client.batch_size": (3, {}),
    "client.lr": (1e-3, {}),
    "client.router_lr": (1e-2, {}),
    "client.weight_decay": (0.5, {}),
    "client.betas": ((0.5, 0.5), {}),
    "client.router_every": (1, {}),
    "client.router_steps": (1, {}),
    "client.router_data": ("train", {}),
    "client.prior_coef": (30.0, {"clients.ada.router_data": "prior"}),
    "client.folds": (2, {"client.router_data": "crossfit"}),
    "client.balance_coef": (1.0, {}),
    "client.generalist_share": (0.9, {}),
    "evaluation.every": (2, {}),
    "evaluation.splits": (("train", "valid"), {}),
    "evaluation.keep": ("last", {}),
    "participation.clients_per_round": (1, {}),
    "upload.format": ("int8", {}),
    "upload.merge": ("median", {}),
    "upload.trim": (0.4, {"upload.merge": "trimmed", "method": "fedavg"}),
    "upload.max_norm": (1e-6, {}),
    "upload.max_norm_ratio": (1.0001, {}),
    "conditions": ({"clients": {"ada": {"dropout": 1}}}, {}),
    "clients.ada.text": ("bob", {}),
    "clients.ada.specialists": (2, {}),
    "clients.ada.rank": (3, {"method": "flora"}),
    "clients.ada.specialist_rank": (3, {}),
    "clients.ada.router_data": ("entropy", {}),
    "clients.ada.weight": (3.0, {"method": "flexlora"}),
}
HOW = {  # how, where or under which name a run is made, which is to change no figure
    "version", "name", "workers", "base.attention", "base.device", "base.threads", "base.memory",
    "base.recompute", "data.root",
    "data.cache", "client.micro_batch_size", "evaluation.batch_size", "clients.ada.name",
    "track.to", "track.names",
}  # fmt: skip
ABSENCE = {  # what tests/test_missing_clients.py and tests/test_flower_engine.py are about
    "participation.deadline": 7.0,
    "participation.late": "discount",
    "participation.late_discount": 0.1,
    "participation.max_failures": 1,
    "participation.min_clients": 3,
}
PRIVACY = {  # what tests/test_private_*.py and test_sums.py are about
    "privacy.level", "privacy.epsilon", "privacy.noise_multiplier", "privacy.delta", "privacy.clip",
    "privacy.expected_batch", "privacy.noise_seed", "privacy.secure_aggregation",
    "privacy.threshold",
}  # fmt: skip
ENTRY = {"ada": {"weight": 1.0}, "bob": {"weight": 1.0}, "cyd": {"weight": 1.0}}


@functools.cache
def usual_tree(root):
    """Return the usual run's config as plain values; its text is written once."""
    write_lines(root / "chats.jsonl", questions(60))
    return run_config(root, "ada bob cyd", ENTRY).model_dump(mode="json")


def config_with(root, **fields):
    """Return the config of a small run with these fields by their addresses."""
    plain = copy.deepcopy(usual_tree(root))
    for address, value in fields.items():
        *parents, last = address.split(".")
        node = plain
        for key in parents:
            node = node[0] if key == "ada" else node[key]
        node[last] = value
    return parse_config(plain)


def figures(config, folder):
    """Return everything that a run measured and made, or the line that refuses it."""
    try:
        api.run(config, folder)
    except UserError as refused:
        return str(refused).replace(str(folder), "")
    made = sorted(folder.rglob("*.safetensors"))
    return [(folder / "metrics.jsonl").read_bytes(), *[file.read_bytes() for file in made]]


def given(field):
    """Return another value of a field as `config_with` takes it."""
    value = OTHERS[field][0] if field in OTHERS else ABSENCE[field]
    return {field: list(value) if isinstance(value, tuple) else value}


def test_every_field_is_in_the_table_and_is_tried():
    fields = set()
    for name, section in SECTIONS.items():
        for key in section.model_fields:
            whole = name.startswith("conditions")  # it counts as one field
            if name not in ("clients", "clients.text") and key not in SECTIONS and not whole:
                fields.add(f"{name}.{key}".removeprefix("."))
    fields.add("conditions")
    assert fields == set(READERS)
    assert set(SECTIONS["clients"].model_fields) == set(OF_CLIENTS)
    tried = {*OTHERS, *HOW, *ABSENCE, *PRIVACY}
    assert fields | {f"clients.ada.{key}" for key in OF_CLIENTS} == tried


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Return what runs measured, by what makes them differ from the usual run; each is run once."""
    known, root = {}, tmp_path_factory.mktemp("usual")

    def run(**fields):
        key = repr(sorted(fields.items()))
        if key not in known:
            known[key] = figures(config_with(root / "text", **fields), root / str(len(known)))
        return known[key]

    return run


@pytest.mark.slow  # a run for each of forty fields
@pytest.mark.parametrize("field", OTHERS)
def test_what_is_not_noted_makes_another_run_or_is_refused(usual, field):
    if field == "options":
        pytest.skip("an unknown option is refused: tests/test_methods.py")
    around = OTHERS[field][1]
    assert usual(**{**around, **given(field)}) != usual(**around)


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.few(4)
def test_what_is_noted_has_no_effect(usual, tmp_path_factory, method):
    """All that a method does not read, changed at once, gives the same run to the bit."""
    noted, root = {}, tmp_path_factory.getbasetemp() / "noted"
    for field in (*OTHERS, *ABSENCE):
        if field in ("method", "clients.ada.text", "options"):
            continue
        config = config_with(root, method=method, **given(field))
        try:
            line = unread(config, load_method(config), "in-process")
        except UserError:
            continue  # refused
        if f" {field} " in line.replace(",", " "):
            noted |= given(field)
    assert {"participation.deadline", "participation.late_discount", "upload.trim"} <= set(noted)
    assert ("clients.ada.weight" in noted) == (method != "flexlora")
    assert usual(method=method, **noted) == usual(method=method)
    assert isinstance(usual(method=method), list)  # and no refusal


def test_the_note_is_one_line_and_names_field_and_reason(tmp_path):
    config = config_with(tmp_path, method="fedavg", **{"client.router_steps": 5})
    lines = []
    api.run(config, tmp_path / "run", say=lines.append)
    noted = [line for line in lines if line.startswith("given, but without effect here: ")]
    assert len(noted) == 1 and "\n" not in noted[0]
    assert "client.router_steps (with fedavg no client has a router)" in noted[0]
    assert "clients.cyd.weight (fedavg does not weigh clients by their text)" in noted[0]
    assert unread(run_config(tmp_path), load_method(run_config(tmp_path)), "in-process") == ""


def test_what_the_scale_of_all_follows_from_is_read_though_each_client_has_its_own(tmp_path):
    clients = [{"name": n, "specialists": 1, "specialist_rank": 4} for n in ("ada", "bob")]
    for key, value in (("specialist_rank", 6), ("specialists", 0)):
        config = run_config(tmp_path, "ada bob", experts={key: value})
        own = zip(config.clients, clients, strict=True)
        told = config.model_copy(update={"clients": tuple(c.model_copy(update=o) for c, o in own)})
        assert f"experts.{key} (" not in unread(told, load_method(told), "in-process")


def test_over_a_network_other_settings_are_read(tmp_path):
    config = config_with(
        tmp_path, **{"participation.late": "discount", "data.cache": "x", "base.memory": "9GB"}
    )
    flower = unread(config, load_method(config), "flower")
    here = unread(config, load_method(config), "in-process")
    assert "data.cache (the text is on the clients' devices)" in flower
    assert "base.memory (the owners of devices say how much, with --max-memory)" in flower
    assert "base.memory" not in here
    assert "participation.late" not in flower and "participation.late" in here
