"""From a config to every client's stores."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comigs.config import SPLITS, Config
from comigs.data.batches import evaluation_windows
from comigs.data.prepare import ClientData, prepare, prepare_client
from comigs.errors import UserError
from tests.test_data_helper import SEPARATOR, ByteEncoder, config_of, texts_in, write_notes


def two_clients(root: Path, **data: object) -> Config:
    for name in ("ana", "bob"):
        write_notes(root / name, 30, name)
    return config_of(root, {"ana": "ana", "bob": "folder:bob"}, **data)


def prepare_all(*arguments: Any) -> dict[str, ClientData]:
    """Everything looked at, and so tokenised."""
    return prepare(*arguments).load_all()


def all_texts(data: ClientData) -> list[str]:
    return [text for split in SPLITS for store in getattr(data, split) for text in texts_in(store)]


def test_all_text_arrives_once_at_its_own_client(tmp_path: Path) -> None:
    data = prepare_all(two_clients(tmp_path), ByteEncoder())
    assert list(data) == ["ana", "bob"]
    for name, of_client in data.items():
        files = [path.read_text(encoding="utf-8") for path in (tmp_path / name).iterdir()]
        assert sorted(all_texts(of_client)) == sorted(files)
        assert sum(getattr(of_client, s)[0].num_bytes for s in SPLITS) == sum(
            len(f.encode()) for f in files
        )


def test_evaluation_reads_the_whole_test_text(tmp_path: Path) -> None:
    config = two_clients(tmp_path)
    (store,) = prepare(config, ByteEncoder()).load("ana").test
    seen = np.concatenate(
        [t.ravel() for _, t, _ in evaluation_windows([store], config.data.sequence_length, 4)]
    )
    assert bytes(seen[seen != SEPARATOR].tolist()).decode() == "".join(texts_in(store))
    assert (seen == SEPARATOR).sum() == store.num_documents


def test_nothing_is_tokenised_before_it_is_looked_at(tmp_path: Path) -> None:
    lines, encoder = list[str](), ByteEncoder()
    data = prepare(two_clients(tmp_path), encoder, lines.append)
    assert data.names == ("ana", "bob")
    assert encoder.num_calls == 0 and lines == [] and not (tmp_path / "cache").exists()
    bob = data.load("bob")
    assert {line.partition(":")[0] for line in lines} == {"bob"} and len(lines) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3
    again = data.load("bob")
    assert len(lines) == 3  # said once
    assert [s.folder for split in SPLITS for s in getattr(again, split)] == [
        s.folder for split in SPLITS for s in getattr(bob, split)
    ]


@pytest.mark.parametrize(
    "data", [{}, {"distribution": "out"}, {"train_share": 0.3}, {"valid_share": 0.5}]
)
def test_what_is_known_before_tokenising_is_what_the_stores_hold(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    encoder = ByteEncoder()
    prepared = prepare(two_clients(tmp_path, **data), encoder)
    outlines = prepared.outlines()
    assert encoder.num_calls == 0 and list(outlines) == ["ana", "bob"]
    for name, outline in outlines.items():
        for split in SPLITS:
            assert [
                (t.text_sha256, t.num_bytes, t.num_documents) for t in getattr(outline, split)
            ] == [
                (s.text_sha256, s.num_bytes, s.num_documents)
                for s in getattr(prepared.load(name), split)
            ]


def test_a_share_of_the_text_is_its_first_bytes(tmp_path: Path) -> None:
    whole = prepare(two_clients(tmp_path), ByteEncoder()).load("ana")
    part = prepare(two_clients(tmp_path, train_share=0.4), ByteEncoder()).load("ana")
    text = "".join(texts_in(whole.train[0])).encode()
    cut = text[: round(0.4 * len(text))].decode(errors="ignore")
    assert "".join(texts_in(part.train[0])) == cut
    assert [texts_in(s) for s in (*part.valid, *part.test)] == [
        texts_in(s) for s in (*whole.valid, *whole.test)
    ]


def test_no_text_is_held_in_memory(tmp_path: Path) -> None:
    """Neither before a client is asked nor while it is."""
    config = two_clients(tmp_path)
    for number in range(3):
        (tmp_path / "ana" / f"long{number}.txt").write_text(
            f"{number} " + "a long line\n" * 200_000
        )
    tracemalloc.start()
    try:
        data = prepare(config, ByteEncoder())
        data.outlines()
        assert tracemalloc.get_traced_memory()[0] < 200_000
        ana = data.load("ana")
        assert tracemalloc.get_traced_memory()[0] < 200_000
        assert sum(s.num_bytes for s in (*ana.train, *ana.valid, *ana.test)) > 7_000_000
    finally:
        tracemalloc.stop()


def test_a_client_without_text_is_refused(tmp_path: Path) -> None:
    config = two_clients(tmp_path)
    away = config.clients[1].model_copy(update={"text": None})
    with pytest.raises(
        UserError,
        match=r"clients\.bob\.text: missing; without --engine flower all text must be here",
    ):
        prepare(config.model_copy(update={"clients": (config.clients[0], away)}), ByteEncoder())


def test_built_once(tmp_path: Path) -> None:
    config, lines = two_clients(tmp_path), list[str]()
    first = prepare_all(config, ByteEncoder(), lines.append)
    assert len(lines) == 6 and all("(tokenised)" in line for line in lines)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    assert len(files) == 12
    again = ByteEncoder()
    second = prepare_all(config, again, lines.append)
    assert again.num_calls == 0 and all("(in the cache)" in line for line in lines[6:])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")} == files
    assert all(all_texts(first[name]) == all_texts(second[name]) for name in first)


def test_only_what_changed_is_built_again(tmp_path: Path) -> None:
    config, lines = two_clients(tmp_path), list[str]()
    old = prepare_all(config, ByteEncoder())
    write_notes(tmp_path / "bob" / "more", 1, "new")
    new = prepare_all(config, ByteEncoder(), lines.append)
    assert sum("(tokenised)" in line for line in lines) == 1
    assert len(all_texts(new["bob"])) == len(all_texts(old["bob"])) + 1
    prepare_all(config, ByteEncoder("another"), lines.append)
    assert sum("(tokenised)" in line for line in lines) == 7


def test_out_of_distribution(tmp_path: Path) -> None:
    own = prepare_all(two_clients(tmp_path), ByteEncoder())
    mixed = prepare_all(two_clients(tmp_path, distribution="out"), ByteEncoder())
    for name in own:
        assert [s.folder for s in mixed[name].train] == [s.folder for s in own[name].train]
        for split in ("valid", "test"):
            everybody = [getattr(own[n], split)[0].folder for n in ("ana", "bob")]
            assert [s.folder for s in getattr(mixed[name], split)] == everybody


def test_one_client_alone(tmp_path: Path) -> None:
    config = two_clients(tmp_path)
    everything = prepare(config, ByteEncoder()).load("bob")
    for path in (tmp_path / "ana").iterdir():
        path.unlink()  # a device has nobody else's text
    alone = prepare_client(config, "bob", ByteEncoder())
    assert [s.folder for split in SPLITS for s in getattr(alone, split)] == [
        s.folder for split in SPLITS for s in getattr(everything, split)
    ]
    with pytest.raises(UserError, match=r'no client "bo" .*Did you mean "bob"'):
        prepare_client(config, "bo", ByteEncoder())
    with pytest.raises(UserError, match=r'data\.distribution: "out"'):
        prepare_client(two_clients(tmp_path, distribution="out"), "bob", ByteEncoder())


def test_leaks_between_clients_are_refused(tmp_path: Path) -> None:
    config = two_clients(tmp_path)
    (tmp_path / "bob" / "copy.txt").write_text((tmp_path / "ana" / "note000.txt").read_text())
    with pytest.raises(
        UserError, match=r'client "ana" \w+ \("note000.txt"\) and client "bob" \w+ \("copy.txt"\)'
    ):
        prepare(config, ByteEncoder())
    assert not (tmp_path / "cache").exists()  # before anything is tokenised
    prepare_client(config, "bob", ByteEncoder())


def test_repeated_documents_are_reported(tmp_path: Path) -> None:
    config, lines = two_clients(tmp_path), list[str]()
    (tmp_path / "bob" / "z.txt").write_text((tmp_path / "bob" / "note000.txt").read_text())
    prepare_all(config, ByteEncoder(), lines.append)
    assert lines[-1] == "bob: left out 1 documents that repeat an earlier one"


@pytest.mark.parametrize("short", SPLITS)
def test_too_short_for_one_window(tmp_path: Path, short: str) -> None:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text(
            split + "x" * (15 - len(split))
        )  # 17 tokens: one window of 16
    texts = {split: f"{split}.txt" for split in SPLITS}
    config = config_of(tmp_path, {"ana": texts})
    prepare_all(config, ByteEncoder())
    (tmp_path / f"{short}.txt").write_text("y" * 14)
    if short == "test":  # read to its end, however short
        assert prepare_all(config, ByteEncoder())["ana"].test[0].num_tokens == 16
    else:
        with pytest.raises(UserError, match=f'client "ana": {short} has 16 tokens, but needs 17'):
            prepare_all(config, ByteEncoder())


def test_errors_name_the_client(tmp_path: Path) -> None:
    config = two_clients(tmp_path)
    (tmp_path / "bob" / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r'client "bob": .*bad\.txt: not UTF-8 at byte 0'):
        prepare(config, ByteEncoder())


def test_text_that_changes_between_hashing_and_tokenising(tmp_path: Path) -> None:
    class Meddler(ByteEncoder):
        @property
        def separator(self) -> int:  # first asked for after hashing, before tokenising
            (tmp_path / "ana" / "note005.txt").write_text("changed meanwhile")
            return SEPARATOR

    with pytest.raises(UserError, match='client "ana": the text changed while it was being read'):
        prepare_all(two_clients(tmp_path), Meddler())
    assert list((tmp_path / "cache").glob("*")) == []
