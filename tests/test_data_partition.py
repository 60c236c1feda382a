"""Splits and clients: stable, complete, without leaks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from comigs.config import SPLITS, ClientEntry, DataSection, Split, Text
from comigs.data.document import Document
from comigs.data.leaks import check_disjoint
from comigs.data.partition import Partition, partition, split_by_hash
from comigs.data.scan import share
from comigs.errors import UserError
from tests.test_data_helper import write_notes


def of(root: Path, text: str | Text, name: str = "fr") -> Partition:
    return partition(ClientEntry(name=name, text=text), DataSection(root=root))


def splits_of(part: Partition) -> dict[str, Split]:
    """Split by the document's name."""
    return {document.name: split for split, document in part.read(SPLITS)}


def test_share_is_a_hash_of_the_key() -> None:
    digest = int(hashlib.sha256(b"a.txt").hexdigest()[:12], 16)
    assert share(Document("x", "n", key="a.txt")) == digest / 16**12
    assert share(Document("a.txt", "n")) == digest / 16**12  # no key: its text


def test_every_document_in_one_split_and_about_the_fractions(tmp_path: Path) -> None:
    write_notes(tmp_path, 600, "a", num_words=1)
    counts = Counter(splits_of(of(tmp_path, ".")).values())
    assert sum(counts.values()) == 600
    assert 35 <= counts["valid"] <= 85 and 35 <= counts["test"] <= 85


def test_splits_stay_when_documents_are_added(tmp_path: Path) -> None:
    write_notes(tmp_path, 60, "a")
    before = splits_of(of(tmp_path, "."))
    write_notes(tmp_path / "more", 60, "b")
    after = splits_of(of(tmp_path, "."))
    assert {name: after[name] for name in before} == before and len(after) == 120

    lines = [json.dumps({"text": f"line {i} of jsonl"}) for i in range(60)]
    for name, some in (("one.jsonl", lines[10:]), ("two.jsonl", lines)):
        (tmp_path / name).write_text("\n".join(some))
    one, two = (
        {d.text: s for s, d in of(tmp_path, name).read(SPLITS)}
        for name in ("one.jsonl", "two.jsonl")
    )
    assert {text: two[text] for text in one} == one  # though all line numbers moved


@pytest.mark.parametrize("num_documents", [3, 4, 5, 10])
def test_no_split_is_empty(num_documents: int) -> None:
    rng = np.random.default_rng(num_documents)
    for low, high in ((0, 1), (0, 0.05), (0.12, 0.18), (0.9, 1)):
        shares = rng.uniform(low, high, num_documents)
        splits = split_by_hash(shares, 0.1, 0.1)
        assert set(splits) == {0, 1, 2}
        assert (splits == split_by_hash(shares, 0.1, 0.1)).all()
        # the order is kept: test below valid below train
        assert (
            shares[splits == 2].max()
            < shares[splits == 1].min()
            <= shares[splits == 1].max()
            < shares[splits == 0].min()
        )


def test_what_has_one_key_is_in_one_split_where_empty_ones_are_filled_too() -> None:
    for shares in ([0.35, 0.35, 0.6, 0.7, 0.9], [0.5, 0.6, 0.6, 0.7], [0.01, 0.01, 0.02, 0.03]):
        splits = split_by_hash(np.array(shares), 0.1, 0.1)
        assert set(splits) == {0, 1, 2}
        split_of = dict(zip(shares, splits, strict=True))
        assert all(split_of[x] == split for x, split in zip(shares, splits, strict=True))


def test_too_few_documents(tmp_path: Path) -> None:
    write_notes(tmp_path, 2, "a")
    (tmp_path / "copy.txt").write_text((tmp_path / "note000.txt").read_text())
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(
        UserError, match=r'client "fr": .*2 different documents.*need 3.*train = \.\.\.'
    ):
        of(tmp_path, ".")


def test_given_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    for split in SPLITS:
        write_notes(tmp_path / split, 2, split)
    part = of(tmp_path, Text(train="train", valid="valid", test="test"))
    found = [(split, document.text.split()[0]) for split, document in part.read(SPLITS)]
    assert found == [(split, split) for split in SPLITS for _ in range(2)]
    assert [s for s, _ in part.read(["valid"])] == ["valid"] * 2
    check_disjoint([part])


def test_given_split_without_text(tmp_path: Path) -> None:
    write_notes(tmp_path / "a", 2, "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r'client "fr": text\.valid = "b": there is no text'):
        of(tmp_path, Text(train="a", valid="b", test="a"))


def test_repeated_text_in_one_source_is_left_out_and_counted(tmp_path: Path) -> None:
    write_notes(tmp_path, 20, "a")
    (tmp_path / "zz.txt").write_text(
        "  " + (tmp_path / "note003.txt").read_text().replace("\n", " \n")
    )
    part = of(tmp_path, ".")
    assert part.num_repeated == 1 and len(splits_of(part)) == 20 and "zz.txt" not in splits_of(part)
    check_disjoint([part])


def test_same_text_in_two_splits_is_an_error(tmp_path: Path) -> None:
    for split in SPLITS:
        write_notes(tmp_path / split, 3, split)
    (tmp_path / "test" / "leak.txt").write_text(
        (tmp_path / "train" / "note001.txt").read_text() + "\n\n"
    )
    part = of(tmp_path, Text(train="train", valid="valid", test="test"))
    with pytest.raises(UserError) as raised:
        check_disjoint([part])
    assert 'client "fr" train ("note001.txt") and client "fr" test ("leak.txt")' in str(
        raised.value
    )


def test_same_text_at_two_clients_is_an_error(tmp_path: Path) -> None:
    write_notes(tmp_path / "a", 5, "a")
    write_notes(tmp_path / "b", 5, "b")
    parts = [of(tmp_path, "a", "ana"), of(tmp_path, "b", "bob")]
    check_disjoint(parts)
    for i in (1, 2):
        (tmp_path / "b" / f"copy{i}.txt").write_text(
            (tmp_path / "a" / f"note00{i}.txt").read_text()
        )
    with pytest.raises(
        UserError,
        match=r'"ana" \w+ \("note00\d.txt"\) and client "bob" \w+ \("copy\d.txt"\) \(and 1 more',
    ):
        check_disjoint([parts[0], of(tmp_path, "b", "bob")])


def test_duplicates_are_found_whatever_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy cuts zero bytes off the end of strings: digests that end in zeros must work as others
    do.
    """
    monkeypatch.setattr(
        "comigs.data.document.content_digest",
        lambda text: hashlib.sha256(" ".join(text.split()).encode()).digest()[:14] + b"\0\0",
    )
    test_same_text_at_two_clients_is_an_error(tmp_path)


def test_debian_faq_splits_are_parallel_and_disjoint() -> None:
    parts = [of(Path("."), f"debian-faq:{lang}", lang) for lang in ("de", "fr", "it", "nl")]
    check_disjoint(parts)
    first, *others = map(splits_of, parts)
    assert all(first == other for other in others)
    assert min(Counter(first.values()).values()) >= 10


def test_text_hash_is_of_the_texts_in_order(tmp_path: Path) -> None:
    write_notes(tmp_path, 30, "a")
    part = of(tmp_path, ".")
    for split in SPLITS:
        texts = [d.text for s, d in part.read([split])]
        expected = hashlib.sha256(
            b"".join(hashlib.sha256(t.encode()).digest() for t in texts)
        ).hexdigest()
        assert part.text_sha256(split) == expected


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(UserError, match=r"client \"fr\": 'a\.jsonl:2': not valid Unicode"):
        of(tmp_path, "a.jsonl")
