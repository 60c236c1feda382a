"""This shape is a chat: a list of messages, each with a role and its words.

They are `messages` of {role, content}, or `conversations` of {from, value}.
"""

from __future__ import annotations

import json
from typing import Any

from comigs.data.document import Turn
from comigs.data.shapes import EMPTY, Row
from comigs.errors import UserError

FIELDS = (("messages",), ("conversations",))
KEYS = (("role", "content"), ("from", "value"))
ROLES = {"human": "user", "gpt": "assistant"}  # other words for the same
KNOWN = ("system", "user", "assistant", *ROLES)


def turns(row: Row, where: str) -> tuple[Turn, ...]:
    """Return the turns of a chat. Raises UserError."""
    # Both spellings mean the same; where a table has both columns, one of them is filled.
    there = [name for (name,) in FIELDS if name in row]
    if not there:
        raise UserError(f"{where}: the field `messages` is missing")
    name = next((name for name in there if row[name] not in EMPTY), there[0])
    messages = row[name]
    # A table of text holds the list as JSON.
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: `{name}` is a text, and no JSON list") from None
    if not isinstance(messages, list):
        raise UserError(f"{where}: `{name}` is no list of messages")
    found = tuple(
        _turn(message, f"{where}: {name}[{number}]") for number, message in enumerate(messages)
    )
    roles = [role for role, _ in found]
    if "assistant" in roles and "user" not in roles[: roles.index("assistant")]:
        raise UserError(
            f"{where}: {name}[{roles.index('assistant')}]: is the assistant's before any of the "
            "user's, and answers nobody"
        )
    if not any(role == "assistant" for role, _ in found):
        raise UserError(f"{where}: no turn is the assistant's, and only its answers are learnt")
    return found


def _turn(message: Any, where: str) -> Turn:
    """Return a message's role and words. Raises UserError."""
    keys = [pair for pair in KEYS if isinstance(message, dict) and {*pair} <= {*message}]
    if not keys:
        raise UserError(f'{where}: no message; expected {{"role": ..., "content": ...}}')
    role, words = (message[key] for key in keys[0])
    if not isinstance(role, str) or role not in KNOWN:
        raise UserError(f'{where}: unknown role "{role!s:.40}"; allowed: {", ".join(KNOWN)}')
    if not isinstance(words, str):
        what = "null" if words is None else "not a string"
        raise UserError(f"{where}: `{keys[0][1]}` is {what}; only text is read")
    role = ROLES.get(role, role)
    if role == "assistant" and not words.strip():
        raise UserError(f"{where}: the answer is empty; leave the chat out, or fill it in")
    return role, words
