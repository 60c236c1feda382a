"""This module makes questions of chats: what the assistant answered, and wrong answers to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comigs.data.document import Document, Turn
from comigs.personal.tasks.text_scores import normalized
from comigs.seeds import generator

WRONG = 3  # wrong answers beside the right one


@dataclass(frozen=True)
class Question:
    """A question is the turns up to an answer of the assistant's, and that answer.

    name: the place of the chat, for messages.
    """

    before: tuple[Turn, ...]
    answer: str
    name: str


def questions_of(chats: Iterable[Document]) -> list[Question]:
    """Return a question for each answer in these chats; what was said before it is as it was."""
    found = []
    for chat in chats:
        for place, (role, words) in enumerate(chat.turns):
            if role == "assistant":
                found.append(Question(chat.turns[:place], words, chat.name))
    return found


def wrong_answers(questions: Sequence[Question], seed: int, client: str) -> list[list[str]]:
    """Return for each question three wrong answers, drawn from the answers to the others.

    They differ from the right one and from each other, also once normalized. What is drawn depends
    on the seed, the client's name and the question's number. A client with fewer than four
    different answers gets no wrong ones.
    """
    by_words = {normalized(question.answer): question.answer for question in questions}
    if len(by_words) <= WRONG:
        return []
    drawn = []
    for number, question in enumerate(questions):
        others = [words for words in by_words if words != normalized(question.answer)]
        random = generator(seed, "choices", client, number)
        chosen = random.choice(len(others), WRONG, replace=False)
        drawn.append([by_words[others[index]] for index in chosen])
    return drawn
