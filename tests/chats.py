"""What the tests of chats share: a template for bases without one, and files of chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comigs.bases.load import Base, load_base
from comigs.config import BaseSection
from comigs.config.templates import TEMPLATES

PLAIN = TEMPLATES["plain"]
MARKED = PLAIN.replace(  # the same, with what transformers needs to make a mask itself
    "{{ message.role }}: {{ message.content | trim }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}",
    "{% if message.role == 'assistant' %}assistant:{% generation %} {{ message.content | trim }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message.role }}: "
    "{{ message.content | trim }}\n{% endif %}",
)
TALKS = [
    [("user", "hi"), ("assistant", "ho")],
    [("system", "be"), ("user", "ça ?"), ("assistant", "oui, toi ?"), ("user", "b")],
    [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")],
    [("user", "one"), ("assistant", "1")],
]


def tiny_chat(name: str, **more: Any) -> Base:
    """A tiny base with a chat template, in float32 on the CPU."""
    settings = {"dtype": "float32", "device": "cpu", "chat_template": PLAIN, **more}
    return load_base(BaseSection(name=name, **settings))


def questions(count: int, word: str = "tree") -> list[dict[str, str]]:
    """Rows of questions and answers, no two alike."""
    return [
        {"question": f"{word} {n}?", "answer": " ".join([word] * (1 + n % 4)) + f" {n}"}
        for n in range(count)
    ]


def write_lines(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A chat as transformers takes it."""
    return [{"role": role, "content": words} for role, words in turns]
