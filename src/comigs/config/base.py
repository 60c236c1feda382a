"""This module holds the section of a config that says which base clients share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from comigs.config.sections import Section
from comigs.config.templates import TEMPLATES
from comigs.text import parsed_size

NAMED_BASES = (
    "mini", "smollm2-135m", "tiny-gpt2", "tiny-llama",
    "gemma3-270m", "random-smollm2-135m", "random-llama-3.2-1b", "random-qwen3-1.7b",
)  # fmt: skip


class BaseSection(Section):
    """[base] says which frozen language model all clients share, and how it computes."""

    name: str = Field(
        "mini",
        description=f"The base is {', '.join(NAMED_BASES)}, a local folder (models/mine) or "
        "a .gguf file beside the config file or in the working folder, or a name on the Hugging "
        "Face hub (docs/bases.md).",
    )
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = Field(
        "auto",
        description="The frozen weights and autocast have this type. auto is bfloat16 where the "
        "device is fast at it, else float32.",
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="Attention is computed this way. auto is sdpa on a GPU; on a CPU the frozen "
        "block's attention and norms are computed in C where there is a compiler (docs/performance."
        "md). eager and sdpa are those of transformers, and leave the block as it is.",
    )
    weights: Literal["whole", "int8", "int4"] = Field(
        "whole",
        description="The frozen linears of the blocks are held in memory whole, in dtype; or in 8 "
        "or 4 bits a number with a scale for 32 of them, and unpacked one after the other where "
        "they are wanted (docs/performance.md). Embedding and head stay whole.",
    )
    recompute: bool = Field(
        False,
        description="true: of each block training keeps what goes in, and computes the block again "
        "for its gradient. That is less memory, and about a third more time.",
    )
    memory: str | None = Field(
        None,
        description='A process of the run stays below so much memory, as "1.5GB" or "900MB": '
        "client.micro_batch_size and evaluation.batch_size become as small as that takes, and "
        "then recompute true. What is learnt is the same; --dry-run shows what each budget costs. "
        "Only on a CPU, and not in a federation, where each device's owner says how much "
        "(--max-memory). None: nothing is chosen.",
    )
    device: str = Field(
        "auto",
        description='The base computes on "cpu", "cuda", "cuda:1", ...; auto is cuda where there '
        "is one, else cpu.",
    )
    tokenizer: Literal["own", "gpt-2"] = Field(
        "own",
        description="This rule cuts text into words before they are cut into tokens. own is the "
        "base's own rule. gpt-2 is for smollm2-135m only: runs from before this field read it so, "
        "and go on with it.",
    )
    chat_template: str | None = Field(
        None,
        description="This Jinja template makes one text of a chat, for learning and for writing. "
        f"{' and '.join(TEMPLATES)} are ours (docs/data.md); what has a brace is the template "
        "itself, anything else is a file beside the config file, whose text goes into the run. "
        "None: the base's own.",
    )
    threads: int | None = Field(
        None,
        gt=0,
        le=1024,
        description="Each process uses this many CPU threads. None: as many as torch finds, or its "
        "share of the cores where there are several workers. The run records the number, and a "
        "resumed run uses it again.",
    )

    @field_validator("weights")
    @classmethod
    def _packed_is_not_exact(cls, value: str, info: ValidationInfo) -> str:
        if value != "whole" and info.data.get("dtype") == "float64":
            raise ValueError("is not for base.dtype float64; allowed there: whole")
        return value

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, value: str | None) -> str | None:
        if value is not None and not parsed_size(value):
            raise ValueError(
                "is no size; allowed: a number of kB, MB, GB, KiB, MiB or GiB, as 1.5GB"
            )
        return value

    @field_validator("chat_template")
    @classmethod
    def _template_has_braces(cls, value: str | None) -> str | None:
        if value is not None and "{" not in value:
            raise ValueError("is no Jinja template, which has braces")
        return value
