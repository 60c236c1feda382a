"""One token at a time in C, against plain formulas and whole models in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GPT2Config, LlamaConfig, Qwen3Config
from transformers.pytorch_utils import Conv1D

from comigs import csrc
from comigs.bases import attention
from comigs.bases.load import architecture_of, set_dtype
from comigs.bases.packed import PackedLinear, pack
from comigs.experts import token
from comigs.experts.attach import Layout
from comigs.experts.packed import PackedLora
from tests.conftest import attach, copy_of, random_tensors, same, shape_of
from tests.families import SMALL, built_from
from tests.test_compiled import processor  # noqa: F401 (every test here runs with it, too)

pytestmark = pytest.mark.skipif(csrc.library() is None, reason="no C compiler")
WIDE = {**SMALL, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
MODELS = {
    "llama": LlamaConfig(**WIDE, mlp_bias=True, attention_bias=True),
    "qwen3": Qwen3Config(**WIDE),
    "gemma": GemmaConfig(**WIDE),  # gelu, and attention that keeps its own forward pass
    "gpt2": GPT2Config(  # weights that are turned
        vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1
    ),
}
TOKENS = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(0))


def distance(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linears_that_read_one_token_are_their_formula(dtype, threads):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    linears, loras = [], []
    for width, rank, has_more in ((32, 3, True), (80, 0, False), (16, 17, False)):
        linear = nn.Linear(144, width, bias=has_more).to(dtype).requires_grad_(False)
        A, B = torch.randn(rank, 144).to(dtype), torch.randn(rank, width).to(dtype)
        change = torch.randn(width, 144).to(dtype) if has_more else None
        linears.append(linear)
        loras.append(PackedLora(A if rank else None, B if rank else None, change))
    x = torch.randn(1, 1, 144).to(dtype)
    ready = [token.linear_in_c(of, dtype, lora) for of, lora in zip(linears, loras, strict=True)]
    with torch.no_grad():
        assert ready[0].takes(x)
        found = token.apply(ready, x)
    for y, linear, lora in zip(found, linears, loras, strict=True):
        exact = linear.double()(x.double())
        if lora.A is not None:
            exact = exact + x.double() @ lora.A.double().T @ lora.B.double()
        if lora.merged is not None:
            exact = exact + x.double() @ lora.merged.double().T
        assert distance(y, exact) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_a_turned_weight_wider_than_a_tile_is_its_formula():
    torch.manual_seed(0)
    linear = Conv1D(4112, 48).requires_grad_(False)
    x = torch.randn(1, 48)
    linear.bias.normal_()
    exact = x.double() @ linear.weight.double() + linear.bias.double()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            (found,) = token.apply([token.linear_in_c(linear, torch.float32)], x)
        assert distance(found, exact) < 1e-6


def test_only_one_token_without_gradients_is_taken():
    ready = token.linear_in_c(nn.Linear(32, 16).requires_grad_(False), torch.float32)
    x = torch.randn(1, 1, 32)
    assert not ready.takes(x)
    with torch.no_grad():
        assert ready.takes(x)
        assert not ready.takes(x.expand(1, 2, 32)) and not ready.takes(x.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not ready.takes(x)
    for odd in (nn.Linear(32, 16), nn.Linear(32, 24).requires_grad_(False)):  # learns; no vectors
        assert token.linear_in_c(odd, torch.float32) is None


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_packed_is_read_from_its_blocks(dtype, weights):
    torch.manual_seed(0)
    model = built_from(MODELS["llama"])
    pack(model, architecture_of(model), weights, "llama")
    set_dtype(model, dtype)
    for linear in (module for module in model.modules() if isinstance(module, PackedLinear)):
        x = torch.randn(1, linear.in_features).to(dtype)
        exact = x.double() @ linear.weight.double().T
        if linear.bias is not None:
            exact = exact + linear.bias.double()
        with torch.no_grad():
            (found,) = token.apply([token.linear_in_c(linear, dtype)], x)
        assert distance(found, exact) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_a_packed_model_is_the_same_one_token_at_a_time():
    model = built_from(MODELS["qwen3"])
    pack(model, architecture_of(model), "int8", "qwen3")
    model.set_attn_implementation(attention.register())
    with CASES["E=2"](model, torch.float32) as attachment:
        plain = step_by_step(model)
        attachment.lay_out()
        assert attachment.mixtures[0].one_token is not None
        assert distance(step_by_step(model), plain) < 1e-5


def exact_logits(model, make):
    """All logits of TOKENS by transformers, in float64 with these weights."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    set_dtype(model, torch.float64)
    with make(model, torch.float64), torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def step_by_step(model):
    """Logits of TOKENS: three at once, two more behind them, and then one at a time."""
    found, past = [], None
    with torch.no_grad():
        for part in (TOKENS[:, :3], TOKENS[:, 3:5], *TOKENS[:, 5:].split(1, dim=1)):
            output = model(part, past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits)
    return torch.cat(found, dim=1)


def maker(top_k, shape, routed=True, summed=False, merged=False, **settings):
    """Return what attaches the same experts, in any dtype, whenever it is asked."""

    def make(model, dtype):
        attachment = attach(model, architecture_of(model), top_k, **settings)
        attachment.layout = Layout(summed=summed)
        shapes = attachment.slot_shapes(shape, routed, merges=merged)
        random = torch.Generator().manual_seed(0)
        size = {"A": 0.25, "B": 0.05, "W": 0.3}
        tensors = {
            slot: (torch.randn(dims, generator=random, dtype=torch.float64) * size[slot.matrix])
            for slot, dims in shapes.items()
        }
        attachment.bind({slot: tensor.float().to(dtype) for slot, tensor in tensors.items()})
        return attachment

    return make


CASES = {
    "E=1": maker(1, shape_of(1, 0)),
    "E=2": maker(2, shape_of(1, 1, rank=3, specialist_rank=5)),
    "E=3, K=2": maker(2, shape_of(1, 2)),
    "by client": maker(2, shape_of(1, 1), routing="client"),
    "unrouted": maker(2, shape_of(1, 1), routed=False),
    "summed": maker(2, shape_of(1, 1), routed=False, summed=True),
    "merged": maker(2, shape_of(1, 1), merged=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_read_one_token_at_a_time_is_the_whole_one(model_type, case):
    model = built_from(MODELS[model_type])
    model.set_attn_implementation(attention.register())
    for dtype in (torch.float32, torch.bfloat16):
        set_dtype(model, dtype)
        exact = exact_logits(model, CASES[case])
        with CASES[case](model, torch.float32) as attachment:
            plain = step_by_step(model)
            attachment.lay_out()
            assert attachment.mixtures[0].one_token is not None
            found = step_by_step(model)
        # In bfloat16 roundings are others, not more of them; of a single text either is nearer.
        near = 2.5 * distance(plain, exact) if dtype == torch.bfloat16 else 0
        assert distance(found, exact) < near + 1e-5
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_c_is_not_written_for_is_computed_as_before():
    # K = 1: weights, and so the bias of `down`, are less than whole.
    model, make = built_from(MODELS["llama"]), maker(1, shape_of(1, 1))
    model.set_attn_implementation(attention.register())
    with make(model, torch.float32) as attachment:
        plain = step_by_step(model)
        attachment.lay_out()
        assert attachment.mixtures[0].one_token is None
        assert distance(step_by_step(model), plain) < 1e-5


def test_gradients_know_nothing_of_it_and_the_next_client_forgets_it():
    model = built_from(MODELS["llama"])
    model.set_attn_implementation(attention.register())
    state = copy_of(model.state_dict())
    with attach(model, architecture_of(model)) as attachment:
        seen = []
        for lays_out in (False, True):
            tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
            attachment.bind({slot: tensor.requires_grad_() for slot, tensor in tensors.items()})
            if lays_out:
                attachment.lay_out()
            model(TOKENS[:, :1]).logits.sum().backward()
            seen.append({slot: tensor.grad for slot, tensor in tensors.items()})
        assert same(*seen)
        ann, bob = (random_tensors(attachment, shape_of(1, 1), True, seed) for seed in (1, 2))
        attachment.bind(bob)
        plain = step_by_step(model)
        attachment.bind(ann)
        attachment.lay_out()
        assert distance(step_by_step(model), plain) > 1e-2
        attachment.bind(bob)
        assert attachment.mixtures[0].one_token is attachment.attention[0]["q"].one_token is None
        assert torch.equal(step_by_step(model), plain)
    assert same(model.state_dict(), state)


def test_the_routing_of_one_token_is_kept_as_of_many():
    model = built_from(MODELS["llama"])
    model.set_attn_implementation(attention.register())
    with CASES["E=3, K=2"](model, torch.float32) as attachment, torch.no_grad():
        model(TOKENS[:, :1])
        plain = attachment.routings()
        attachment.lay_out()
        model(TOKENS[:, :1])
        for one, other in zip(attachment.routings(), plain, strict=True):
            assert torch.allclose(one.weights_TE, other.weights_TE, atol=1e-6)
            assert torch.equal(one.selected_TE, other.selected_TE)


def test_the_text_is_the_same():
    model = built_from(MODELS["llama"])
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = []
    for way in ("eager", attention.register()):
        model.set_attn_implementation(way)
        with CASES["E=2"](model, torch.float32) as attachment:
            for lays_out in (False, True):
                if lays_out:
                    attachment.lay_out()
                texts.append(model.generate(TOKENS, **settings))
    assert all(torch.equal(texts[0], text) for text in texts)
