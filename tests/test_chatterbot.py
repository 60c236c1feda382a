"""Questions and answers of chatterbot-corpus, read from its package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from comigs.config import SPLITS, load_config
from comigs.data.partition import partition
from comigs.data.sources import left_out, open_source
from comigs.errors import UserError

ROOT = Path(__file__).parent.parent


def raw(topic):
    package = Path(importlib.util.find_spec("chatterbot_corpus").origin).parent
    return yaml.safe_load((package / "data" / "english" / f"{topic}.yml").read_text())


def test_each_conversation_is_a_question_and_its_first_answer(tmp_path):
    spec = "chatterbot:english:sports+emotion"
    found = list(open_source(spec, tmp_path))
    talks = raw("sports")["conversations"] + raw("emotion")["conversations"]
    pairs = [(("user", talk[0].strip()), ("assistant", talk[1].strip())) for talk in talks]
    assert [document.turns for document in found] == pairs and len(pairs) == 70
    rest = sum(map(len, talks)) - 2 * len(talks)
    assert left_out(spec, tmp_path) == {"lines below a first answer, or without one": rest}
    assert {document.shape for document in found} == {"question/answer"}


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("english:sport", r'no topic "sport"; there are: .*Did you mean "sports"'),
        ("english", r'no topic ""; there are: ai, '),
        ("englisch:ai", r'no language "englisch"; .*Did you mean "english"'),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, argument, says):
    with pytest.raises(UserError, match=says):
        list(open_source(f"chatterbot:{argument}", tmp_path))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps chatterbot-corpus"):
        list(open_source("chatterbot:english:ai", tmp_path))


def test_the_four_people_of_the_config_have_enough_to_say():
    config = load_config(ROOT / "configs" / "instruct" / "four-people.toml")
    for client in config.clients:
        assert len({document.turns for document in open_source(client.text, ROOT)}) >= 100
        part = partition(client, config.data)
        asked = []
        for split in SPLITS:
            said = [document.turns[0][1] for _, document in part.read([split])]
            asked.append({" ".join(words.casefold().split()) for words in said})
        # No question of test was learnt with another answer.
        assert len(set.union(*asked)) == sum(map(len, asked))
