"""What stands around the experts in a block, on CPUs in C: norms, and attention with rotation.

The modules of the base stay as they are; only what they compute by is replaced, on the module
itself. A family whose attention is not named here keeps its own. The output layer is computed in C
for one token at a time, as text is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from comigs.bases import attention, norm
from comigs.bases.rotation import rotated
from comigs.bases.rotation import takes as rotates
from comigs.experts.lora import LoraLinear, adapted
from comigs.experts.token import quicker

# Their forward pass is `transformers`' for Llama, with norms of each head where it has them.
ATTENTIONS = (
    "LlamaAttention",
    "MistralAttention",
    "MinistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "GraniteAttention",
)


def quicker_modules(
    model: Any, loras: Sequence[Mapping[str, LoraLinear]], blocks: str
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield modules of a base, and what computes the same as each of them.

    loras: of each block, its attention linears by their site. There are none where the base was
    told to compute attention in another way: then it stays as `transformers` made it.
    """
    if model.config._attn_implementation != attention.NAME:
        return
    for module in model.modules():
        if (compute := norm.in_c(module)) is not None:
            yield module, compute
    head = model.get_output_embeddings()
    if (compute := quicker(head, model.dtype)) is not None:
        yield head, compute
    for block, adapted_linears in zip(model.get_submodule(blocks), loras, strict=True):
        for module in block.modules():
            if type(module).__name__ in ATTENTIONS:
                yield module, partial(attend, module, module.forward, adapted_linears)


def attend(  # noqa: PLR0913 (these are transformers' to choose)
    module: Any,
    own: Callable[..., Any],
    loras: Mapping[str, LoraLinear],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Return what a module's own forward pass does: attention (B, L, D), and None for its weights.

    own: that forward pass, for what is not written here.
    """
    (cos, sin), (B, L, _), d = position_embeddings, hidden_states.shape, module.head_dim
    if not rotates(hidden_states, cos) or cos.shape[-1] != d:
        return own(  # type: ignore[no-any-return]
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
    # Heads stay where the linears left them, (B, L, H, d), until attention reads them.
    projected = adapted(hidden_states, [loras[site] for site in ("q", "k", "v")])
    q, k, v = (heads.view(B, L, -1, d) for heads in projected)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    found, weights = attention.attend(module, q, k, v, attention_mask, module.scaling)
    return loras["o"](found.flatten(2)), weights
