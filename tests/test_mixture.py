"""The mixture against a naive implementation in which every expert is a whole MLP (tests/naive.py),
and PEFT.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from comigs.bases import llama
from comigs.bases.load import architecture_of
from comigs.config import ExpertsSection
from comigs.experts import activation, hidden_torch
from comigs.experts.attach import Attachment, Layout
from comigs.slots import Slot
from tests import naive
from tests.conftest import attach, copy_of, random_tensors, shape_of, tiny
from tests.families import CONFIGS, built, randomised

pytestmark = pytest.mark.usefixtures("way")  # of conftest.py: the hidden layer, too
EXPERTS_AND_TOP_K = [(E, K) for E in (1, 2, 3, 4) for K in range(1, E + 1)]


def loss_and_gradients(model, embeddings, targets, tensors):
    """Logits, and the gradients to all trained tensors and to the model's input."""
    x = embeddings.clone().requires_grad_()
    logits = model(inputs_embeds=x).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, [*tensors.values(), x], materialize_grads=True)
    return logits.detach(), dict(zip([*map(str, tensors), "input"], gradients, strict=True))


def assert_equals_naive(
    model, architecture, shape, top_k, routed, tolerance=1e-5, dtype=torch.float32, routing="token"
):
    """Forward and gradients of the attached model and of the naive one, from the same tensors and
    input.
    """
    model = model.to(dtype)
    random = torch.Generator().manual_seed(5)
    embeddings = torch.randn((2, 7, 16), generator=random, dtype=torch.float64).to(dtype)
    targets = torch.randint(97, (2, 7), generator=random)
    with attach(model, architecture, top_k, routing=routing) as attachment:
        tensors = random_tensors(attachment, shape, routed, dtype=dtype)
        trained = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
        attachment.bind(trained)
        logits, gradients = loss_and_gradients(attachment.model, embeddings, targets, trained)
        assert len(attachment.routings()) == (2 if routed and shape.num_experts > 1 else 0)
    again = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
    expected, expected_gradients = loss_and_gradients(
        naive.naive_model(model, again, top_k, routing=routing), embeddings, targets, again
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)
    unused = [name for name, gradient in expected_gradients.items() if not gradient.any()]
    # with few tokens, an expert may be nobody's first choice; a whole client leaves all but K of
    # its experts unused
    assert len(unused) == 0 or top_k == 1 or (routing == "client" and top_k < shape.num_experts)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("num_experts", "top_k"), EXPERTS_AND_TOP_K)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_forward_and_gradients_equal_the_naive_mixture(model_type, num_experts, top_k):
    model = built(model_type)
    assert_equals_naive(
        model, architecture_of(model), shape_of(1, num_experts - 1), top_k, routed=True
    )


@pytest.mark.parametrize("routing", ["sequence", "client"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_routing_by_sequence_and_by_client_equals_the_naive_mixture(
    model_type, num_experts, top_k, routing
):
    model = built(model_type)
    shape = shape_of(1, num_experts - 1)
    assert_equals_naive(model, architecture_of(model), shape, top_k, routed=True, routing=routing)


@pytest.mark.parametrize("routing", ["token", "sequence", "client"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_written_later_changes_nothing_before_it(model_type, routing):
    """Logits and routing weights of a text's beginning, whatever follows and whatever stands beside
    it.
    """
    model = built(model_type)
    ids = torch.randint(97, (3, 10), generator=torch.Generator().manual_seed(4))
    with attach(model, architecture_of(model), routing=routing) as attachment:
        attachment.bind(random_tensors(attachment, shape_of(1, 2), routed=True))
        logits = attachment.model(ids).logits
        weights = [r.weights_TE.reshape(3, 10, 3) for r in attachment.routings()]
        other = ids.clone()
        other[0, 6:] = (other[0, 6:] + 1) % 97
        other[2] = (other[2] + 1) % 97
        changed = attachment.model(other).logits
        others = [r.weights_TE.reshape(3, 10, 3) for r in attachment.routings()]
    for sequence, same_until in ((0, 6), (1, 10)):
        here = (sequence, slice(same_until))
        torch.testing.assert_close(changed[here], logits[here], rtol=0, atol=1e-5)
        for one, two in zip(weights, others, strict=True):
            torch.testing.assert_close(one[here], two[here], rtol=0, atol=1e-5)
    assert (changed[0, 6:] - logits[0, 6:]).abs().max() > 1e-3
    varies = [w.std(dim=1).max() > 1e-3 for w in weights]
    assert all(varies) if routing != "client" else not any(varies)


def test_routing_by_client_is_the_softmax_of_the_routers_weights():
    model = built("gpt2")
    with attach(model, architecture_of(model), top_k=3, routing="client") as attachment:
        tensors = random_tensors(attachment, shape_of(1, 2), routed=True)
        attachment.bind(tensors)
        attachment.model(torch.arange(9)[None])
        routers = [t for slot, t in sorted(tensors.items()) if slot.role == "router"]
        for router, routing in zip(routers, attachment.routings(), strict=True):
            assert router.shape == (3, 1)
            torch.testing.assert_close(routing.weights_TE, router[:, 0].softmax(0).expand(9, 3))


def one_expert(tensors, parts, alpha=16.0):
    """`parts` as one expert "g0" of all their ranks: rows of the A's, columns of the B's times
    their own scale.
    """
    whole = {slot: t for slot, t in tensors.items() if slot.part not in parts}
    for layer, site in {(slot.layer, slot.site) for slot in tensors if slot.part in parts}:
        A, B = ([tensors[Slot(layer, site, part, matrix)] for part in parts] for matrix in "AB")
        total = sum(len(a) for a in A)
        scaled = [b * alpha / len(a) ** 0.5 for a, b in zip(A, B, strict=True)]
        whole[Slot(layer, site, "g0", "A")] = torch.cat(A)
        whole[Slot(layer, site, "g0", "B")] = torch.cat(scaled, dim=1) * total**0.5 / alpha
    return whole


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        (shape_of(1, 1, 2, 5), ("g0", "s0")),
        (shape_of(2, 1), ("g0", "g1", "s0")),
        (shape_of(1, 0), ("g0",)),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_experts_whose_sum_adapts_the_base_equal_one_expert_of_all_their_factors(
    model_type, shape, parts
):
    """Forward and gradients; ranks may differ, and so do the scales."""
    model = built(model_type)
    random = torch.Generator().manual_seed(5)
    embeddings, targets = (
        torch.randn((2, 7, 16), generator=random),
        torch.randint(97, (2, 7), generator=random),
    )
    with Attachment(
        model, architecture_of(model), ExpertsSection(strength="each"), Layout(summed=True)
    ) as attachment:
        tensors = random_tensors(attachment, shape, routed=False)
        trained = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
        attachment.bind(trained)
        logits, gradients = loss_and_gradients(attachment.model, embeddings, targets, trained)
        assert attachment.routings() == []
    again = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
    plain = naive.naive_model(model, one_expert(again, parts), 1)
    expected, expected_gradients = loss_and_gradients(plain, embeddings, targets, again)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for name, gradient in expected_gradients.items():
        assert gradient.any()
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("num_experts", "top_k", "routed"), [(1, 1, False), (2, 2, True), (3, 1, True)]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_is_merged_equals_a_base_whose_weights_are_changed_by_it(
    model_type, num_experts, top_k, routed
):
    """In every linear of MLP and attention; forward and all gradients, the input's too."""
    model = built(model_type)
    architecture, shape = architecture_of(model), shape_of(1, num_experts - 1)
    random = torch.Generator().manual_seed(5)
    embeddings, targets = (
        torch.randn((2, 7, 16), generator=random),
        torch.randint(97, (2, 7), generator=random),
    )
    changed = copy.deepcopy(model)
    with attach(model, architecture, top_k) as attachment:
        tensors = random_tensors(attachment, shape, routed)
        shapes = attachment.slot_shapes(shape, routed, merges=True)
        merged = {
            s: 0.1 * torch.randn(dims, generator=random)
            for s, dims in shapes.items()
            if s.role == "merged"
        }
        assert shapes.keys() == tensors.keys() | merged.keys()
        trained = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
        attachment.bind(trained | merged)
        logits, gradients = loss_and_gradients(attachment.model, embeddings, targets, trained)
        attachment.bind(tensors)
        without = attachment.model(inputs_embeds=embeddings).logits
        attachment.unbind()
        bare = attachment.model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(bare, changed(inputs_embeds=embeddings).logits, rtol=0, atol=1e-5)
    blocks = changed.get_submodule(architecture.blocks)
    paths = {site: f"mlp.{name}" for site, name in architecture.mlp_linears().items()} | dict(
        architecture.attention
    )
    assert {(s.layer, s.site) for s in merged} == {
        (layer, site) for layer in range(2) for site in paths
    }
    for slot, change in merged.items():
        linear = blocks[slot.layer].get_submodule(paths[slot.site])
        linear.weight.data += change if isinstance(linear, torch.nn.Linear) else change.T
    again = {slot: t.clone().requires_grad_() for slot, t in tensors.items()}
    expected, expected_gradients = loss_and_gradients(
        naive.naive_model(changed, again, top_k), embeddings, targets, again
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
    assert (logits - without).abs().max() > 0.05
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_uniform_mixing_equals_the_naive_mean_of_experts(model_type, num_experts):
    model = built(model_type)
    assert_equals_naive(
        model, architecture_of(model), shape_of(num_experts, 0), top_k=1, routed=False
    )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_unequal_ranks_of_generalists_and_specialists_equal_the_naive_mixture(model_type, top_k):
    model = built(model_type)
    shape = shape_of(2, 1, rank=2, specialist_rank=5)
    assert_equals_naive(model, architecture_of(model), shape, top_k, routed=True)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_known_model_family_equals_the_naive_mixture(model_type):
    model = built(model_type)
    assert model.config.model_type == model_type
    # Multipliers and norms after the MLP make gradients, and so what rounding does to them, larger.
    assert_equals_naive(
        model, architecture_of(model), shape_of(1, 2), top_k=2, routed=True, tolerance=3e-5
    )


def test_the_families_tested_are_all_there_are():
    assert set(CONFIGS) == {"gpt2", *llama.ARCHITECTURE.model_types}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_several_chunks_of_tokens_equal_the_naive_mixture(model_type, monkeypatch):
    monkeypatch.setattr(
        hidden_torch, "CHUNK", 5 * 64
    )  # 14 tokens in chunks of 5 or 13, of which the last is shorter
    model = built(model_type)
    assert_equals_naive(model, architecture_of(model), shape_of(1, 2), top_k=2, routed=True)


@pytest.mark.parametrize(
    ("length", "largest", "sizes"),
    [(14, 5, [5, 5, 4]), (12, 5, [4, 4, 4]), (3, 9, [3]), (2, 0, [1, 1]), (0, 5, [])],
)
def test_even_slices(length, largest, sizes):
    slices = hidden_torch.even_slices(length, largest)
    assert [s.stop - s.start for s in slices] == sizes
    assert [i for s in slices for i in range(length)[s]] == list(range(length))


@pytest.mark.parametrize("name", ["gelu", "relu", "gelu_10", "gelu_pytorch_tanh", "silu"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_any_activation_equals_the_naive_mixture(model_type, name):
    """Most are not spelled out and go through autograd."""
    config = copy.deepcopy(CONFIGS[model_type])
    config.activation_function = config.hidden_act = name
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(config))
    assert_equals_naive(model, architecture_of(model), shape_of(1, 1), top_k=2, routed=True)


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        (activation.GELU, lambda x: F.gelu(x, approximate="tanh")),
        (activation.SILU, F.silu),
        (activation.by_autograd(F.gelu), F.gelu),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_activations_and_their_slopes(ours, reference, dtype, tolerance):
    x = (
        torch.cat([torch.linspace(-100, 100, 41), torch.linspace(-9, 9, 500)])
        .double()
        .requires_grad_()
    )
    y = reference(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    value, both, our_slope = (x.detach().to(dtype).clone() for _ in range(3))
    ours.value(value, torch.empty_like(value))
    ours.value_and_slope(both, our_slope, torch.empty_like(both))
    for found, expected in ((value, y), (both, y), (our_slope, slope)):
        torch.testing.assert_close(
            found.double(), expected.detach(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tolerance"), [(1, 1, 1e-12), (3, 1, 1e-12), (3, 2, 1e-6)]
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_differs_in_float32_is_rounding_alone(model_type, num_experts, top_k, tolerance):
    """In float64 the differences vanish too; K >= 2 takes its softmax in float32, as the authors
    do.
    """
    model = built(model_type)
    shape = shape_of(1, num_experts - 1)
    assert_equals_naive(model, architecture_of(model), shape, top_k, True, tolerance, torch.float64)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_in_bfloat16_the_mixture_is_as_far_from_float32_as_the_naive_one(model_type, how):
    model = built(model_type)
    architecture = architecture_of(model)
    input_ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
    with attach(model, architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 1), routed=True)
    exact = naive.naive_model(model, tensors, 2)(input_ids).logits

    def distance(logits):
        return float((logits.float() - exact).square().mean().sqrt())

    low = model.to(torch.bfloat16) if how == "weights" else model
    cast = (
        tensors
        if how == "autocast"
        else {slot: t.to(torch.bfloat16) for slot, t in tensors.items()}
    )
    slow = naive.naive_model(low, cast, 2)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        attach(low, architecture) as attachment,
    ):
        attachment.bind(tensors)  # trained tensors stay float32
        ours, theirs = (
            distance(attachment.model(input_ids).logits),
            distance(slow(input_ids).logits),
        )
    assert ours < 0.03 * float(exact.std())
    assert ours < 2 * theirs


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft on transformers 5
def test_one_expert_equals_peft(name, scaling):
    base = tiny(name)
    randomised(base.model)
    is_gpt2 = name == "tiny-gpt2"
    targets = (
        ["c_attn", "c_proj", "c_fc"]
        if is_gpt2
        else [*naive.LLAMA_MLP.values(), *naive.LLAMA_ATTENTION.values()]
    )
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=16,
        use_rslora=scaling == "rslora",
        target_modules=targets,
        fan_in_fan_out=is_gpt2,
    )
    theirs = peft.get_peft_model(copy.deepcopy(base.model), lora)
    input_ids = torch.randint(257, (2, 12), generator=torch.Generator().manual_seed(2))
    with attach(base.model, base.architecture, scaling=scaling) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 0, rank=2), routed=True)
        attachment.bind(tensors)
        logits = attachment.model(input_ids).logits
    state = {}
    paths = {site: f"mlp.{name}" for site, name in base.architecture.mlp_linears().items()}
    for slot, tensor in tensors.items():
        path = (
            base.architecture.attention[slot.site] if slot.role == "attention" else paths[slot.site]
        )
        state[
            f"base_model.model.{base.architecture.blocks}.{slot.layer}.{path}.lora_{slot.matrix}.weight"
        ] = tensor
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora" in key]
    torch.testing.assert_close(logits, theirs(input_ids).logits, rtol=0, atol=1e-5)
    assert (logits - base.model(input_ids).logits).abs().max() > 0.1


def test_zero_experts_and_a_router_are_the_base_itself(base):
    input_ids = torch.arange(20)[None]
    untouched = base.model(input_ids).logits
    with attach(base.model, base.architecture) as attachment:
        tensors = random_tensors(attachment, shape_of(1, 2), routed=True)
        attachment.bind(
            {slot: t.zero_() if slot.matrix == "B" else t for slot, t in copy_of(tensors).items()}
        )
        torch.testing.assert_close(attachment.model(input_ids).logits, untouched, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "mixing"),
    [
        (2, 2, "routed"),
        (3, 3, "routed"),
        (2, 1, "uniform"),
        (3, 2, "uniform"),
        (3, 1, "sum"),
        (1, 1, "uniform"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_experts_that_share_the_weight_evenly_act_like_one_lora_of_all_their_ranks(
    model_type, num_experts, top_k, mixing
):
    """Exact where the experts' hidden layers are equal (LoRA on `down` alone), and for a sum
    everywhere.
    """
    model, rank = built(model_type), 3
    tokens = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    settings = ExpertsSection(top_k=top_k, strength="together")
    layout = Layout(summed=mixing == "sum")
    with Attachment(model, architecture_of(model), settings, layout) as attachment:
        many = random_tensors(attachment, shape_of(num_experts, 0, rank), routed=mixing == "routed")
        for slot, tensor in many.items():
            if slot.role == "router" or (
                mixing != "sum" and slot.matrix == "B" and slot.site in ("up", "gate")
            ):
                tensor.zero_()
        attachment.bind(many)
        logits = model(tokens).logits
        one = {s: t for s, t in many.items() if s.role == "attention"}
        for slot in (s for s in many if s.part == "g0"):
            factors = [
                many[Slot(slot.layer, slot.site, f"g{e}", slot.matrix)] for e in range(num_experts)
            ]
            one[slot] = torch.cat(factors, dim=0 if slot.matrix == "A" else 1)
        attachment.bind(one)
        torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-5)
        attachment.bind({})
        assert (logits - model(tokens).logits).abs().max() > 1e-3
