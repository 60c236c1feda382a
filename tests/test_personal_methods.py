"""Personal models of every kind of mixing: what is opened is what the run measured, and it writes
as it reads.
"""

from __future__ import annotations

from contextlib import closing

import pytest
import safetensors.torch
import torch

from comigs.app import api
from comigs.slots import Slot
from tests.conftest import APART, run_config

KINDS = {
    "token": ("comigs", {}),
    "top 1": ("comigs", {"specialists": 2, "top_k": 1}),
    "sequence": ("comigs", {"routing": "sequence"}),
    "client": ("comigs", {"routing": "client"}),
    "uniform": ("fedavg", {}),
    "sum": ("fdlora", {"specialist_rank": 3}),
    "merged": ("flora", {}),
    "merged beside factors": ("fedex-lora", {}),
    "rest of the world": ("fedalt", {}),
    "singular": ("flexlora", {}),
    "pooled": ("centralized", {}),
}


def likeliest(model, prompt, tokens):
    """The prompt and the likeliest token each time, found by reading all of the text again, up to a
    separator.
    """
    ids = model.tokenizer(
        prompt or model.tokenizer.eos_token, return_tensors="pt", add_special_tokens=False
    )["input_ids"]
    given = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            best = model.model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)
        if best.item() == model.tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best], dim=1)
    return prompt + model.tokenizer.decode(ids[0, given:])


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        *((kind, "tiny-gpt2") for kind in KINDS),
        *((kind, "tiny-llama") for kind in ("sequence", "sum", "merged")),
    ],
)
@pytest.mark.few(4)
def test_a_personal_model_is_the_one_that_was_measured_and_writes_what_it_finds_likeliest(
    tmp_path, kind, base
):
    method, experts = KINDS[kind]
    config = run_config(
        tmp_path,
        method=method,
        experts={"rank": 2, **experts},
        evaluation={"every": 0, "keep": "last", "batch_size": 8},
        client={"steps": 3, "batch_size": 4, "router_every": 2, "router_steps": 2, "lr": 3e-2},
        base={"name": base, "dtype": "float32", "device": "cpu", "threads": 1},
    )
    folder = api.run(config, tmp_path / "run")
    again = api.evaluate(folder.path)
    for name, figures in folder.summary().as_json()["clients"].items():
        assert again[name]["personal"]["nats_per_token"] == figures["test"]["nats_per_token"]
        assert again[name]["base"]["nats_per_token"] == figures["base_test"]["nats_per_token"]
        assert figures["test"]["nats_per_token"] < figures["base_test"]["nats_per_token"]

    with closing(api.open_personal_model(folder.path, "bob")) as model:
        saved = safetensors.torch.load_file(
            folder.path / "clients" / "bob" / "personal.safetensors"
        )
        assert {str(slot) for slot in model.tensors} == saved.keys()
        for prompt in ("paint happy ", "says bob"):
            assert model.generate(prompt, max_new_tokens=12) == likeliest(model, prompt, 12)
        ids = model.tokenizer("paint happy ", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            own = model.model(ids).logits
            model.attachment.unbind()
            plain = model.model(ids).logits
        assert (own - plain).abs().max() > 1e-2

    roles = {Slot.parse(slot).role for slot in saved}
    assert ("router" in roles) == (
        kind in ("token", "top 1", "sequence", "client", "rest of the world")
    )
    assert ("merged" in roles) == kind.startswith("merged")
    routers = [tuple(t.shape) for slot, t in saved.items() if slot.endswith(".router.W")]
    assert all(shape[1] == (1 if kind == "client" else 16) for shape in routers)


def test_a_model_routed_by_sequence_reads_the_whole_text_again_for_each_token(tmp_path):
    """A cache of keys and values knows nothing of the mean of what was read: with one it writes
    something else.
    """
    config = run_config(
        tmp_path,
        "ada",
        experts={"rank": 2, "routing": "sequence", "router_start": 2.0},
        options=APART,
        evaluation={"keep": "last"},
        client={"steps": 6, "batch_size": 4, "router_every": 2, "router_steps": 4, "lr": 5e-2},
    )
    folder = api.run(config, tmp_path / "run")
    with closing(api.open_personal_model(folder.path, "ada")) as model:
        cached = []
        for prompt in ("engine ", "loom pattern wheel", "analysis table", ""):
            wanted = likeliest(model, prompt, 20)
            assert model.generate(prompt, max_new_tokens=20) == wanted
            cached.append(model.generate(prompt, max_new_tokens=20, use_cache=True) == wanted)
        assert not all(cached)
