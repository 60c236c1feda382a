"""This module lets a model answer many questions at once, always by the likeliest token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from comigs.bases.chat_encoder import ChatEncoder

THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


class Written(NamedTuple):
    """A written answer. is_cut: it had not ended when no more was written."""

    text: str
    is_cut: bool


def write_answers(
    model: Any,
    encoder: ChatEncoder,
    prompts: Sequence[list[int]],
    longest: int,
    batch_size: int,
) -> list[Written]:
    """Return what a `transformers` model writes after each prompt, up to the end of its answer.

    prompts: tokens. longest: tokens of an answer, of which more are not written. batch_size:
    prompts at once; 1 also means that nothing is kept from one token to the next, as a router that
    reads the whole text needs.
    """
    window = encoder.longest
    written: dict[int, Written] = {}
    for numbers in _batches(prompts, batch_size, window - longest):
        width = max(len(prompts[number]) for number in numbers)
        # Shorter ones are filled up on the left, so that all go on at the same place.
        pad = min(encoder.ends)
        rows = [[pad] * (width - len(prompts[number])) + prompts[number] for number in numbers]
        mask = [[0] * (width - len(prompts[n])) + [1] * len(prompts[n]) for n in numbers]
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=min(longest, window - width),
                do_sample=False,
                eos_token_id=sorted(encoder.ends),
                pad_token_id=pad,
                use_cache=batch_size > 1,
            )
        for number, ids in zip(numbers, output[:, width:].tolist(), strict=True):
            written[number] = _written(encoder, ids)
    return [written[number] for number in range(len(prompts))]


def _batches(prompts: Sequence[list[int]], batch_size: int, most: int) -> Iterator[list[int]]:
    """Yield the numbers of prompts that are answered together, those of like length.

    A prompt of more than `most` tokens has less room than others for its answer, and goes alone.
    """
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    short = [number for number in by_length if len(prompts[number]) <= most]
    for first in range(0, len(short), batch_size):
        yield short[first : first + batch_size]
    for number in by_length[len(short) :]:
        yield [number]


def _written(encoder: ChatEncoder, ids: list[int]) -> Written:
    """Return an answer's tokens up to the one that ends it as text."""
    ends = (place for place, id in enumerate(ids) if id in encoder.ends)
    end = next(ends, None)
    ids = ids[:end]
    text: str = encoder.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    # A base that thinks may do so though it is told not to; its answer stands behind that.
    return Written(THOUGHT.sub("", text).strip(), is_cut=end is None)
