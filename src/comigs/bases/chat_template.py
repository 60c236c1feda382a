"""This module makes one text of a chat, by the base's template: for learning and for writing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateSyntaxError

from comigs.errors import UserError
from comigs.text import one_line

Message = Mapping[str, str]  # "role": system, user or assistant; "content": text
LEARNT_ON = date(2024, 7, 26)  # what a template that asks for the day is told while tokens are made
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # how a template asks for it
SHOWN = 200  # characters of a template's own words


class TemplateRefusal(UserError):
    """A template failed or refused; the text is its own words, shortened."""


def render(
    tokenizer: Any, messages: Sequence[Message], prompt: bool, day: date | None = None
) -> str:
    """Return a chat as one text. Raises TemplateRefusal.

    prompt: the assistant's next words come after it. day: what the template is told it is today;
    None: what it is.
    """
    # A template is a program of whoever made the base: it may raise anything.
    try:
        template = tokenizer.get_chat_template()
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template if day is None else on_day(template, day),
            add_generation_prompt=prompt,
            tokenize=False,
            # Answers are learnt and written at once, without what some bases think before them.
            enable_thinking=False,
        )
    except Exception as error:
        words = one_line(str(error)) or type(error).__name__
        if isinstance(error, TemplateSyntaxError):
            words += f" (line {error.lineno})"
        raise TemplateRefusal(words[:SHOWN]) from None
    return text


def on_day(template: str, day: date) -> str:
    """Return a template to which today is that day."""
    # The library lets no function of ours into a template, so the day is written into it.
    return TODAY.sub(lambda call: repr(day.strftime(call[2])), template)


def use_template(tokenizer: Any, template: str) -> None:
    """Give a tokenizer the template of the config. Raises UserError where it is none."""
    before, tokenizer.chat_template = tokenizer.chat_template, template
    # Only what no chat can mend is said here; that it refuses this chat means nothing.
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        tokenizer.chat_template = before
        why = f"{one_line(str(error))[:SHOWN]} (line {error.lineno})"
        raise UserError(f"base.chat_template: is no Jinja template: {why}") from None
    except Exception:
        return
