"""Chats as people have them: their shapes, found from the file, and what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from comigs.config import SPLITS, ClientEntry, DataSection, Text, parse_config
from comigs.data.document import Document
from comigs.data.leaks import check_disjoint, without_short_repeats
from comigs.data.partition import partition
from comigs.data.prepare import prepare
from comigs.data.sources import left_out, open_source
from comigs.errors import UserError
from tests.chats import questions, tiny_chat, write_lines
from tests.test_data_helper import config_of

ROWS = {  # a shape -> a row, and the turns that it means
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "messages from": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "prompt/completion": ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    "instruction/output": (
        {"instruction": "a", "input": "", "output": "b", "id": 3},
        [("user", "a"), ("assistant", "b")],
    ),
    "instruction/output with": (
        {"instruction": "a", "input": "c", "output": "b"},
        [("user", "a\n\nc"), ("assistant", "b")],
    ),
    "question/answer": ({"question": "a", "answer": "b"}, [("user", "a"), ("assistant", "b")]),
}


def read(path: Path) -> list[Document]:
    return list(open_source(str(path), Path()))


@pytest.mark.parametrize("shape", ROWS)
def test_a_shape_is_found_from_the_file_whatever_the_file_is(tmp_path, shape):
    row, turns = ROWS[shape]
    lines = write_lines(tmp_path / "a.jsonl", [row, row])
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(lines.read_bytes()))
    table = tmp_path / "a.csv"
    cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerows([cells, cells])
    documents = [*read(lines), *read(zipped), *read(table)]
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([row, row])
    made.to_parquet(str(tmp_path / "a.parquet"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "saved"))
    documents += [*read(tmp_path / "a.parquet"), *open_source("hub:saved:train", tmp_path)]
    assert len(documents) == 10
    assert {d.turns for d in documents} == {tuple(turns)}
    assert {d.shape for d in documents} == {shape.split()[0]}
    assert [d.name for d in documents[:2]] == ["a.jsonl:1", "a.jsonl:2"]


def test_text_is_text_whatever_stands_beside_it(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x", "question": "a", "answer": "b"}])
    assert read(path) == [Document("x", "a.jsonl:1")]
    table = tmp_path / "b.csv"
    table.write_text('text,id\n"one, two\nthree",1\nfour,2\n', encoding="utf-8-sig")
    assert [d.text for d in read(table)] == ["one, two\nthree", "four"]


def notes_of(tmp_path, rows):
    path = write_lines(tmp_path / "a.jsonl", rows)
    return partition(ClientEntry(name="ana", text=path.name), DataSection(root=tmp_path)).notes()


def test_columns_that_are_not_read_are_said(tmp_path):
    rows = [{**row, "id": "", "context": None} for row in questions(9)]
    assert notes_of(tmp_path, rows) == []
    rows[3]["context"], rows[5]["system_prompt"] = "a passage", "be brief"
    said = 'ana: columns of "a.jsonl" that are not read: context and system_prompt'
    assert notes_of(tmp_path, rows) == [said]
    alpaca = [{"instruction": f"{n}", "input": "", "output": "b", "text": f"{n} b"} for n in "abcd"]
    assert notes_of(tmp_path, alpaca) == [
        'ana: rows of "a.jsonl" are plain text and instruction/output, too: `text` is read first; '
        "take it out where the others are to be learnt",
    ]
    plain = [{"text": f"{n} b", "source": "a book"} for n in "abcd"]
    assert notes_of(tmp_path, plain) == []  # a text is whole without where it is from
    with_input = [{**row, "input": "c"} for row in alpaca]
    for row in with_input:
        del row["text"]
    assert notes_of(tmp_path, with_input) == []


def test_an_empty_cell_is_none(tmp_path):
    """A table that was made of two has all columns of both."""
    table = tmp_path / "a.csv"
    table.write_text(
        'text,question,answer,messages,conversations\n,a,b,,\n,"",c,,\n', encoding="utf-8"
    )
    assert [d.turns for d in read(table)] == [
        (("user", "a"), ("assistant", "b")),
        (("user", ""), ("assistant", "c")),
    ]
    turns = json.dumps(CHAT).replace('"', '""')
    table.write_text(f'text,messages,conversations\n,,"{turns}"\n,"{turns}",\n', encoding="utf-8")
    assert {d.turns for d in read(table)} == {(("user", "a"), ("assistant", "b"))}


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"messages": [{"role": "bot", "content": "a"}]}],
         r'a\.jsonl:1: messages\[0\]: unknown role "bot"; allowed: system, user, assistant, human'),
        ([{"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}],
         r"a\.jsonl:1: messages\[1\]: the answer is empty; leave the chat out, or fill it in"),
        ([{"messages": CHAT[:1]}], r"a\.jsonl:1: no turn is the assistant's, and only its answers"),
        ([{"messages": []}], r"a\.jsonl:1: no turn is the assistant's"),
        ([{"messages": CHAT[1:]}],
         r"a\.jsonl:1: messages\[0\]: is the assistant's before any of the user's"),
        ([{"messages": [{"role": "system", "content": "s"}, CHAT[1], *CHAT]}],
         r"a\.jsonl:1: messages\[1\]: is the assistant's before any of the user's"),
        ([{"messages": CHAT}, {"id": 3}], r"a\.jsonl:2: the field `messages` is missing"),
        ([{"messages": None}], r"a\.jsonl:1: `messages` is no list of messages"),
        ([{"messages": [{"role": "user"}]}], r"a\.jsonl:1: messages\[0\]: no message; expected"),
        ([{"messages": [CHAT[0], {"role": "assistant", "content": None}]}],
         r"messages\[1\]: `content` is null; only text is read"),
        ([{"messages": "hello"}], r"a\.jsonl:1: `messages` is a text, and no JSON list"),
        ([{"messages": 3}], r"a\.jsonl:1: `messages` is no list of messages"),
        ([{"prompt": "a", "completion": " "}],
         r"a\.jsonl:1: the answer \(`completion`\) is empty; leave the line out, or fill it in"),
        ([{"question": "a", "answer": 3}], r"a\.jsonl:1: the field `answer` is not a string"),
        ([{"instruction": "a", "output": None}], r"a\.jsonl:1: the field `output` is null"),
        ([{"question": "a", "answer": "b"}, {"prompt": "a", "completion": "b"}],
         r"a\.jsonl:2: is prompt/completion, but a\.jsonl:1 is question/answer; a client's rows"),
        ([{"text": "a"}, {"question": "a", "answer": "b"}],
         r"a\.jsonl:2: is question/answer, but a\.jsonl:1 is text"),
        ([{"question": "a", "reply": "b"}],
         r"a\.jsonl:1: the field `text` is missing; fields there are: question, reply; rows have "
         r"text; or messages; or .*question and answer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_chat_is_one_line_that_names_it(tmp_path, rows, says):
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=says) as raised:
        read(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "raw", "says"),
    [
        ("a.csv", b"question;answer\na;b\n", r"a\.csv: its cells are separated by ';'"),
        ("a.csv", b"question,answer\na,b,c\n", r"a\.csv:2: has more cells than the first line"),
        ("a.csv", b"question,answer\na\n", r"a\.csv:2: the field `answer` is null"),
        ("a.csv", b"question,answer\n", r"a\.csv: the file has no rows"),
        ("a.csv", b"", r"a\.csv: the file has no rows"),
        ("a.csv", b"text\n\xe9\n", r"a\.csv: not UTF-8 after line . \(0xe9\); save the file as"),
        ("a.csv", b'text\n"a\n', r"a\.csv: not CSV after line 1: unexpected end of data"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a whole Parquet file: "),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, name, raw, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=says) as raised:
        read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_parquet_column_that_is_no_utf_8_is_one_line(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"a", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not UTF-8 after row 0 \(0xe9\)"):
        read(tmp_path / "a.parquet")


def test_a_client_has_one_shape_over_all_its_files(tmp_path):
    write_lines(tmp_path / "t.jsonl", questions(9))
    write_lines(tmp_path / "v.jsonl", [{"text": "x"}])
    entry = ClientEntry(name="ana", text=Text(train="t.jsonl", valid="v.jsonl", test="t.jsonl"))
    says = (
        'client "ana": text.valid = "v.jsonl": v.jsonl:1: is text, but t.jsonl:1 is question/answer'
    )
    with pytest.raises(UserError, match=says):
        partition(entry, DataSection(root=tmp_path))


def test_a_single_chat_is_not_cut_into_documents(tmp_path):
    write_lines(tmp_path / "t.jsonl", [ROWS["messages"][0]])
    with pytest.raises(UserError, match="1 different questions, but splits by hash need 3"):
        partition(ClientEntry(name="ana", text="t.jsonl"), DataSection(root=tmp_path))


def test_chats_are_split_counted_and_compared_like_text(tmp_path):
    """Rows keep their split when others are added, repeats count once, and a leak is refused."""
    rows = questions(60)
    write_lines(tmp_path / "a.jsonl", rows)
    write_lines(tmp_path / "b.jsonl", [*rows[:7], *rows])
    data = DataSection(root=tmp_path)
    one, two = (partition(ClientEntry(name=n, text=f"{n}.jsonl"), data) for n in "ab")
    assert one.is_chat and two.num_repeated == 7
    split = [{d.turns: s for s, d in part.read(SPLITS)} for part in (one, two)]
    assert split[0] == split[1] and set(split[0].values()) == set(SPLITS)
    config = config_of(tmp_path, {"a": "a.jsonl", "b": "b.jsonl"}, short_repeat=0)
    with pytest.raises(UserError, match="the same answer to the same question is in client"):
        prepare(config, tiny_chat("tiny-gpt2").encoder)


def said(*turns):
    """A row of messages: what the user and the assistant say in turn."""
    roles = ["system", "user", "assistant", "user", "assistant"][1 - len(turns) % 2 :]
    return {"messages": [{"role": r, "content": w} for r, w in zip(roles, turns, strict=False)]}


LONG = "an answer that is longer than everyday speech, and that nobody gives by chance"


def test_a_question_is_in_one_split_whatever_its_answers_are(tmp_path):
    rows = []
    for n in range(40):
        rows += [{"question": f"Why {n}?", "answer": f"{LONG} {m}"} for m in range(3)]
        rows.append({"question": f" why  {n}?", "answer": f"{LONG} 3"})
    write_lines(tmp_path / "a.jsonl", rows)
    part = partition(ClientEntry(name="a", text="a.jsonl"), DataSection(root=tmp_path))
    asked = {split: set() for split in SPLITS}
    for split, document in part.read(SPLITS):
        asked[split].add(" ".join(document.turns[0][1].lower().split()))
    assert sum(map(len, asked.values())) == len(set.union(*asked.values())) == 40
    assert all(asked.values())


@pytest.mark.parametrize(
    "other",
    [
        said("be kind", "Why?", LONG),
        said("hello you", "hello to you as well", "Why?", LONG),
        said("Why?", LONG, "and then", "nothing"),
        said("WHY? ", LONG.upper().replace(" ", "  ")),
    ],
)
def test_an_answer_to_a_question_is_a_leak_wherever_it_stands(tmp_path, other):
    """In another split, after other turns, under a system's, or in other letters."""
    write_lines(tmp_path / "train.jsonl", [said("x", "y"), said("Why?", LONG)])
    write_lines(tmp_path / "valid.jsonl", [said("Why?", f"{LONG}, but another")])
    write_lines(tmp_path / "test.jsonl", [said("Where?", LONG), other])
    text = {split: f"{split}.jsonl" for split in SPLITS}
    tree = {"data": {"root": tmp_path}, "clients": [{"name": "ana", "text": text}]}
    says = (
        r'the same answer to the same question is in client "ana" train \("train.jsonl:2"\) and '
        r'client "ana" test \("test.jsonl:2"\)'
    )
    with pytest.raises(UserError, match=says):
        prepare(parse_config(tree), tiny_chat("tiny-gpt2").encoder)
    write_lines(tmp_path / "test.jsonl", [said("Where?", LONG)])
    prepare(parse_config(tree), tiny_chat("tiny-gpt2").encoder)


def test_everyday_speech_is_left_out_alone_and_no_leak_within_a_chat(tmp_path):
    write_lines(tmp_path / "train.jsonl", [said("Thanks", "You are welcome"), said("a", LONG)])
    write_lines(tmp_path / "valid.jsonl", [said("b", LONG)])
    thanks = said("thanks", "you are WELCOME")
    rows = [thanks, said("be kind", "Thanks", "You are welcome")]
    rows.append(said("c", LONG, "thanks", "you are welcome"))
    write_lines(tmp_path / "test.jsonl", rows)
    text = Text(**{split: f"{split}.jsonl" for split in SPLITS})
    part = partition(ClientEntry(name="ana", text=text), DataSection(root=tmp_path))
    (kept,) = without_short_repeats([part], DataSection(short_repeat=60))
    check_disjoint([kept])
    assert [document.name for _, document in kept.read(["test"])] == ["test.jsonl:3"]
    assert kept.num_documents("train") == 2
    with pytest.raises(UserError, match="the same answer to the same question"):
        check_disjoint(without_short_repeats([part], DataSection(short_repeat=0)))


def test_the_debian_faq_asks_the_same_questions_in_four_languages():
    found = {}
    for language in ("de", "fr", "it", "nl"):
        found[language] = list(open_source(f"debian-faq-chat:{language}", Path()))
        sections = list(open_source(f"debian-faq:{language}", Path()))
        whole = {section.key: section.text for section in sections}
        counted = left_out(f"debian-faq-chat:{language}", Path())
        assert counted == {"sections whose title is no question": len(sections) - 122}
        for document in found[language]:
            (_, question), (_, answer) = document.turns
            # Every word is the section's, and nothing of it is left out.
            words = whole[document.key].split()
            assert [*question.split(), *answer.split()] == words and "?" in question
    assert len({tuple(d.key for d in documents) for documents in found.values()}) == 1
    assert found["fr"][0].turns[0] == ("user", "Qu'est-ce que cette FAQ ?")
