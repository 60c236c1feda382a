"""Experts put on from outside: the base stays whole, is held once, generates as ever, and comes
back identical.
"""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from comigs.experts.init import starting_tensors
from comigs.slots import Slot
from tests.conftest import attach, bits, random_tensors, run_config, shape_of, start_engine, tiny

INPUT = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top_k", [1, 2])
def test_generate_with_a_cache_equals_generate_without(base, top_k):
    untouched = base.model.generate(INPUT, do_sample=False, max_new_tokens=20, pad_token_id=0)
    with attach(base.model, base.architecture, top_k) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        wanted = {
            "do_sample": False,
            "max_new_tokens": 20,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
        }
        cached, plain = (
            attachment.model.generate(INPUT, use_cache=cache, output_logits=True, **wanted)
            for cache in (True, False)
        )
        assert torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(
            torch.stack(cached.logits), torch.stack(plain.logits), rtol=0, atol=1e-5
        )
        step_by_step = INPUT
        for _ in range(20):  # and both equal greedy decoding written out
            best = attachment.model(step_by_step).logits[:, -1].argmax(dim=-1)
            step_by_step = torch.cat([step_by_step, best[:, None]], dim=1)
        assert torch.equal(cached.sequences, step_by_step)
    assert not torch.equal(cached.sequences, untouched)


def test_attaching_adds_no_parameters_and_copies_none(base):
    before = [(p, p.data_ptr()) for p in base.model.parameters()]
    with attach(base.model, base.architecture) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        attachment.model(INPUT)
        after = list(attachment.model.parameters())
        assert all(
            p is q and p.data_ptr() == address
            for (p, address), q in zip(before, after, strict=True)
        )
        assert not any(True for _ in attachment.model.buffers()) or {
            id(b) for b in base.model.buffers()
        } == {id(b) for b in attachment.model.buffers()}


def test_detaching_puts_back_every_module_and_every_logit():
    for name in ("tiny-gpt2", "tiny-llama"):
        base = tiny(name)
        modules, state = (
            list(base.model.named_modules()),
            {k: bits(v) for k, v in base.model.state_dict().items()},
        )
        logits = base.model(INPUT).logits
        attachment = attach(base.model, base.architecture)
        attachment.bind(random_tensors(attachment, shape_of(2, 1), routed=True))
        assert not torch.equal(attachment.model(INPUT).logits, logits)
        attachment.detach()
        back = list(base.model.named_modules())
        assert [n for n, _ in back] == [n for n, _ in modules]
        assert all(a is b for (_, a), (_, b) in zip(back, modules, strict=True))
        assert bits(base.model(INPUT).logits) == bits(logits)
        assert {k: bits(v) for k, v in base.model.state_dict().items()} == state


def test_unbound_the_attached_model_is_the_base_to_the_bit(base):
    """In C it is so to the last digits (test_frozen_block.py)."""
    base.model.set_attn_implementation("eager")
    logits = base.model(INPUT).logits
    with attach(base.model, base.architecture) as attachment:
        assert bits(attachment.model(INPUT).logits) == bits(logits)
        attachment.bind(random_tensors(attachment, shape_of(1, 1), routed=True))
        attachment.model(INPUT)
        attachment.unbind()
        assert bits(attachment.model(INPUT).logits) == bits(logits)
        assert attachment.routings() == []


def test_binding_one_client_after_another_leaves_nothing_of_the_first(base):
    shapes = [
        (shape_of(1, 2), True),
        (shape_of(1, 0), True),
        (shape_of(2, 1, 4), False),
        (shape_of(1, 1, 2, 5), True),
    ]
    with attach(base.model, base.architecture) as attachment:
        clients = [
            random_tensors(attachment, s, routed, seed) for seed, (s, routed) in enumerate(shapes)
        ]
        alone = []
        for tensors in clients:
            attachment.unbind()
            attachment.bind(tensors)
            alone.append(attachment.model(INPUT).logits)
        for tensors, expected in [*zip(clients, alone, strict=True)][::-1]:
            attachment.bind(tensors)
            assert bits(attachment.model(INPUT).logits) == bits(expected)


def test_binding_moves_references_and_copies_nothing(base):
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
        attachment.bind(tensors)
        held = {
            id(t)
            for m in attachment.mixtures
            for lora in m.bound.loras
            for t in (*lora.A.values(), *lora.B.values())
        }
        held |= {id(m.bound.W_ED) for m in attachment.mixtures}
        held |= {
            id(t)
            for adapted in attachment.attention
            for lora in adapted.values()
            for t in (lora.A, lora.B)
        }
        assert held == {id(t) for t in tensors.values()}


def test_many_clients_and_experts_hold_the_base_once(tmp_path):
    gc.collect()
    before = tensors_in_memory()
    engine = start_engine(
        run_config(tmp_path, "ada bob cyd dan", experts={"rank": 3, "specialists": 3})
    )
    for client in engine.clients.values():
        client.evaluate("test")
        client.train(1, lambda level, nats: None)
    gc.collect()
    known = {id(t) for t in before} | {id(p) for p in engine.attachment.model.parameters()}
    sizes = {p.numel() for p in engine.attachment.model.parameters() if p.dim() == 2}
    copies = [
        tuple(t.shape) for t in tensors_in_memory() if id(t) not in known and t.numel() in sizes
    ]
    assert sizes == {257 * 16, 64 * 16, 16 * 48, 16 * 16} and copies == []


def tensors_in_memory():
    return [
        thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)
    ]  # isinstance wakes torch's shims


def test_the_router_is_there_only_where_there_is_a_choice(base):
    with attach(base.model, base.architecture) as attachment:
        routers = lambda g, s, routed: [  # noqa: E731
            slot for slot in attachment.slot_shapes(shape_of(g, s), routed) if slot.role == "router"
        ]
        assert routers(1, 0, True) == routers(0, 1, True) == routers(2, 2, False) == []
        assert routers(1, 1, True) == [Slot(0, "mlp", "router", "W"), Slot(1, "mlp", "router", "W")]


def test_every_mlp_and_attention_linear_has_its_pair(base):
    width, mlp = 16, {"tiny-gpt2": 64, "tiny-llama": 32}[base.name]
    with attach(base.model, base.architecture) as attachment:
        shapes = attachment.slot_shapes(shape_of(2, 1, 3, 5), routed=True)
    sites = {"tiny-gpt2": ["up", "down"], "tiny-llama": ["gate", "up", "down"]}[base.name]
    for layer in (0, 1):
        for part, rank in (("g0", 3), ("g1", 3), ("s0", 5)):
            for site in sites:
                inside, outside = (mlp, width) if site == "down" else (width, mlp)
                assert shapes[Slot(layer, site, part, "A")] == (rank, inside)
                assert shapes[Slot(layer, site, part, "B")] == (outside, rank)
        assert shapes[Slot(layer, "mlp", "router", "W")] == (3, width)
    attention = {
        str(s): shape for s, shape in shapes.items() if s.role == "attention" and s.layer == 0
    }
    if base.name == "tiny-gpt2":
        expected = {"c_attn.attention.A": (2, 16), "c_attn.attention.B": (48, 2)}
        expected |= {"c_proj.attention.A": (2, 16), "c_proj.attention.B": (16, 2)}
    else:
        expected = {f"{site}.attention.A": (2, 16) for site in "qkvo"}
        expected |= {"q.attention.B": (16, 2), "k.attention.B": (8, 2), "v.attention.B": (8, 2)}
        expected |= {"o.attention.B": (16, 2)}
    assert attention == {f"0.{name}": shape for name, shape in expected.items()}
    assert len(shapes) == 2 * (3 * 2 * len(sites) + 1 + len(expected))


def test_all_clients_start_with_the_same_shared_tensors_and_their_own_private_ones(base):
    with attach(base.model, base.architecture) as attachment:
        shapes = attachment.slot_shapes(shape_of(2, 2), routed=True)
    ada, bob = starting_tensors(shapes, 42, "ada"), starting_tensors(shapes, 42, "bob")
    other_seed = starting_tensors(shapes, 43, "ada")
    for slot, tensor in ada.items():
        assert tensor.dtype == torch.float32 and tuple(tensor.shape) == shapes[slot]
        assert torch.equal(tensor, starting_tensors({slot: shapes[slot]}, 42, "ada")[slot])
        if slot.matrix == "B":
            assert not tensor.any()
        else:
            assert torch.equal(tensor, bob[slot]) == (slot.role in ("generalist", "attention"))
            assert not torch.equal(tensor, other_seed[slot])


def test_A_starts_kaiming_uniform_and_a_smaller_rank_is_the_larger_ones_first_rows():  # noqa: N802
    slot = Slot(0, "up", "g0", "A")
    large, small = (starting_tensors({slot: (rank, 100)}, 1, "ada")[slot] for rank in (64, 3))
    assert torch.equal(large[:3], small)
    bound = (6 / ((1 + 5) * 100)) ** 0.5  # Kaiming: sqrt(6 / ((1 + a^2) fan_in)), a = sqrt 5
    assert 0.999 * bound < large.abs().max() <= bound
    assert (
        large.std() == pytest.approx(bound / 3**0.5, rel=0.02) and abs(large.mean()) < 0.05 * bound
    )


def test_a_router_starts_close_to_uniform_mixing():
    slot = Slot(0, "mlp", "router", "W")
    W = starting_tensors({slot: (4, 2000)}, 1, "ada")[slot]
    assert W.std() == pytest.approx(0.02, rel=0.05)
