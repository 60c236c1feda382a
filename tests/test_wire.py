"""Messages as bytes: what goes in comes out, as exactly as its format says, and nothing strange
gets in.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from comigs.server import wire
from comigs.server.wire import WireError
from comigs.slots import Slot
from tests.conftest import bits, same

FORMATS = ("float32", "bfloat16", "int8")
SHAPES = [(1, 1), (2, 16), (16, 2), (8, 5), (1, 40), (33, 3)]


class Note(wire.Head):
    """A head, as messages have one."""

    text: str
    number: float
    lines: tuple[dict[str, Any], ...] = ()


NOTES = TypeAdapter(Note)
ROOM = 1 << 20


def generator(seed):
    return torch.Generator().manual_seed(seed)


def tensors(seed, scale=1.0):
    """One tensor of each shape, of rows that differ in size by many orders, some of them zero."""
    draw = generator(seed)
    made = {}
    for number, shape in enumerate(SHAPES):
        rows = 10.0 ** torch.randint(-12, 3, (shape[0], 1), generator=draw)
        rows[torch.rand(shape[0], 1, generator=draw) < 0.2] = 0
        made[Slot(number, "up", "g0", "AB"[number % 2])] = (
            torch.randn(shape, generator=draw) * rows * scale
        )
    return made


def shapes_of(upload):
    return {slot: tuple(tensor.shape) for slot, tensor in upload.items()}


def sent(upload, reference, format, residual=None):
    """What arrives of an upload, and what is left over."""
    encoded, left = wire.encode(upload, reference, format, residual or {})
    _, travelled = wire.unpack(wire.pack(Note(text="", number=0), encoded), NOTES, ROOM)
    assert size(encoded) == sum(wire.upload_bytes(upload, reference, format).values())
    return wire.decode(travelled, shapes_of(upload), reference, format), left, encoded


def size(encoded):
    return sum(tensor.nbytes for tensor in encoded.values())


@pytest.mark.parametrize("seed", range(10))
def test_a_message_comes_out_as_it_went_in(seed):
    draw = random.Random(seed)
    head = Note(
        text="".join(draw.choice('abc"\\\n é\x00') for _ in range(20)),
        number=draw.gauss(0, 10.0 ** draw.randint(-300, 300)),
        lines=({"b": draw.random(), "a": [1, None, draw.randint(-(1 << 60), 1 << 60)]},),
    )
    given = wire.plain(tensors(seed)) | {
        "x": torch.randn(3, 2).bfloat16(),
        "y": torch.tensor([[-128, 127]]).to(torch.int8),
    }
    raw = wire.pack(head, given)
    again, came = wire.unpack(raw, NOTES, len(raw))
    assert again == head and list(again.lines[0]) == ["b", "a"]
    assert same(came, given)
    assert wire.pack(again, dict(reversed(came.items()))) == raw  # equal content, equal bytes
    assert len(raw) < size(given) + 1500  # one flat payload, little else


@pytest.mark.parametrize("seed", range(5))
def test_float32_travels_as_it_is(seed):
    upload, reference = tensors(seed), tensors(seed + 100)
    came, left, encoded = sent(upload, reference, "float32")
    assert same(came, upload) and not left
    assert list(came) == list(upload)
    assert size(encoded) == size(upload)
    assert same(wire.as_received(reference, "float32"), reference)


@pytest.mark.parametrize("seed", range(5))
def test_bfloat16_is_torchs_rounding_in_half_the_bytes(seed):
    upload, reference = tensors(seed), tensors(seed + 100)
    came, left, encoded = sent(upload, reference, "bfloat16")
    assert (
        same(came, {slot: tensor.bfloat16().float() for slot, tensor in upload.items()})
        and not left
    )
    assert 2 * size(encoded) == size(upload)
    for format in ("bfloat16", "int8"):
        received = wire.as_received(reference, format)
        assert same(
            received, {slot: tensor.bfloat16().float() for slot, tensor in reference.items()}
        )


@pytest.mark.parametrize("seed", range(10))
def test_int8_is_off_by_half_a_level_at_most_and_keeps_what_it_left(seed):
    reference = wire.as_received(tensors(seed + 100), "int8")
    step = tensors(seed, scale=0.01)
    upload = {slot: reference[slot] + step[slot] for slot in step}
    came, left, encoded = sent(upload, reference, "int8")
    for slot, tensor in upload.items():
        true = tensor.double() - reference[slot].double()
        scale = encoded[f"{slot}/scale"]
        assert scale.shape == (len(tensor), 1) and same(
            {0: scale}, {0: (true.abs().amax(1, True) / 127).float()}
        )
        assert bool((left[slot].abs() <= scale / 2).all())
        whole = encoded[str(slot)].double() * scale.double()
        assert torch.allclose(whole + left[slot], true, rtol=1e-7, atol=0)
        assert same({0: came[slot]}, {0: (reference[slot].double() + whole).float()})
    assert size(encoded) == size(upload) / 4 + 4 * sum(len(tensor) for tensor in upload.values())


def test_int8_rounds_half_to_even_and_is_the_same_whoever_does_it():
    slot = Slot(0, "up", "g0", "A")
    levels = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    upload, reference = {slot: levels * 0.25}, {slot: torch.zeros(1, 7)}
    (first, left), (second, again) = (wire.encode(upload, reference, "int8", {}) for _ in range(2))
    assert first[str(slot)].tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    assert same(first, second) and same(left, again)


def test_with_error_feedback_the_sum_of_what_arrives_follows_the_sum_of_the_steps():
    """Without it, what is smaller than half a level never arrives, however often it is sent."""
    slot, draw = Slot(0, "up", "g0", "A"), generator(3)
    drift = (
        torch.randn(4, 32, generator=draw) * 1e-4
    )  # well below half a level, always the same way
    total, arrived, without = (torch.zeros(4, 32, dtype=torch.float64) for _ in range(3))
    residual, largest = {}, torch.zeros(4, 1)
    reference = {slot: torch.randn(4, 32, generator=draw)}
    for _ in range(200):
        step = drift.clone()
        step[:, 0] = torch.randn(4, generator=draw)  # the entry that decides the scale
        upload = {slot: (reference[slot].double() + step.double()).float()}
        true = upload[slot].double() - reference[slot].double()
        total += true
        encoded, residual = wire.encode(upload, reference, "int8", residual)
        largest = torch.maximum(largest, encoded[f"{slot}/scale"])
        arrived += encoded[str(slot)].double() * encoded[f"{slot}/scale"].double()
        plain, _ = wire.encode(upload, reference, "int8", {})
        without += plain[str(slot)].double() * plain[f"{slot}/scale"].double()
        assert bool((residual[slot].abs() <= encoded[f"{slot}/scale"] / 2).all())
        assert bool(
            ((arrived - total).abs() <= largest / 2 + 1e-6).all()
        )  # at any time, however long it goes on
    assert float((arrived - total)[:, 1:].norm()) < 0.3 * float(total[:, 1:].norm())
    assert float((without - total)[:, 1:].norm()) > 0.9 * float(total[:, 1:].norm())


def test_what_was_not_in_the_download_goes_as_bfloat16():
    upload, reference = tensors(1), tensors(2)
    first, *others = upload
    other_shape = {first: reference[first].new_zeros(7, 7)}
    for given in ({}, {slot: reference[slot] for slot in others}, reference | other_shape):
        came, left, encoded = sent(upload, given, "int8", {first: torch.ones_like(upload[first])})
        assert same({0: came[first]}, {0: upload[first].bfloat16().float()})
        assert first not in left  # it was of steps, and the whole was sent
        assert left.keys() == (given.keys() & set(others)) and f"{first}/scale" not in encoded


def test_what_is_left_over_waits_for_the_slots_next_turn():
    upload, reference = tensors(1), tensors(2)
    first, *others = upload
    _, left = wire.encode(upload, reference, "int8", {})
    _, later = wire.encode({slot: upload[slot] for slot in others}, reference, "int8", left)
    assert same({0: left[first]}, {0: later[first]})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_neither_sent_nor_taken(format, bad):
    upload, reference = tensors(1), tensors(2)
    first = next(iter(upload))
    encoded, _ = wire.encode(upload, reference, format, {})
    upload[first] = torch.full_like(upload[first], bad)
    with pytest.raises(WireError, match="not finite"):
        wire.encode(upload, reference, format, {})
    name = f"{first}/scale" if format == "int8" else str(first)
    encoded[name] = torch.full_like(encoded[name], bad)
    if format == "int8":
        encoded[str(first)].fill_(1)
    with pytest.raises(WireError, match="not finite"):
        wire.decode(encoded, shapes_of(upload), reference, format)


@pytest.mark.parametrize("format", FORMATS)
def test_an_upload_is_exactly_what_was_asked_for(format):
    upload, reference = tensors(1), tensors(2)
    encoded, _ = wire.encode(upload, reference, format, {})
    first = str(next(iter(upload)))
    others = {name: tensor for name, tensor in encoded.items() if name != first}
    for wrong in (
        others,
        {**encoded, "0.up.s0.A": torch.zeros(1, 1)},
        {**encoded, first: encoded[first].reshape(-1)},
        {**encoded, first: encoded[first][:, :0]},
        {**encoded, first: encoded[first].repeat(2, 1)},
        {**encoded, first: encoded[first].to(torch.float64)},
        {**encoded, first: encoded[first].to(torch.float16)},
        {},
    ):
        with pytest.raises(WireError) as error:
            wire.decode(wrong, shapes_of(upload), reference, format)
        assert "\n" not in str(error.value) and "s0" not in str(error.value)


def test_a_download_has_slots_and_finite_numbers_only():
    for bad in (
        {"../../etc": torch.zeros(1)},
        {"0.up.g0.A": torch.tensor([[float("nan")]])},
        {"0.up.g0.A": torch.zeros(1, 1, dtype=torch.int8)},
    ):
        with pytest.raises(WireError):
            wire.decode_download(bad)


def test_views_of_one_tensor_can_be_sent():
    whole = torch.randn(4, 4)
    download = {Slot(0, "up", "g0", "A"): whole[:2], Slot(1, "up", "g0", "A"): whole[:2]}
    for format in FORMATS:
        encoded = wire.encode_download(download, format)
        wire.pack(Note(text="", number=0), encoded)
        assert size(encoded) == wire.download_bytes(download, format)


def message(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def headed(text='{"text": "", "number": 0}', **entries):
    return {"__metadata__": {"comigs": text}, **entries}


FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
STRANGE = {
    "nothing": b"",
    "too short": b"\x00" * 8,
    "a pickle": pickle.dumps({"a": [1]}),
    "noise": random.Random(1).randbytes(5000),
    "a header of 2^63": struct.pack("<Q", 1 << 63) + b"{}" * 50,
    "a header longer than the message": struct.pack("<Q", 500) + b"{}",
    "a header longer than allowed": message(b" " * (2 << 20)),
    "no metadata": message({}),
    "metadata of another kind": message({"__metadata__": [1]}),
    "no head": message({"__metadata__": {"format": "pt"}}),
    "a head that is no JSON": message(headed("{")),
    "a head that is deep": message(headed("[" * 100_000)),
    "a header that is deep": message(b'{"a":' * 100_000),
    "a head with too much": message(headed('{"text": "", "number": 0, "more": 1}')),
    "a head with too little": message(headed('{"text": ""}')),
    "a head of other types": message(headed('{"text": "", "number": "0"}')),
    "NaN in the head": message(headed('{"text": "", "number": NaN}')),
    "a huge number": message(headed('{"text": "", "number": 1' + "0" * 5000 + "}")),
    "a tensor without data": message(
        headed(x={"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]})
    ),
    "a tensor larger than all": message(
        headed(x={"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]})
    ),
    "a negative shape": message(headed(x=FOUR | {"shape": [-1]}), b"1234"),
    "an unknown dtype": message(headed(x=FOUR | {"dtype": "PICKLE"}), b"1234"),
    "overlapping tensors": message(headed(**dict.fromkeys("xy", FOUR)), b"1234"),
    "data that nobody names": message(headed(), b"1234"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_strange_bytes_are_refused_in_a_few_words_and_little_memory(what):
    tracemalloc.start()
    try:
        with pytest.raises(WireError) as error:
            wire.unpack(STRANGE[what], NOTES, 4 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 100 and "\n" not in str(error.value)
    assert peak < 20 << 20


def test_a_message_that_is_too_long_is_not_looked_at():
    raw = wire.pack(Note(text="", number=0), {"x": torch.zeros(100, 100)})
    with pytest.raises(WireError, match="at most 1,000"):
        wire.unpack(raw, NOTES, 1000)


@pytest.mark.parametrize("seed", range(5))
def test_a_message_that_was_tampered_with_is_read_or_refused(seed):
    """Nothing but WireError, whatever bytes change, go or come."""
    draw = random.Random(seed)
    upload, reference = tensors(seed), tensors(seed + 1)
    whole = wire.pack(
        Note(text="secret", number=1.5), wire.encode(upload, reference, "int8", {})[0]
    )
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(raw), 3000))
            match draw.randrange(3):
                case 0:
                    raw[at] = draw.randrange(256)
                case 1:
                    del raw[at : at + draw.randint(1, 50)]
                case 2:
                    raw[at:at] = draw.randbytes(draw.randint(1, 50))
        try:
            _, came = wire.unpack(bytes(raw), NOTES, ROOM)
            wire.decode(came, shapes_of(upload), reference, "int8")
        except WireError as error:
            assert "secret" not in str(error)


def test_bits_of_a_tensor_do_not_depend_on_where_it_lay_in_a_message():
    """What is computed from it may: so it is copied to where torch would have put it."""
    slot = Slot(0, "up", "g0", "A")
    _, came = wire.unpack(
        wire.pack(Note(text="x", number=0), {str(slot): torch.randn(3, 3)}), NOTES, ROOM
    )
    taken = wire.decode_download(came)[slot]
    assert taken.data_ptr() % 64 == 0 and bits(taken) == bits(came[str(slot)])
