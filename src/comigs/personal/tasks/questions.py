"""This module makes questions of chats: what the assistant answered, and wrong answers to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comigs.data.document import Document, Turn, alike
from comigs.personal.tasks.text_scores import normalized
from comigs.seeds import generator

WRONG = 3  # wrong answers beside the right one


@dataclass(frozen=True)
class Question:
    """A question is the turns up to an answer of the assistant's, and that answer.

    name: the place of the chat, for messages. chat: the number of the chat.
    """

    before: tuple[Turn, ...]
    answer: str
    name: str
    chat: int = 0

    @property
    def asked(self) -> str:
        """What the user said last, as it is compared."""
        return alike(next((words for role, words in self.before[::-1] if role == "user"), ""))


def questions_of(chats: Iterable[Document]) -> list[Question]:
    """Return a question for each answer in these chats; what was said before it is as it was."""
    found = []
    for number, chat in enumerate(chats):
        for place, (role, words) in enumerate(chat.turns):
            if role == "assistant":
                found.append(Question(chat.turns[:place], words, chat.name, number))
    return found


def wrong_answers(
    questions: Sequence[Question], seed: int, client: str, limit: int | None = None
) -> list[list[str]]:
    """Return for each question three wrong answers, drawn from other chats; or none where there
    are fewer.

    limit: for the first so many questions; None: all. They are drawn from the answers to all.

    None of them is said in the question's own chat, or is anybody's answer to the same question;
    they differ from each other, all of it also once normalized. What is drawn depends on the seed,
    the client's name and the question's number.
    """
    by_words = {normalized(question.answer): question.answer for question in questions}
    # What is right somewhere, or stands in the prompt, is no wrong answer.
    right: dict[int | str, set[str]] = defaultdict(set)
    for question in questions:
        for of in (question.chat, question.asked):
            right[of].add(normalized(question.answer))
    drawn: list[list[str]] = []
    for number, question in enumerate(questions[:limit]):
        taken = right[question.chat] | right[question.asked]
        others = [words for words in by_words if words not in taken]
        if len(others) < WRONG:
            drawn.append([])
            continue
        random = generator(seed, "choices", client, number)
        chosen = random.choice(len(others), WRONG, replace=False)
        drawn.append([by_words[others[index]] for index in chosen])
    return drawn
