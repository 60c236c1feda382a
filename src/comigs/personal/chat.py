"""A conversation with a client's own model: what was said, what the model reads of it, and what
routed the answer.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from comigs.bases.chat_template import Message
from comigs.bases.load import Base
from comigs.bases.usable import end_ids
from comigs.errors import UserError
from comigs.files import write_whole, writing
from comigs.personal.model import require_model
from comigs.personal.prompts import conversation_ids, unread
from comigs.personal.routes.describe import texts_of
from comigs.personal.routes.weights import generalist_weight, is_beside_others, shared_experts
from comigs.personal.serve.jobs import Settings
from comigs.personal.serve.model import RowModel
from comigs.personal.serve.packed import read_client
from comigs.personal.serve.rows import Row, make_pass
from comigs.personal.serve.sampling import choose
from comigs.personal.serve.text import Transcript, Vocabulary
from comigs.runs.environment import require_same_base
from comigs.runs.folder import RunFolder
from comigs.runs.routes import Sides, sides_in_words
from comigs.seeds import generator
from comigs.text import Say


@dataclass(frozen=True)
class Style:
    """How answers are written. temperature: 0 takes the likeliest token each time. seed: repeats a
    sampled answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None


class Chat:
    """A conversation with one client of a run at a time; its others are a `change_client` away, on
    the same base.

    say: gets a line where something happens that nobody asked for.
    """

    def __init__(self, folder: RunFolder, base: Base, client: str, style: Style, say: Say) -> None:
        require_model(folder, client)
        require_same_base(folder, base)
        self.folder = folder
        self.base = base
        self.style = style
        self.say = say
        self.system = ""
        self.turns: list[Message] = []
        self.client = client
        # A conversation keeps its row, so that what was read once stays read.
        self._vocabulary = Vocabulary(base.tokenizer)
        self._ends = end_ids(base.model, base.tokenizer)
        self._packed = read_client(folder, client, base, client, 0)
        self._model = RowModel(base)
        self._row: Row | None = None
        self._row_ids: list[int] = []  # what the row has read
        self._read_from = 0  # the first of `turns` that the model still reads
        self._last: tuple[list[int], list[int]] | None = None  # what was read, and the answer

    @property
    def name(self) -> str:
        """The model's name: its run's and its client's."""
        return f"{self.folder.path.resolve().name}/{self.client}"

    def ask(self, text: str) -> Generator[str]:
        """Yield the answer piece by piece. Stopped early, what was written counts as the answer.

        Raises UserError where the message is too long.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids()
        except BaseException:  # a Ctrl-C, too, must not leave a question without an answer
            self.turns.pop()
            raise
        answer, written = "", list[int]()
        try:
            for piece in self._write(ids, written):
                answer += piece
                yield piece
        finally:
            self.turns.append({"role": "assistant", "content": answer})
            self._last = ids, written

    def _write(self, ids: list[int], written: list[int]) -> Iterator[str]:
        """Yield what comes after these tokens as text, and add its tokens to `written`."""
        style = self.style
        window = int(self.base.model.config.max_position_embeddings)
        settings = Settings(style.max_new_tokens, style.temperature, seed=style.seed)
        seed = style.seed if style.seed is not None else secrets.randbits(63)
        random = generator(seed, "chat", len(self.turns))
        transcript = Transcript(self._vocabulary, 0, ())
        # What the model has read of the conversation before stays read.
        feed = self._new_of(ids)
        for _ in range(min(style.max_new_tokens, window - len(ids))):
            token = choose(self._read(feed), settings, random)
            if token in self._ends:
                break
            written.append(token)
            feed = [token]
            if text := transcript.add(token, None).text:
                yield text
        if rest := transcript.end("length").text:
            yield rest

    def _new_of(self, ids: list[int]) -> list[int]:
        """Return the tokens that are still to be read, and make the row one that has read the
        others.
        """
        known = 0
        for ours, theirs in zip(self._row_ids, ids[:-1], strict=False):
            if ours != theirs:
                break
            known += 1
        if self._row is None or not self._row.rewind(known):
            self._row, known = Row(self._packed), 0
        self._row_ids = ids[:known]
        return ids[known:]

    def _read(self, ids: list[int]) -> Tensor:
        """Read tokens; return the logits of the next (V,)."""
        assert self._row is not None
        # A pass that is stopped half-way leaves no row to go on with.
        row, self._row = self._row, None
        logits_V = self._model.forward(make_pass([(row, ids)]))[0]
        self._row = row
        self._row_ids += ids
        return logits_V

    def _fitting_ids(self) -> list[int]:
        """Return the tokens of what the base can read of the conversation; the oldest turns go
        first, whole.

        Raises UserError where the last message alone is too long.
        """
        window = int(self.base.model.config.max_position_embeddings)
        # An answer must have room too, but a short window is not to be given to it altogether.
        room = window - min(self.style.max_new_tokens, window // 2)
        begin = self._read_from
        while len(ids := conversation_ids(self.base.tokenizer, self._messages(begin))) > room:
            if begin >= len(self.turns) - 1:
                raise UserError(
                    f"your message: {len(ids)} tokens, and the base reads {room} before an answer"
                )
            begin += 2
        if token := unread(self.base.model, self.base.tokenizer, ids):
            raise UserError(f'your message: holds "{token}", which this base does not read')
        if begin > self._read_from:
            cut, all_turns = begin // 2, len(self.turns) // 2
            self.say(f"({cut} of {all_turns} turns no longer fit, and are not read any more)")
        self._read_from = begin
        return ids

    def _messages(self, begin: int = 0) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[begin:]

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.turns, self._read_from, self._last = [], 0, None

    def set_system(self, text: str) -> None:
        """Begin a new conversation after this text; an empty one takes it away."""
        self.system = text
        self.reset()

    def change_client(self, client: str) -> None:
        """Go on with another client's model on the same base; what was said stays.

        Raises UserError where there is none.
        """
        require_model(self.folder, client)
        self._model.close()  # for a client is read onto a base that is free
        try:
            self._packed = read_client(self.folder, client, self.base, client, 0)
        finally:
            self._model = RowModel(self.base)
        self.client = client
        self._row, self._row_ids, self._last = None, [], None

    def save(self, path: Path) -> None:
        """Write the conversation as JSON in OpenAI's words, for its owner's eyes only. Raises
        UserError.
        """
        content = {"model": self.name, "messages": self._messages()}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        with writing(path, "choose another file"):
            if os.path.lexists(path):
                raise UserError(f"{path}: exists already; nothing was changed. Choose another file")
            fill = partial(Path.write_text, data=text, encoding="utf-8")
            write_whole(path, fill, mode=0o600)

    def routes(self) -> list[tuple[str, float]]:
        """Return each token of the last answer as text, with the weight of the generalists on it,
        mean over the blocks. Raises UserError without routes.

        Where everybody's generalist is beside a client's own experts, it is that one, as in the
        report.
        """
        if self._last is None:
            raise UserError("/routes: there is no answer of this model yet")
        read, written = self._last
        if not written:
            raise UserError("/routes: the last answer is empty")
        shared = shared_experts(self.folder, self.client)
        # A token's route is chosen where it is read, not where it is written.
        weights: list[Tensor] = []
        this = make_pass([(Row(self._packed), read + written)])
        self._model.forward(replace(this, routes=weights))
        weights_T = generalist_weight(torch.stack(weights), shared).mean(dim=0)
        answered = weights_T[len(read) :].tolist()
        names = texts_of([self._vocabulary.bytes_of(id) for id in written])
        return list(zip(names, answered, strict=True))

    @property
    def sides(self) -> Sides:
        """The sides between which the client's router chooses, in words."""
        return sides_in_words(is_beside_others(self.folder, self.client))

    def close(self) -> None:
        """Take the experts off the base again."""
        self._model.close()
