"""Rows of several clients in one forward pass: each is what its client's model is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from comigs.bases.load import Base, architecture_of
from comigs.errors import UserError
from comigs.experts.attach import Layout
from comigs.personal.serve.model import ATTENTION, RowModel
from comigs.personal.serve.packed import pack
from comigs.personal.serve.rows import Row, make_pass
from tests.conftest import attach, bits, random_tensors, shape_of, tiny
from tests.families import CONFIGS, SMALL, randomised
from tests.serving import (
    SHAPES,
    attached_clients,
    clients_on,
    logits_alone,
    prompt_of,
    write_together,
)

TOKENS = 6


def family(config):
    """A small base of any family; nothing here needs a tokenizer."""
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(config))
    model.set_attn_implementation("eager")
    device = torch.device("cpu")
    return Base("small", model, None, None, architecture_of(model), device, torch.float32, "none")


def assert_together_as_alone(base, shapes=SHAPES, chunk=100, mixing="routed", **settings):
    """Rows that join one after the other write the tokens that each writes alone, from the same
    logits.
    """
    prompts = [prompt_of(number, 4 + 3 * number) for number in range(len(shapes) + 1)]
    with attach(base.model, base.architecture, **settings) as attachment:
        attachment.layout = Layout(summed=mixing == "sum")
        made = attached_clients(base, attachment, shapes, routed=mixing == "routed")
        made.append(made[0])  # two rows of one client, which are neighbours in a pass
        alone = [
            logits_alone(attachment, tensors, prompt, TOKENS)
            for (_, tensors), prompt in zip(made, prompts, strict=True)
        ]
    model = RowModel(base)
    rows = [Row(client) for client, _ in made]
    together = write_together(model, rows, prompts, TOKENS, chunk)
    model.close()
    for (ids, logits), (expected_ids, expected) in zip(together, alone, strict=True):
        assert ids == expected_ids
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert len({tuple(ids) for ids, _ in together}) > 1  # or the clients would be alike


@pytest.mark.parametrize("chunk", [100, 3, 1])
def test_rows_of_several_clients_equal_each_client_alone(base, chunk):
    assert_together_as_alone(base, chunk=chunk)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["token", "sequence", "client"])
@pytest.mark.parametrize("chunk", [100, 2])
def test_every_way_of_routing(base, top_k, routing, chunk):
    assert_together_as_alone(base, SHAPES[:3], chunk, top_k=top_k, routing=routing)


@pytest.mark.parametrize("router", ["open", "gated"])
def test_the_rest_of_the_world_beside_an_own_expert(base, router):
    shape = shape_of(1, 0).model_copy(update={"others": router})
    assert_together_as_alone(base, [shape, shape], strength="together")


@pytest.mark.parametrize("mixing", ["sum", "uniform"])
def test_mixing_without_a_router(base, mixing):
    assert_together_as_alone(base, SHAPES[:3], mixing=mixing)


@pytest.mark.parametrize("routed", [True, False])
def test_what_is_merged(base, routed):
    """A frozen change of every linear, beside experts with and without a router."""
    with attach(base.model, base.architecture) as attachment:
        shapes = attachment.slot_shapes(SHAPES[1], routed, merges=True)
        random = torch.Generator().manual_seed(3)
        tensors = {slot: torch.randn(size, generator=random) * 0.1 for slot, size in shapes.items()}
        expected = logits_alone(attachment, tensors, prompt_of(1, 9), TOKENS)
        client = pack(attachment, "run/ann", 0, base.dtype)
    other = clients_on(base)[1]
    model = RowModel(base)
    together = write_together(
        model, [Row(client), Row(other)], [prompt_of(1, 9), prompt_of(2, 5)], TOKENS, 100
    )
    model.close()
    assert together[0][0] == expected[0]
    torch.testing.assert_close(together[0][1], expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name != "gemma2"])
def test_every_known_family(model_type):
    assert_together_as_alone(family(CONFIGS[model_type]), SHAPES[:2], chunk=4)


@pytest.mark.parametrize("chunk", [100, 5, 1])
@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, head_dim=8, sliding_window=4),
        Gemma3TextConfig(
            **SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=3,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ],
)  # fmt: skip
def test_a_sliding_window(config, chunk):
    base = family(config)
    assert_together_as_alone(base, SHAPES[:2], chunk)
    # the window matters here: without it, the same text has other logits
    prompt = torch.tensor([prompt_of(0, 12)])
    wide = type(config)(**{**config.to_dict(), "sliding_window": 100})
    assert not torch.allclose(base.model(prompt).logits, family(wide).model(prompt).logits)


def test_rows_of_a_client_are_neighbours_so_that_its_experts_work_once(base):
    clients = clients_on(base)
    rows = [(Row(clients[n % 3]), prompt_of(n, 2)) for n in range(9)]
    this = make_pass(rows)
    assert [group.client for group in this.groups] == clients[:3]
    assert [group.at for group in this.groups] == [slice(0, 6), slice(6, 12), slice(12, 18)]
    for span in this.spans:
        (tokens,) = [tokens for row, tokens in rows if row is span.row]
        assert this.ids[span.at] == tokens


def test_a_row_does_not_see_its_neighbours(base):
    """Other rows in the pass change nothing but rounding, whatever they hold."""
    ann, bob, *_ = clients_on(base)
    model = RowModel(base)
    alone = model.forward(make_pass([(Row(ann), prompt_of(1, 8))]))[0]
    for neighbours in (1, 5):
        rows = [(Row(bob), prompt_of(n, 3 + n)) for n in range(neighbours)]
        this = make_pass([*rows, (Row(ann), prompt_of(1, 8))])
        (place,) = [n for n, span in enumerate(this.spans) if span.row.client is ann]
        torch.testing.assert_close(model.forward(this)[place], alone, rtol=0, atol=1e-5)
    model.close()


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_fork_goes_on_from_the_same_tokens_and_its_own_way(base, routing):
    (ann,) = clients_on(base, SHAPES[:1], routing=routing)
    model = RowModel(base)
    prompt = prompt_of(1, 9)
    row, other = Row(ann), Row(ann)
    model.forward(make_pass([(row, prompt)]))
    fork = row.fork()
    model.forward(make_pass([(other, prompt)]))
    for tokens in ([5], [7], [9]):
        found = model.forward(make_pass([(row, [11]), (fork, tokens)]))
        expected = model.forward(make_pass([(other, tokens)]))[0]
        torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)
        assert not torch.allclose(found[0], found[1], atol=1e-3)
    model.close()


def test_keys_grow_beyond_their_first_room():
    base = tiny("tiny-llama")
    (ann,) = clients_on(base, SHAPES[:1])
    model = RowModel(base)
    ids = prompt_of(1, 200)
    whole = model.forward(make_pass([(Row(ann), ids)]))[0]
    row = Row(ann)
    for at in range(0, 200, 7):
        last = model.forward(make_pass([(row, ids[at : at + 7])]))[0]
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-4)
    assert row.length == 200
    model.close()


def test_a_closed_model_leaves_the_base_as_it_was(base):
    ids = torch.tensor([prompt_of(0, 9)])
    modules, before = dict(base.model.named_modules()), bits(base.model(ids).logits)
    attention = base.model.config._attn_implementation
    model = RowModel(base)
    assert base.model.config._attn_implementation == ATTENTION
    model.close()
    assert dict(base.model.named_modules()) == modules
    assert base.model.config._attn_implementation == attention
    assert bits(base.model(ids).logits) == before


def test_a_packed_client_takes_no_more_than_its_tensors(base):
    with attach(base.model, base.architecture) as attachment:
        for client, tensors in attached_clients(base, attachment):
            own = sum(t.numel() * t.element_size() for t in tensors.values())
            assert client.num_bytes() == own


def test_in_bfloat16_rows_are_as_far_from_float32_as_the_model_alone():
    precise, rounded = tiny("tiny-llama"), tiny("tiny-llama", "bfloat16")
    prompt = prompt_of(1, 12)
    with attach(precise.model, precise.architecture) as attachment:
        tensors = random_tensors(attachment, SHAPES[1], routed=True, seed=1)
        _, expected = logits_alone(attachment, tensors, prompt, 1)
    with attach(rounded.model, rounded.architecture) as attachment:
        _, alone = logits_alone(attachment, tensors, prompt, 1)
    with attach(rounded.model, rounded.architecture) as attachment:
        attachment.bind(tensors)
        client = pack(attachment, "run/ann", 0, rounded.dtype)
    model = RowModel(rounded)
    found = model.forward(make_pass([(Row(client), prompt)]))
    model.close()
    assert (found - expected).abs().max() <= 2 * (alone - expected).abs().max()


def test_a_base_whose_positions_depend_on_the_longest_row_is_refused():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    base = tiny("tiny-llama")
    base.model.config.rope_parameters = {**rope, "original_max_position_embeddings": 16}
    with pytest.raises(UserError, match=r'tiny-llama: has the rope_type "longrope"'):
        RowModel(base)
