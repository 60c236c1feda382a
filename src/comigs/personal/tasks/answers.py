"""This module measures how a model answers a client's questions, and which answers it prefers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comigs.bases.load import Base
from comigs.personal.model import PersonalModel
from comigs.personal.tasks.likelihood import Candidate, candidate, nats_of
from comigs.personal.tasks.questions import Question
from comigs.personal.tasks.text_scores import exact_match, rouge_l, token_f1
from comigs.personal.tasks.writing import Written, write_answers

WRITTEN = {"exact match": exact_match, "token F1": token_f1, "ROUGE-L": rouge_l}
CUT = "cut off"  # of answers that had not ended when no more was written
LOWER_IS_BETTER = (CUT,)
CHOSEN = ("choice per token", "choice")  # what can be compared comes first


@dataclass(frozen=True)
class AnswerSettings:
    """These settings say how answers are written and read.

    longest: tokens of a written answer at most. length: tokens that are predicted of a chat with a
    possible answer. batch_size: chats at once.
    """

    longest: int
    length: int
    batch_size: int


class AnswerTask:
    """An answer task is a client's questions as tokens, for its own model and for the base."""

    def __init__(
        self,
        base: Base,
        questions: Sequence[Question],
        wrong: Sequence[Sequence[str]],
        settings: AnswerSettings,
    ) -> None:
        """Encode the questions, and the answers to choose from.

        wrong: three answers to each question, or none. Raises UserError where the base has no
        tokens for what is said.
        """
        self.encoder, self.settings = base.encoder.chats, settings
        self.questions = questions
        self.prompts = [self.encoder.prompt(asked.before, asked.name) for asked in questions]
        self.choices: list[list[Candidate]] = []
        for asked, others in zip(questions, wrong, strict=True):
            if not others:
                continue
            possible = [
                candidate(self.encoder, asked.before, words, settings.length, asked.name)
                for words in (asked.answer, *others)
            ]
            # Only whole answers can be compared, not one with the beginning of another.
            if all(one.is_whole for one in possible):
                self.choices.append(possible)

    def longer(self) -> int:
        """Return how many right answers have more tokens than a model may write."""
        words = [asked.answer for asked in self.questions]
        tokens = self.encoder.tokenizer(words, add_special_tokens=False)["input_ids"]
        return sum(len(ids) > self.settings.longest for ids in tokens)

    def written(self, model: PersonalModel) -> list[Written]:
        """Return the answer that a model writes to each question, as it is bound now."""
        alone = model.config.experts.routing == "sequence"
        return write_answers(
            model.model,
            self.encoder,
            self.prompts,
            self.settings.longest,
            1 if alone else self.settings.batch_size,
        )

    def scores(self, model: PersonalModel, answers: Sequence[Written]) -> dict[str, list[float]]:
        """Return by measure the score of each question, as the model is bound now.

        answers: what it has written.
        """
        found: dict[str, list[float]] = {}
        for name, score in WRITTEN.items():
            pairs = zip(answers, self.questions, strict=True)
            found[name] = [score(answer.text, asked.answer) for answer, asked in pairs]
        found[CUT] = [float(answer.is_cut) for answer in answers]
        if self.choices:
            found |= self._chosen(model)
        return found

    def _chosen(self, model: PersonalModel) -> dict[str, list[float]]:
        """Return whether the right answer is the likeliest: by token, and as a whole."""
        flat = [one for possible in self.choices for one in possible]
        nats = nats_of(model.attachment, flat, self.settings.batch_size, model.dtype)
        each = iter(zip(nats, flat, strict=True))
        found: dict[str, list[float]] = {name: [] for name in CHOSEN}
        for possible in self.choices:
            own = [next(each) for _ in possible]
            whole = [value for value, _ in own]
            by_token = [value / one.tokens for value, one in own]
            for name, values in zip(CHOSEN, (by_token, whole), strict=True):
                found[name].append(float(values[0] < min(values[1:])))
        return found
