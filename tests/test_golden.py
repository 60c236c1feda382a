"""The mixture against the authors' own module: logits, loss, gradients and balance term
(golden/README.md).
"""

import pytest
import torch
from torch.nn import functional as F

from comigs.experts.router import balance_loss, route
from tests.golden import load

pytestmark = pytest.mark.usefixtures("way")
CASES = ["case1_E2_k2", "case2_E3_k2", "case3_E2_k1", "case4_E1", "case6_E2_norouter"]


@pytest.fixture(params=CASES)
def case(request):
    tensors, metadata = load.read(request.param)
    return request.param, tensors, load.config_of(metadata)


def forward(tensors, config, dtype=torch.float32):
    """Attachment, trained tensors, logits (2, 16, 256), cross-entropy, and each block's output."""
    attachment = load.attached(tensors, config["topk_exp"], dtype)
    outputs = []
    for block in attachment.model.transformer.h:
        block.register_forward_hook(
            lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    kinds = ["lora."] if config["is_no_router"] else ["lora.", "router."]
    trained = {
        s: t.to(dtype).requires_grad_()
        for kind in kinds
        for s, t in load.slots(tensors, kind).items()
    }
    attachment.bind(trained)
    logits = attachment.model(tensors["input_ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tensors["targets"].flatten())
    return attachment, trained, logits, loss, outputs


def test_logits_and_loss_equal_the_authors_in_float32(case):
    _, tensors, config = case
    _, _, logits, loss, _ = forward(tensors, config, torch.float32)
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, tensors["loss_reported"].squeeze(), rtol=0, atol=1e-5)


def test_logits_and_loss_equal_the_authors_in_float64(case):
    name, tensors, config = case
    exact, _ = load.read(f"{name}.f64")
    _, _, logits, loss, _ = forward(tensors, config, torch.float64)
    # the authors take the routing softmax in float32 by force where K > 1
    tolerance = (
        1e-7
        if config["topk_exp"] > 1 and config["expert_num"] > 1 and not config["is_no_router"]
        else 1e-12
    )
    torch.testing.assert_close(logits, exact["logits"], rtol=0, atol=tolerance)
    torch.testing.assert_close(loss, exact["loss_reported"].squeeze(), rtol=0, atol=tolerance)


def test_balance_term_of_the_recorded_tensor_equals_the_authors(case):
    _, tensors, config = case
    if config["is_no_router"] or config["expert_num"] == 1:
        pytest.skip("no router")
    for layer in range(2):
        W_ED = tensors[f"router.transformer.h.{layer}.mlp.per_token_router.weight"]
        routing = route(tensors[f"act.block{layer}.out"].flatten(0, 1) @ W_ED.T, config["topk_exp"])
        term = balance_loss(routing, config["expert0_importance"])
        torch.testing.assert_close(term, tensors["lb_per_layer"][layer], rtol=0, atol=1e-6)


def test_gradients_equal_the_authors(case):
    _, tensors, config = case
    attachment, trained, _, loss, outputs = forward(tensors, config)
    if attachment.routings():  # the authors' balance term reads the block's output
        terms = [
            balance_loss(
                route(out.flatten(0, 1) @ mixture.bound.W_ED.T, config["topk_exp"]),
                config["expert0_importance"],
            )
            for out, mixture in zip(outputs, attachment.mixtures, strict=True)
        ]
        loss = loss + config["load_balancing_lambda"] * torch.stack(terms).mean()
    loss.backward()
    expected = load.slots(tensors, "grad.")
    for slot, tensor in trained.items():
        torch.testing.assert_close(
            tensor.grad, expected[slot], rtol=0, atol=1e-5, msg=lambda m, s=slot: f"{s}: {m}"
        )
