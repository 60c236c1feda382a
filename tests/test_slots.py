"""Slots: the one address of every trainable tensor, and the one thing that says what may leave a
client.
"""

from __future__ import annotations

import pytest

from comigs.slots import Slot, expert_parts

ROLES = {
    "g0": "generalist",
    "g12": "generalist",
    "s0": "specialist",
    "s3": "specialist",
    "router": "router",
    "attention": "attention",
    "rest": "rest",
}


@pytest.mark.parametrize(("part", "role"), ROLES.items())
def test_the_part_decides_the_role(part, role):
    assert Slot(0, "up", part, "A").role == role


@pytest.mark.parametrize("part", ROLES)
@pytest.mark.parametrize("matrix", ["A", "B", "W"])
@pytest.mark.parametrize("layer", [0, 7, 120])
def test_text_and_back(layer, part, matrix):
    slot = Slot(layer, "c_attn", part, matrix)
    assert str(slot) == f"{layer}.c_attn.{part}.{matrix}" and Slot.parse(str(slot)) == slot


NO_SLOTS = [
    "",
    "0.up.g0",
    "0.up.g0.A.B",
    "x.up.g0.A",
    "-1.up.g0.A",
    "0.up.g.A",
    "0.up.h0.A",
    "0.up.g0.C",
    "0.up.generalist.A",
    "0.up.g-1.A",
    "0.up.s.B",
    "0.up.routers.W",
    "0.up.g0.a",
    "01.up.g0.A",
    "+1.up.g0.A",
    " 1.up.g0.A",
    "1_0.up.g0.A",
    "0.up.g00.A",
    "0.up.g².A",
    "0..g0.A",
    "٣.up.g0.A",
    "0.up.g0.A\n",
]


@pytest.mark.parametrize("text", NO_SLOTS)
def test_anything_else_is_refused(text):
    """One tensor has one name: two spellings of a slot could slip past a check of names."""
    with pytest.raises(ValueError, match="is no slot"):
        Slot.parse(text)


def test_slots_are_keys_and_have_an_order():
    slots = [
        Slot(1, "up", "g0", "A"),
        Slot(0, "up", "s0", "B"),
        Slot(0, "up", "s0", "A"),
        Slot(0, "down", "s0", "A"),
    ]
    assert sorted(slots) == slots[:0:-1] + slots[:1]
    assert {Slot(0, "up", "g0", "A"): 1}[Slot(0, "up", "g0", "A")] == 1


def test_generalists_come_first_in_the_routers_order():
    assert expert_parts(2, 3) == ["g0", "g1", "s0", "s1", "s2"]
    assert expert_parts(1, 0, others=True) == ["g0", "rest"]
    assert expert_parts(0, 1) == ["s0"]
