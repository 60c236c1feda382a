"""Sources: what each yields, and one line for every way a file can be wrong."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from comigs.data.document import Document
from comigs.data.sources import list_sources, manpages, open_source, source_names
from comigs.errors import UserError


def texts(spec: str, root: Path) -> list[str]:
    return [document.text for document in open_source(spec, root)]


def test_every_source_says_what_it_is() -> None:
    infos = list_sources()
    assert (
        [info.name for info in infos]
        == source_names()
        == [
            "chatterbot",
            "csv",
            "debian-faq",
            "debian-faq-chat",
            "folder",
            "hub",
            "jsonl",
            "manpages",
            "parquet",
        ]
    )
    for info in infos:
        assert info.summary.startswith(f"{info.name}:") and "\n" not in info.summary
        assert info.version and info.license


def test_folder_is_every_text_file_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.TXT", "sub/.hidden.txt", ".git/d.txt", "e.pdf"):
        (tmp_path / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "notes" / name).write_bytes(f"text of {name}\r\n".encode())
    documents = list(open_source("folder:notes", tmp_path))
    assert [d.name for d in documents] == ["a.md", "b.txt", "sub/c.TXT"]
    assert documents[0] == Document("text of a.md\r\n", "a.md", key="a.md")  # bytes as they are
    assert list(open_source("notes", tmp_path)) == documents
    assert list(open_source(str(tmp_path / "notes"), Path("elsewhere"))) == documents
    assert texts("notes/b.txt", tmp_path) == ["text of b.txt\r\n"]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "abc"}\n')
    assert texts("a.txt", tmp_path) == texts("a.jsonl", tmp_path) == ["abc"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    lines = [
        json.dumps({"text": text, "source": "s"}, ensure_ascii=False)
        for text in ("one", "zwölf\n", "")
    ]
    raw = "\n".join([lines[0], "", *lines[1:]]).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for spec in (f"jsonl:{name}", name):
        documents = list(open_source(spec, tmp_path))
        assert [d.text for d in documents] == ["one", "zwölf\n", ""]
        assert [d.name for d in documents] == [f"{name}:1", f"{name}:3", f"{name}:4"]
        assert {d.key for d in documents} == {None}


def test_sources_are_streamed(tmp_path: Path) -> None:
    """The first document arrives though a later line is wrong."""
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json\n')
    documents = open_source("a.jsonl", tmp_path)
    assert next(documents).text == "fine"
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        next(documents)


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl:2: not an object"),
        ("a.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: a number too long"),
        (
            "a.jsonl",
            b'{"text": "x", "id": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
            r"a\.jsonl:1: .* or lists too deep",
        ),
        (
            "a.jsonl",
            b'{"txt": "x", "id": 1}\n',
            r"a\.jsonl:1: the field `text` is missing; fields there are: txt, id",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: the field `text` is not a string"),
        (
            "a.jsonl",
            b'{"text": "ok"}\n{"text": "\xff"}\n',
            r"a\.jsonl:2: not UTF-8 at byte 25 \(0xff\)",
        ),
        ("a.jsonl", b"\n\n", r"a\.jsonl: the file is empty"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz: not a whole gzip file"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 50, mtime=0)[:-9],
            r"a\.jsonl\.gz: not a whole gzip file",
        ),
        ("a.txt", b"abc\xe9def", r"a\.txt: not UTF-8 at byte 3 \(0xe9\); save the file as UTF-8"),
        ("a.pdf", b"abc", r"a\.pdf: not a folder, nor a \.txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, raw: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=says) as raised:
        texts(name, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("missing", "missing: no such file or folder"),
        ("folder:missing", "missing: no such file or folder"),
        ("jsonl:missing.jsonl", "missing.jsonl: no such file or folder"),
        ("foldr:x", 'no source "foldr".*Did you mean "folder"'),
        ("debian_faq:fr", 'no source "debian_faq".*Did you mean "debian-faq"'),
        ("debian-faq", "SOURCE:ARGUMENT"),
        ("debian-faq:", "SOURCE:ARGUMENT"),
        ("", "SOURCE:ARGUMENT"),
        ("debian-faq:ft", "no such language.*de, fr, it, nl"),
        ("empty", "empty: no .txt or .md file"),
        ("hub:onlyname", "expected hub:NAME:SPLIT"),
        ("manpages:../etc", "no manual pages"),
    ],
)
def test_bad_specs(tmp_path: Path, spec: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=says):
        texts(spec, tmp_path)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"a\.txt: no permission to read it"):
        texts("a.txt", tmp_path)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_no_permission_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "private").mkdir(mode=0)
    with pytest.raises(UserError, match="private: no permission to read it"):
        texts(str(tmp_path), tmp_path)


def test_debian_faq_is_parallel_prose_in_four_languages() -> None:
    documents = {
        lang: list(open_source(f"debian-faq:{lang}", Path(".")))
        for lang in ("de", "fr", "it", "nl")
    }
    keys = [[d.key for d in of_language] for of_language in documents.values()]
    assert keys[0] == keys[1] == keys[2] == keys[3] and len(set(keys[0])) == len(keys[0]) > 100
    for of_language in documents.values():
        everything = "".join(d.text for d in of_language)
        assert 150_000 < len(everything.encode()) < 250_000
        assert not any(line.startswith("    ") for line in of_language[0].text.splitlines())
        assert "\n2. " not in everything and "\xa0" not in everything  # neither chapters nor layout
    assert documents["fr"][0].text.startswith("Qu'est-ce que cette FAQ ?\n\nCe document présente")
    assert documents["de"][-1].text.startswith("Dokumentenformat\n")


def test_debian_faq_keeps_its_notice() -> None:
    notice = Path(manpages.__file__).parent / "assets" / "debian-faq" / "NOTICE"
    assert "Permission is granted to make and distribute verbatim copies" in notice.read_text(
        encoding="utf-8"
    )


PAGE = """.TH GREET 1 "2024" "greet 1.0" "Commandes"
.SH NOM
greet \\- dire bonjour à quelqu'un
.SH DESCRIPTION
Une phrase assez longue pour que groff la coupe ou l'étire si on le laissait faire, et encore quelques mots de plus.
.SH TRADUCTION
Traduit par Quelqu'un <quelquun@example.org>.
.SH "VOIR AUSSI"
bonjour(1)
"""  # noqa: E501  a page is one text


@pytest.fixture
def man_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "man" / "fr" / "man1"
    folder.mkdir(parents=True)
    (folder / "greet.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    (folder / "hello.1").write_text(".so man1/greet.1\n")
    (folder / "salut.1.gz").symlink_to("greet.1.gz")
    monkeypatch.setattr(manpages, "MAN_ROOT", tmp_path / "man")
    return tmp_path / "man"


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_manpages_are_rendered_without_people_and_licences(man_root: Path) -> None:
    (document,) = open_source("manpages:fr", man_root)
    assert document == Document(
        "NOM\ngreet - dire bonjour à quelqu'un\n\nDESCRIPTION\nUne phrase assez longue pour "
        "que groff la coupe ou "
        "l'étire si on le laissait faire, et encore quelques mots de plus.\n\nVOIR "
        "AUSSI\nbonjour(1)\n",
        "greet.1",
        key="greet.1",
    )


def test_manpages_say_what_to_install(man_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="apt-get install manpages-pt-br"):
        texts("manpages:pt_BR", man_root)
    with pytest.raises(UserError, match="apt-get install manpages`"):
        texts("manpages:en", man_root)
    monkeypatch.setenv("PATH", str(man_root))
    with pytest.raises(UserError, match="apt-get install groff-base"):
        texts("manpages:fr", man_root)


def test_hub_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = ["one", "two", "drei ä"], ["four"]
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"text": rows})
            for name, rows in (("train", train), ("test", test))
        }
    ).save_to_disk(str(tmp_path / "saved"))
    assert texts("hub:saved:train", tmp_path) == train
    assert texts(f"hub:{tmp_path / 'saved'}:test", Path(".")) == test
    with pytest.raises(UserError, match='no split "valid"; there are: train, test'):
        texts("hub:saved:valid", tmp_path)

    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in train)
    )
    (tmp_path / "files" / "test.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in test)
    )
    assert texts("hub:files:train", tmp_path) == train
    assert texts("hub:files:default:test", tmp_path) == test
    with pytest.raises(UserError, match="hub:files:valid: cannot be read"):
        texts("hub:files:valid", tmp_path)

    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("# a dataset that is a script\n")
    with pytest.raises(UserError, match="hub:scripted:train: cannot be read: Dataset scripts are"):
        texts("hub:scripted:train", tmp_path)

    datasets.Dataset.from_dict({"text": train}).save_to_disk(str(tmp_path / "single"))
    with pytest.raises(UserError, match="one dataset without splits"):
        texts("hub:single:train", tmp_path)
    assert texts("hub:single", tmp_path) == texts(f"hub:{tmp_path / 'single'}", Path(".")) == train
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": ["x"]})}).save_to_disk(
        str(tmp_path / "body")
    )
    with pytest.raises(UserError, match=r"row 0: the field `text` is missing; fields .*: body;"):
        texts("hub:body:train", tmp_path)


def test_hub_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'comigs\[hub\]'"):
        texts("hub:name:train", tmp_path)
