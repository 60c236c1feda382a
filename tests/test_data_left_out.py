"""What a source passes over is counted and said; what is no text, or has no end, is one line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from comigs.config import SPLITS, ClientEntry, DataSection, Text, parse_config
from comigs.data import leaks
from comigs.data.document import Document
from comigs.data.leaks import check_disjoint, without_short_repeats
from comigs.data.partition import partition
from comigs.data.pieces import pieces
from comigs.data.prepare import prepare, prepare_client
from comigs.data.sources import jsonl, left_out, manpages, open_source
from comigs.errors import UserError
from comigs.federation.device.join import text_of
from tests.conftest import tiny
from tests.runs import comigs, write_config


def write(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text or f"text of {name}, which is like no other\n")


def of(root, text, name="ann", **data):
    return partition(ClientEntry(name=name, text=text), DataSection(root=root, **data))


def test_all_that_a_folder_has_beside_documents_is_counted(tmp_path):
    write(tmp_path / "t", "a.txt", "b.md", "c/d.txt", "p.pdf", "q.pdf", "r.csv", "plain")
    write(tmp_path / "t", ".hidden.txt", ".git/x.txt", ".git/y.txt", "z.txt.gz", "y.zip")
    write(tmp_path / "elsewhere", "e.txt")
    (tmp_path / "t" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "t" / "f.txt").symlink_to(tmp_path / "elsewhere" / "e.txt")
    assert [d.name for d in open_source("t", tmp_path)] == ["a.txt", "b.md", "f.txt", "c/d.txt"]
    assert left_out("t", tmp_path) == {
        ".csv files": 1,
        ".pdf files": 2,
        "compressed files": 2,
        "files without a suffix": 1,
        "hidden files": 1,
        "hidden folders": 1,
        "links to folders": 1,
    }
    write(tmp_path / "t", "blank.txt", text=" \n")
    (line,) = of(tmp_path, "t").notes()
    assert line.startswith('ann: left out of "t": 1 .csv files, 2 .pdf files, ')
    assert line.endswith("1 links to folders, 1 documents without text")
    assert left_out("t/a.txt", tmp_path) == {} and of(tmp_path, "debian-faq:fr").notes() == []


def test_manual_pages_that_point_to_others_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(manpages, "MAN_ROOT", tmp_path)
    write(tmp_path / "man1", "a.1")
    write(tmp_path / "man1", "b.1", text=".so man1/a.1\n")
    (tmp_path / "man1" / "c.1").symlink_to("a.1")
    assert left_out("manpages:en", tmp_path) == {"pages that only point to another": 2}


def test_a_run_says_so_and_a_device_does(tmp_path, capsys):
    config = write_config(tmp_path)
    write(tmp_path / "ann", "table.csv", ".DS_Store")
    done = comigs(capsys, "run", config, "--out", tmp_path / "run", "--dry-run")
    assert 'ann: left out of "ann": 1 .csv files, 1 hidden files' in done.out + done.err
    tree = {"data": {"root": tmp_path, "cache": tmp_path / "cache", "sequence_length": 32}}
    parsed = parse_config({**tree, "clients": [{"name": "ann", "text": "ann"}]})
    lines = []
    prepare_client(parsed, "ann", tiny("tiny-gpt2").encoder, lines.append)
    assert lines[0] == 'ann: left out of "ann": 1 .csv files, 1 hidden files'


@pytest.mark.parametrize(
    "names",
    [
        ("README.md", "LICENSE.txt", "CITATION.md", "data/train.jsonl"),
        ("notes.txt", "more.txt", "data/train.parquet"),
        ("README.md", "data/train.csv"),
        ("a.txt", "b.jsonl.gz"),
    ],
)
def test_a_card_beside_data_files_is_not_what_is_trained_on(tmp_path, names):
    write(tmp_path / "set", *names)
    with pytest.raises(UserError, match=r"set: has .* beside .txt or .md files; name the one"):
        list(open_source("set", tmp_path))
    write(tmp_path / "talk", "README.md", "one.txt", "words.csv")  # a table beside texts
    assert len(list(open_source("talk", tmp_path))) == 2


def say(root: Path, name: str, *texts: str) -> None:
    lines = [json.dumps({"text": text}) for text in texts]
    (root / f"{name}.jsonl").write_text("\n".join(lines))


def test_everyday_speech_stays_where_it_comes_first_and_a_leak_is_a_leak(tmp_path):
    for name in ("ann", "bob"):
        say(tmp_path, name, "ok", *(f"{name} has something of its own to say: {i}" for i in "abcd"))
    parts = [of(tmp_path, f"{name}.jsonl", name) for name in ("ann", "bob")]
    with pytest.raises(UserError, match="the same text is in client"):
        check_disjoint(without_short_repeats(parts, DataSection(short_repeat=1)))
    ann, bob = without_short_repeats(parts, DataSection(short_repeat=2))
    check_disjoint([ann, bob])
    assert "ok" in [d.text for _, d in ann.read(SPLITS)]
    assert "ok" not in [d.text for _, d in bob.read(SPLITS)]
    assert ann.notes() == []
    assert bob.notes() == ["bob: left out 1 short texts that another split or client has, too"]

    # By the config, in a run: 60 bytes and no more.
    config = parse_config(
        {
            "data": {"root": tmp_path, "cache": tmp_path / "cache", "sequence_length": 2},
            "clients": [{"name": n, "text": f"{n}.jsonl"} for n in ("ann", "bob")],
        }
    )
    encoder = tiny("tiny-gpt2").encoder
    texts = prepare(config, encoder)
    assert len(texts.notes()) == 1 and texts.load_all().keys() == {"ann", "bob"}
    for name in ("ann", "bob"):
        say(tmp_path, name, "x" * 61, *(f"{name} says something of its own: {i}" for i in "abcd"))
    with pytest.raises(UserError, match="a document may be in one split of one client"):
        prepare(config, encoder)


def test_short_repeats_between_given_splits_may_not_empty_one(tmp_path):
    say(tmp_path, "train", "ok", "a text of its own")
    say(tmp_path, "valid", "ok", "another text")
    say(tmp_path, "test", "ok")
    text = Text(train="train.jsonl", valid="valid.jsonl", test="test.jsonl")
    with pytest.raises(UserError, match=r'"ann": test has nothing but short texts .*give it more'):
        without_short_repeats([of(tmp_path, text)], DataSection(short_repeat=60))
    say(tmp_path, "test", "ok", "a third one")
    (part,) = leaks.without_short_repeats([of(tmp_path, text)], DataSection(short_repeat=60))
    assert [part.num_documents(split) for split in SPLITS] == [2, 1, 1]


@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_a_book_in_one_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path, suffix):
    book = "\n\n".join(f"Paragraph {i} of a book. " + "It goes on. " * 20 for i in range(200))
    (tmp_path / f"book.{suffix}").write_text(book)
    part = of(tmp_path, f"book.{suffix}")
    found = [d.text for _, d in part.read(SPLITS)]
    assert "".join(found) == book and all(text.startswith("Paragraph ") for text in found)
    assert 20 <= len(found) <= 40 and all(part.num_documents(split) for split in SPLITS)
    (line,) = part.notes()
    said = f'"book.{suffix}" is one document; cut at paragraphs into {len(found)}'
    assert line == f"ann: {said}"
    write(tmp_path / "given", "v.txt", "t.txt")
    given = Text(train=f"book.{suffix}", valid="given/v.txt", test="given/t.txt")
    assert of(tmp_path, given).num_documents("train") == 1  # where splits are given, as it is


@pytest.mark.parametrize("text", ["", "one line", "a\nb\nc", "a\n\nb\n\nc\n", "x" * 9000 + "\n\ny"])
def test_pieces_make_up_the_whole(text):
    assert "".join(piece.text for piece in pieces(Document(text, "n"))) == text


def test_lines_are_the_parts_where_there_are_no_paragraphs(tmp_path):
    (tmp_path / "chat.txt").write_text("".join(f"12:{i:02} ann: message {i}\n" for i in range(60)))
    assert len([d for _, d in of(tmp_path, "chat.txt").read(SPLITS)]) >= 15


def test_a_device_with_too_little_text_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "two", "a.txt", "b.txt")
    with pytest.raises(UserError, match=r'^--text: text = "two": 2 different documents, but'):
        text_of(["two"])
    write(tmp_path / "two", "c.txt")
    assert text_of(["two"]) == "two"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '[{"text": "x"}, {"text": "y"}]', "one JSON text over the whole file"),
        ("a.jsonl", '[\n {"text": "x"}\n]', "one JSON text over the whole file, not JSON lines"),
        ("a.jsonl", '{\n "text": "x"\n}', "one JSON text over the whole file, not JSON lines"),
        ("a.jsonl", '{"text": null}', "the field `text` is null; leave the line out"),
        ("a.arrow", "ARROW1", 'the folder may be a dataset: text = "hub:FOLDER:train"'),
        ("a.tsv", "text\nx", "the folder may be a dataset"),
        ("a.json", "[]", "the folder may be a dataset"),
        ("a.txt.gz", "x", "unpack it"),
        ("a.docx", "x", "save it as plain text"),
    ],
)
def test_what_is_no_text_is_said_in_our_words(tmp_path, name, text, says):
    write(tmp_path, name, text=text)
    with pytest.raises(UserError, match=says) as raised:
        list(open_source(name, tmp_path))
    assert "\n" not in str(raised.value) and name in str(raised.value)


def test_a_folder_that_datasets_wrote_is_told_how_to_be_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r'in this folder; .* text = "hub:FOLDER:train"'):
        list(open_source("saved", tmp_path))
    assert len(list(open_source("hub:saved:train", tmp_path))) == 1
    rows.save_to_disk(str(tmp_path / "one"))
    for named in ("one", "one/data-00000-of-00001.arrow"):
        with pytest.raises(UserError, match=r'text = "hub:FOLDER"$'):
            list(open_source(named, tmp_path))
    assert len(list(open_source("hub:one", tmp_path))) == 1
    (tmp_path / "one/README.md").write_text("card")
    with pytest.raises(UserError, match=f'"hub:{tmp_path / "one"}", or move'):
        list(open_source("one", tmp_path))


def test_utf_16_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(UserError, match=r"not UTF-8 at byte 0 \(0xff\), as UTF-16 begins; save"):
        list(open_source("a.txt", tmp_path))


def test_null_in_a_column_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", None]})
    (tmp_path / "set").mkdir()
    rows.to_parquet(str(tmp_path / "set" / "train.parquet"))
    with pytest.raises(UserError, match="row 1: the field `text` is null"):
        list(open_source("hub:set:train", tmp_path))


def test_what_grows_without_end_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "SMALL", 1000)
    line = json.dumps({"text": "the same words again and again"}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode() * 50_000))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: grows to more than 300 times its size"):
        list(open_source("a.jsonl.gz", tmp_path))
    (tmp_path / "b.jsonl").write_text(line * 50_000)  # plain, it is as large as it looks
    assert len(list(open_source("b.jsonl", tmp_path))) == 50_000
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 999)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"0" * 10**6))
    with pytest.raises(UserError, match="has a line of more than 999 bytes"):
        list(open_source("c.jsonl.gz", tmp_path))
    monkeypatch.setattr(manpages, "MAN_ROOT", tmp_path)
    monkeypatch.setattr(manpages, "LARGEST", 999)
    (tmp_path / "man1").mkdir()
    (tmp_path / "man1" / "a.1.gz").write_bytes(gzip.compress(b"0" * 10**6))
    with pytest.raises(UserError, match=r"a\.1\.gz: larger than 999 bytes"):
        left_out("manpages:en", tmp_path)
