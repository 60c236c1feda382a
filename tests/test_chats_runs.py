"""Runs of clients that have chats: their stores, the figures, and the same in every engine."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import tomli_w
import torch

from comigs.app import api
from comigs.app.export import evaluate_export, export
from comigs.bases.load import load_base
from comigs.client.client import Client
from comigs.client.workplace import workplace
from comigs.config import load_config, to_toml
from comigs.config.templates import TEMPLATES
from comigs.data.batches import evaluation_windows
from comigs.data.examples import ExampleStore, open_examples
from comigs.data.prepare import prepare, prepare_client
from comigs.engines.client_task import run_task
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.runs.report.read import read_run
from comigs.server.protocol import Task
from tests.chats import PLAIN, questions, tiny_chat, write_lines
from tests.conftest import run_config
from tests.local_grid import Federation
from tests.runs import comigs, refused
from tests.test_chats_packed import naive_nats

LENGTH = 40


def chat_config(root, names="ada bob", data=None, **tree):
    """A small run of clients with questions and answers of their own."""
    for name in names.split():
        write_lines(root / f"{name}.jsonl", questions(60, name))
    entries = {name: {"text": f"{name}.jsonl", "weight": 1.0} for name in names.split()}
    settings = {"sequence_length": LENGTH, **(data or {})}
    base = {"chat_template": PLAIN, **tree.pop("base", {})}
    return run_config(root, names, entries, data=settings, base=base, **tree)


def test_a_store_holds_each_chat_as_it_was_encoded(tmp_path):
    config, base = chat_config(tmp_path), tiny_chat("tiny-gpt2")
    data = prepare(config, base.encoder)
    store = data.load("ada").train[0]
    assert isinstance(store, ExampleStore)
    expected = [
        base.encoder.chats.encode(document.turns, "")
        for _, document in data._own["ada"].part.read(["train"])
    ]
    assert store.tokens.tolist() == [id for ids, _, _ in expected for id in ids]
    assert np.diff(store.ends, prepend=0).tolist() == [len(ids) for ids, _, _ in expected]
    assert (store.marks >= 1 << 15).tolist() == [one for _, mask, _ in expected for one in mask]
    answers = sum(
        len(document.turns[1][1].encode()) for _, document in data._own["ada"].part.read(["train"])
    )
    # Bits per byte are those of the answers, each with the space before it and what ends it.
    assert store.measured_bytes(1000) == answers + len(store.ends)
    assert store.num_learnt(1000) == answers + 2 * len(store.ends)
    store.verify()
    assert store.folder.stat().st_mode & 0o077 == 0


def test_a_store_is_told_apart_by_template_and_found_again(tmp_path):
    config, base = chat_config(tmp_path), tiny_chat("tiny-gpt2")
    first = prepare(config, base.encoder).load("ada").train[0]
    made = sorted(path.name for path in (tmp_path / "cache").iterdir())
    again = prepare_client(config, "ada", base.encoder).train[0]
    assert again.tokens_sha256 == first.tokens_sha256 and again.folder == first.folder
    whole = config.model_copy(update={"data": config.data.model_copy(update={"loss": "all"})})
    everything = prepare(whole, base.encoder).load("ada").train[0]
    assert everything.folder == first.folder  # the same files, and another measurement
    assert everything.tokens_sha256 != first.tokens_sha256
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == made
    other = tiny_chat("tiny-gpt2", chat_template=PLAIN.replace("assistant:{%", "A:{%"))
    assert other.encoder.id == base.encoder.id and other.encoder.chats.id != base.encoder.chats.id


@pytest.mark.parametrize("name", ["marks.bin", "ends.bin", "tokens.bin"])
def test_a_damaged_store_is_found(tmp_path, name):
    config, base = chat_config(tmp_path), tiny_chat("tiny-gpt2")
    store = prepare(config, base.encoder).load("ada").train[0]
    raw = bytearray((store.folder / name).read_bytes())
    raw[3] ^= 1
    (store.folder / name).write_bytes(raw)
    with pytest.raises(UserError, match="this token store is damaged; delete the folder"):
        open_examples(store.folder, False).verify()
    (store.folder / name).write_bytes(raw[:-2])
    with pytest.raises(UserError, match="this token store is damaged"):
        open_examples(store.folder, False)


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_a_run_measures_answers_and_only_them(tmp_path, loss):
    """The base's figures are those of one chat after the other, by transformers alone."""
    config = chat_config(tmp_path, data={"loss": loss})
    said = []
    folder = api.run(config, tmp_path / "run", say=said.append)
    base = tiny_chat("tiny-gpt2")
    store = prepare(config, base.encoder).load("ada").test[0]
    figures = folder.summary().clients["ada"].base_test
    assert figures.tokens == store.num_learnt(LENGTH)
    nats = float(naive_nats(base.model, store, LENGTH))
    assert figures.nats_per_token == pytest.approx(nats / figures.tokens, rel=1e-5)
    bits = nats / math.log(2) / store.measured_bytes(LENGTH)
    assert figures.bits_per_byte == pytest.approx(bits, rel=1e-5)
    own, learnt = prepare(config, base.encoder).load("ada"), []
    for split in ("train", "valid", "test"):
        learnt.append(f"{split} {getattr(own, split)[0].num_learnt(LENGTH):,}")
    assert f"ada: learnt or measured: {', '.join(learnt)} tokens" in said
    again = api.evaluate(folder.path, client="ada")["ada"]
    assert again["base"]["nats_per_token"] == pytest.approx(nats / figures.tokens, rel=1e-5)
    trained = [line for line in folder.metrics() if line.kind == "train"]
    assert all(line.trained_tokens > 0 for line in trained)


def test_a_client_weighs_what_it_learns(tmp_path):
    """Of chats, the tokens of answers within a window; of text, all."""
    write_lines(
        tmp_path / "ada.jsonl", [*questions(60, "ada"), {"question": "x" * 30, "answer": "y"}]
    )
    entries = {"ada": {"text": "ada.jsonl"}}
    data, base = {"sequence_length": 30}, {"chat_template": PLAIN}
    config = run_config(tmp_path, "ada bob", entries, data=data, base=base)
    base, task = load_base(config.base), Task(1, False, (), ())
    place, texts = workplace(config, load_method(config), base), prepare(config, base.encoder)
    for name in ("ada", "bob"):
        client = Client(name, place, texts.load(name))
        (store,) = client.data.train
        _, reply = run_task(client, task, {}, lambda line: None)
        learnt = sum(batch.num_learnt for batch in evaluation_windows([store], 30, 1))
        assert reply.train_tokens == (learnt if name == "ada" else len(store.tokens))
        assert reply.train_tokens == learnt + (name == "bob")  # its first separator is no target


def test_what_is_longer_than_a_window_is_cut_and_said(tmp_path):
    said, config = [], chat_config(tmp_path, data={"sequence_length": 30})
    api.run(config, tmp_path / "run", say=said.append)
    data = prepare(config, tiny_chat("tiny-gpt2").encoder).load("ada")
    cut = []
    for split in ("train", "valid", "test"):
        (store,) = getattr(data, split)
        longer = (np.diff(store.ends, prepend=0) > 31).sum()
        cut.append(f"{split} {longer} of {len(store.ends)}")
    line = "ada: chats longer than data.sequence_length (30 tokens), cut at their end: "
    assert line + ", ".join(cut) in said


def test_chats_without_an_answer_in_a_window_are_left_out_and_said(tmp_path):
    said = []
    config = chat_config(tmp_path, "ada", data={"sequence_length": 30})
    rows = [*questions(30, "ada"), {"question": "x" * 30, "answer": "y"}]
    write_lines(tmp_path / "ada.jsonl", rows)
    api.run(config, tmp_path / "run", say=said.append)
    (line,) = [line for line in said if "chats without an answer within" in line]
    assert " (30 tokens), left out: " in line and " 1 of " in line and line.count(" of ") == 1
    short = chat_config(tmp_path, "ada", data={"sequence_length": 8})
    with pytest.raises(UserError, match=r"train has no chat whose answer begins within data\.seq"):
        prepare(short, tiny_chat("tiny-gpt2").encoder).load("ada")


def nats_of_parts(folder, base):
    """Nats per token of answers, and of all else, on ada's test: of the base and of her model."""
    config, answers = folder.config(), tiny_chat("tiny-gpt2").encoder
    found = []
    for loss in ("answers", "all"):
        data = config.data.model_copy(update={"loss": loss})
        store = prepare(config.model_copy(update={"data": data}), answers).load("ada").test[0]
        with closing(api.open_personal_model(folder.path, "ada")) as model:
            own = float(naive_nats(model.model, store, LENGTH))
        found.append((store.num_learnt(LENGTH), float(naive_nats(base, store, LENGTH)), own))
    (tokens, *of_answers), (all_tokens, *of_all) = found
    pairs = zip(of_all, of_answers, strict=True)
    rest = [(whole - part) / (all_tokens - tokens) for whole, part in pairs]
    return [nats / tokens for nats in of_answers], rest


@pytest.mark.parametrize("loss", ["answers", "all"])
def test_answers_are_learnt_and_questions_only_where_all_is(tmp_path, loss):
    """By transformers alone. Questions are of other letters than answers, and easily learnt."""
    training = {"steps": 10, "batch_size": 8, "lr": 2e-2}
    config = chat_config(tmp_path, "ada", rounds=6, client=training, data={"loss": loss})
    rows = [
        {"question": f"{'qu' * (1 + n % 5)} {n}", "answer": "x" * (1 + n % 7)} for n in range(60)
    ]
    write_lines(tmp_path / "ada.jsonl", rows)
    folder = api.run(config, tmp_path / "run")
    (base, own), (base_rest, own_rest) = nats_of_parts(folder, tiny_chat("tiny-gpt2").model)
    assert own < 0.7 * base
    if loss == "all":
        assert own_rest < 0.65 * base_rest
    else:
        assert own_rest > 0.85 * base_rest


@pytest.mark.parametrize(
    "changes",
    [
        {"client": {"router_data": "crossfit", "folds": 3}},
        {"method": "centralized"},
        {"data": {"distribution": "out", "loss": "all"}},
        {"data": {"train_share": 0.5, "valid_share": 0.5}, "base": {"name": "tiny-llama"}},
        {"client": {"micro_batch_size": 1}, "experts": {"routing": "sequence"}},
    ],
)
@pytest.mark.few(2)
def test_settings_of_text_hold_for_chats(tmp_path, changes):
    summary = api.run(chat_config(tmp_path, **changes), tmp_path / "run").summary()
    assert math.isfinite(summary.mean.test.nats_per_token)


def test_a_share_of_chats_is_whole_chats(tmp_path):
    base = tiny_chat("tiny-gpt2")
    whole = prepare(chat_config(tmp_path), base.encoder).load("ada").train[0]
    half = prepare(chat_config(tmp_path, data={"train_share": 0.5}), base.encoder)
    part = half.load("ada").train[0]
    assert 0.3 * len(whole.ends) < len(part.ends) < 0.6 * len(whole.ends)
    assert part.tokens.tolist() == whole.tokens[: len(part.tokens)].tolist()
    few = prepare(chat_config(tmp_path, data={"train_share": 1e-9}), base.encoder)
    assert len(few.load("ada").train[0].ends) == 1


def test_clients_with_text_and_clients_with_chats_share_a_run(tmp_path):
    for name in ("ada", "bob"):
        write_lines(tmp_path / f"{name}.jsonl", questions(60, name))
    for more in ({}, {"method": "centralized"}):
        config = run_config(
            tmp_path, "ada bob cyd", {"ada": {"text": "ada.jsonl"}},
            base={"chat_template": PLAIN}, data={"sequence_length": LENGTH}, **more,
        )  # fmt: skip
        folder = api.run(config, tmp_path / f"run-{len(more)}")
        assert math.isfinite(folder.summary().mean.test.nats_per_token)


def test_workers_and_devices_give_the_run_of_one_process(tmp_path):
    def metrics(path):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [
            (line["client"], line["round"], line["nats_per_token"])
            for line in lines
            if line["kind"] == "evaluation"
        ]

    # A server sends no template, so the base has one of its own.
    base, folder = tiny_chat("tiny-llama"), tmp_path / "base"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    own = {"name": str(folder), "chat_template": None}
    config = chat_config(tmp_path / "text", "ada bob", base=own)
    # A device of the test's federation has the text that is called as itself.
    clients = tuple(c.model_copy(update={"name": c.text}) for c in config.clients)
    config = config.model_copy(update={"clients": clients})
    api.run(config, tmp_path / "one")
    api.run(config.model_copy(update={"workers": 2}), tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    names = [client.name for client in clients]
    federation = Federation(tmp_path, names, tmp_path / "text")
    for trainer in federation.trainers.values():
        trainer.device = replace(trainer.device, base=str(folder))
    federation.run(tmp_path / "net", config)
    assert sorted(metrics(tmp_path / "one")) == sorted(metrics(tmp_path / "net"))


def test_the_all_setting_without_chats_is_said_to_have_no_effect(tmp_path):
    said = []
    config = run_config(tmp_path, data={"loss": "all"})
    one = api.run(config, tmp_path / "one", say=said.append)
    assert "given, but without effect here: data.loss (no client has chats)" in said
    two = api.run(run_config(tmp_path), tmp_path / "two")
    names = [p.relative_to(one.path) for p in one.path.rglob("*.safetensors")]
    assert names and all(
        (one.path / name).read_bytes() == (two.path / name).read_bytes() for name in names
    )


def test_a_personal_model_answers_by_the_runs_template(tmp_path):
    folder = api.run(chat_config(tmp_path), tmp_path / "run")
    assert folder.config().base.chat_template == PLAIN
    model = api.open_personal_model(folder.path, "ada")
    try:
        assert model.tokenizer.chat_template == PLAIN
        asked = [{"role": "user", "content": "ada 1?"}]
        answer = model.answer(asked, max_new_tokens=5)
        text = "user: ada 1?\nassistant:"
        assert model.generate(text, max_new_tokens=5) == text + answer
    finally:
        model.close()
    assert torch.is_grad_enabled()


ENDED = (  # by a token that the base knows nothing of
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}"
    "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'assistant:' }}{% endif %}"
)


def test_an_answer_ends_where_the_template_ends_it(tmp_path, monkeypatch):
    folder = api.run(chat_config(tmp_path), tmp_path / "run")
    with closing(api.open_personal_model(folder.path, "ada")) as model:
        model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
        model.tokenizer.chat_template = ENDED
        generate, asked = model.model.generate, []
        monkeypatch.setattr(
            model.model, "generate", lambda **how: asked.append(how) or generate(**how)
        )
        model.answer([{"role": "user", "content": "ada 1?"}], max_new_tokens=5)
        (end,) = model.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
        assert asked[0]["eos_token_id"] == [model.tokenizer.eos_token_id, end]


def test_prepare_shows_what_is_learnt_and_obeys_nothing(tmp_path, capsys):
    rows = [{"question": f"\x1b[31m{n}?", "answer": f"no\x07 {n}"} for n in range(20)]
    write_lines(tmp_path / "ada.jsonl", rows)
    entries = {"ada": {"text": "ada.jsonl"}}
    data, base = {"sequence_length": LENGTH}, {"chat_template": PLAIN}
    config = run_config(tmp_path, "ada bob", entries, data=data, base=base)
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert comigs(capsys, "prepare", tmp_path / "config.toml", "--show", "2").code == 0
    shown = comigs(capsys, "prepare", tmp_path / "config.toml", "--show", "2").out
    assert "\x1b" not in shown and "\x07" not in shown
    of_ada, of_bob = shown.split("bob: train, example 1: ")
    assert of_ada.count("\u27e6 no\ufffd ") == of_ada.count("<|endoftext|>\u27e7") == 2
    assert "user: \ufffd[31m" in of_ada and "ada: train, example 2: " in of_ada
    assert of_bob.startswith(f"{LENGTH + 1} tokens, {LENGTH} learnt\n<|endoftext|>\u27e6")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": [{"messages": [{"role": "bot", "content": "x"}]}]}, 'unknown role "bot"'),
        ({"text": [{"question": "a", "answer": ""}]}, "the answer (`answer`) is empty"),
        ({"text": [{"messages": [{"role": "user", "content": "x"}]}]}, "no turn is the assistant"),
        ({"template": "{{ raise_exception('not today') }}"}, "refuses it: not today"),
        ({"template": "{% for %}"}, "base.chat_template: is no Jinja template: "),
        ({"template": None}, "base tiny-gpt2 has no chat template; give one (base.chat_template"),
        ({"template": "no braces"}, "no braces: no such file; by name: chatml, plain"),
        ({"long": 70}, "tokens, but base tiny-gpt2 reads at most 64; make it shorter"),
        ({"text": [{"question": "a", "answer": "b"}, {"text": "x"}]}, "ada.jsonl:2: is text, but"),
    ],
)
def test_bad_chats_are_one_line_and_leave_nothing_behind(tmp_path, capsys, change, says):
    rows = change.get("text", questions(20))
    if "long" in change:
        rows[5] = {"question": "x" * change["long"], "answer": "y"}
    write_lines(tmp_path / "ada.jsonl", rows)
    template = change.get("template", PLAIN)
    base = {"name": "tiny-gpt2"} | ({"chat_template": template} if template else {})
    tree = {
        "base": base, "data": {"sequence_length": LENGTH},
        "clients": [{"name": "ada", "text": "ada.jsonl"}],
    }  # fmt: skip
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tree), encoding="utf-8")
    line = refused(capsys, "run", tmp_path / "config.toml", "--out", tmp_path / "run")
    assert says in line and not (tmp_path / "run").exists()


def test_a_template_in_a_file_becomes_part_of_the_run_and_a_runs_config_reads_no_file(tmp_path):
    (tmp_path / "mine.jinja").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "config.toml").write_text(
        '[base]\nname = "mini"\nchat_template = "mine.jinja"\n[[clients]]\nname = "a"\n'
    )
    assert load_config(tmp_path / "config.toml").base.chat_template == PLAIN
    for name, template in TEMPLATES.items():
        named = load_config(tmp_path / "config.toml", [f"base.chat_template={name}"])
        assert named.base.chat_template == template
    with pytest.raises(UserError, match=r"base.chat_template: .* is no Jinja template, which has"):
        load_config(tmp_path / "config.toml", own=False)
    (tmp_path / "metrics.jsonl").touch()  # a run folder, which may be a stranger's
    with pytest.raises(UserError, match=r"base.chat_template: .* is no Jinja template, which has"):
        read_run(tmp_path)


def test_a_template_that_is_none_is_said_before_the_base_is_read(monkeypatch):
    monkeypatch.setattr("comigs.bases.load._named", None)
    with pytest.raises(UserError, match="is no Jinja template"):
        tiny_chat("tiny-llama", chat_template="{% for %}")


def test_an_export_is_checked_and_measured_on_answers(tmp_path):
    """A chat at a time, since what reads an export knows nothing of packed windows."""
    folder = api.run(chat_config(tmp_path, base={"name": "tiny-llama"}), tmp_path / "run")
    export(folder.path, "ada", "transformers", tmp_path / "model", "float32")
    ours = api.evaluate(folder.path, client="ada")["ada"]
    theirs = evaluate_export(folder.path, tmp_path / "model")["ada"]
    assert theirs["personal"]["tokens"] == ours["personal"]["tokens"]
    for model in ("base", "personal"):
        for figure in ("nats_per_token", "bits_per_byte"):
            assert theirs[model][figure] == pytest.approx(ours[model][figure], rel=1e-4)


def test_a_run_does_not_go_on_with_another_template_than_it_began_with(tmp_path):
    """The template of a base in a folder is a file of its own, and no part of its fingerprint."""
    base, folder = tiny_chat("tiny-gpt2"), tmp_path / "base"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    own = {"name": str(folder), "chat_template": None}
    run = api.run(chat_config(tmp_path, "ada", base=own), tmp_path / "run")
    before = api.evaluate(run.path)["ada"]
    template = folder / "chat_template.jinja"
    template.write_text(PLAIN.replace("assistant:{%", "A:{%"), encoding="utf-8")
    assert load_base(run.config().base).fingerprint == run.environment()["base_fingerprint"]
    with pytest.raises(UserError, match="chat template, or what ends an answer, has changed since"):
        api.evaluate(run.path)
    template.write_text(PLAIN, encoding="utf-8")
    assert api.evaluate(run.path)["ada"] == before
