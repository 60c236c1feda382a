"""Named generators: one seed, streams that know nothing of each other."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np

from comigs.seeds import generator

NAMES = [
    (),
    ("batch",),
    ("batch", "fr"),
    ("batch", "fr", "train", 1),
    ("batch", "fr", "train", 11),
    ("batch", "fr", "train", "1"),
    ("batch", "fr", "valid", 1),
    ("batch", "de", "train", 1),
    ("batch", "frtrain", 1),
    ("start", "fr", "train", 1),
]


def test_equal_names_draw_equal_numbers_whatever_was_drawn_between():
    first = generator(42, "batch", "fr", 3).random(5)
    np.random.default_rng(1).random(9)
    generator(42, "batch", "de", 3).random(100)
    assert (first == generator(42, "batch", "fr", 3).random(5)).all()


def test_every_seed_and_name_is_a_stream_of_its_own():
    draws = [
        generator(seed, *names).integers(0, 2**62, 4).tobytes()
        for seed in (0, 1, 42)
        for names in NAMES
    ]
    assert len(set(draws)) == len(draws)


def test_streams_are_uncorrelated():
    streams = [generator(42, "batch", name).normal(size=4000) for name in "abcdef"]
    assert all(
        abs(np.corrcoef(a, b)[0, 1]) < 0.06 for a, b in combinations(streams, 2)
    )  # 4 standard errors


def test_the_stream_is_numpys_pcg64_seeded_with_the_names_sha256():
    """Written into every run: another stream would make old runs impossible to repeat."""
    digest = hashlib.sha256(b"42\x1fstr:batch\x1fint:7").digest()
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(digest))))
    assert (generator(42, "batch", 7).random(8) == expected.random(8)).all()
    assert generator(42, "batch", 7).integers(0, 1000, 6).tolist() == [485, 202, 964, 978, 411, 81]
