"""This module holds a client's own model: the base with the client's experts on it.

It is an ordinary `transformers` model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread, main_thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from comigs.bases.chat_template import Message
from comigs.bases.load import Base
from comigs.bases.usable import end_ids, separator
from comigs.client.evaluate import Measurement, evaluate
from comigs.client.state import load_tensors, shape_as_saved
from comigs.client.workplace import attach
from comigs.config import ExpertShape
from comigs.data.corpus import TokenStore
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.methods.loading import load_method
from comigs.personal.prompts import conversation_ids, text_ids, unread
from comigs.personal.serve.text import Transcript, Vocabulary
from comigs.runs.checkpoint import Checkpoint
from comigs.runs.environment import require_same_base
from comigs.runs.folder import RunFolder
from comigs.slots import Slot


class PersonalModel:
    """A personal model is a base with one client's experts attached, until `close`.

    model: usable as any `transformers` model. tokenizer: its own.
    """

    def __init__(self, folder: RunFolder, client: str, base: Base) -> None:
        folder.require_a_round()
        config, method = folder.config(), load_method(folder.config())
        require_model(folder, client)
        require_same_base(folder, base)
        self.attachment = attach(config, method, base)
        self.model, self.tokenizer = base.model, base.tokenizer
        try:
            tensors = client_tensors(folder, client, base, self.attachment)
        except UserError:  # the base goes on without these experts
            self.close()
            raise
        self.attachment.bind(tensors)
        self.config, self.dtype, self.tensors = config, base.dtype, tensors

    def evaluate(self, stores: Sequence[TokenStore], untouched_base: bool = False) -> Measurement:
        """Measure every token once, as in the run; with the base alone where asked."""
        self.attachment.bind({} if untouched_base else self.tensors)
        length, size = self.config.data.sequence_length, self.config.evaluation.batch_size
        result = evaluate(self.attachment, stores, length, size, self.dtype)
        self.attachment.bind(self.tensors)
        return result

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """Be the base alone inside, and the client's own model again after."""
        self.attachment.unbind()
        try:
            yield
        finally:
            self.attachment.bind(self.tensors)

    def generate(self, prompt: str, **settings: Any) -> str:
        """Return the prompt and what the model writes after it.

        `settings` go to `transformers`' generate.
        """
        return prompt + "".join(self.stream(prompt, **settings))

    def answer(self, messages: Sequence[Message], **settings: Any) -> str:
        """Return what the assistant says next, by the chat template of the base or of the run.

        `settings` go to `transformers`' generate.
        """
        return "".join(self.stream(messages, **settings))

    def stream(
        self,
        prompt: str | Sequence[Message],
        max_new_tokens: int = 60,
        seed: int | None = None,
        **settings: Any,
    ) -> Generator[str]:
        """Yield the continuation of a text, or the answer to messages, piece by piece.

        A seed makes sampling repeatable. Raises UserError where the prompt is too long, or holds a
        special token that the base does not read.
        """
        self.attachment.lay_out()
        start, encoded = separator(self.tokenizer), self._encoded(prompt)
        window = self.model.config.max_position_embeddings
        room = window - encoded["input_ids"].shape[1]
        if room < 1:
            raise UserError(f"--prompt: longer than the {window} tokens this base reads")

        unwanted, failure = Event(), list[BaseException]()
        pieces = _Pieces(self.tokenizer)
        stopping = [*settings.get("stopping_criteria", ()), _Once(unwanted)]
        arguments = {
            **{name: tensor.to(self.model.device) for name, tensor in encoded.items()},
            "streamer": pieces,
            "max_new_tokens": min(max_new_tokens, room),
            "pad_token_id": start,
            "eos_token_id": sorted(end_ids(self.model, self.tokenizer)) or None,
            "do_sample": False,
            # Routing by sequence reads the whole text so far.
            "use_cache": self.config.experts.routing != "sequence",
            **settings,
            "stopping_criteria": StoppingCriteriaList(stopping),
        }
        sampling = arguments["do_sample"]
        if sampling:  # transformers would draw from the 50 likeliest
            arguments.setdefault("top_k", 0)
        devices = [self.model.device] if self.model.device.type == "cuda" else []

        # `generate` returns when all is written, so it works in a thread that feeds the streamer.
        def write() -> None:
            try:
                with torch.random.fork_rng(devices, enabled=sampling), torch.no_grad():
                    if sampling and seed is not None:
                        torch.manual_seed(seed)
                    self.model.generate(**arguments)
            except BaseException as error:
                failure.append(error)
                pieces.end()

        # No daemon: the interpreter would end beneath it, in C++, and abort.
        thread = Thread(target=write)
        thread.start()
        try:
            yield from iter(pieces.queue.get, None)
        # Where nobody reads on, no thread may go on writing beside what its caller does next.
        finally:
            unwanted.set()
            thread.join()
        if failure:
            raise failure[0]

    def _encoded(self, prompt: str | Sequence[Message]) -> dict[str, Tensor]:
        """Return a text, or a chat up to the assistant's next words, as `generate` takes it.

        Raises UserError where it holds a special token that the base does not read.
        """
        if isinstance(prompt, str):
            ids = text_ids(self.tokenizer, prompt)
        else:
            ids = conversation_ids(self.tokenizer, prompt)
        if token := unread(self.model, self.tokenizer, ids):
            raise UserError(f'--prompt: holds "{token}", which this base does not read')
        input_ids = torch.tensor([ids])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def close(self) -> None:
        """Take the experts off again."""
        self.attachment.detach()


def model_path(folder: RunFolder, client: str) -> str:
    """Return where a run has the tensors of a client's own model.

    While the run goes on, they are those of the best round so far, where there is one.
    """
    return _path_in(folder.checkpoint(), client)


def _path_in(checkpoint: Checkpoint, client: str) -> str:
    if checkpoint.finished:
        return f"clients/{client}/personal"
    best = f"clients/{client}/best"
    return best if best in checkpoint.newest else f"clients/{client}/experts"


def clients_here(folder: RunFolder) -> list[str]:
    """Return the clients of a run whose own model is here, in the config's order."""
    checkpoint = folder.checkpoint()  # it is read once, however many clients there are
    names = folder.config().names
    return [name for name in names if _path_in(checkpoint, name) in checkpoint.newest]


def require_model(folder: RunFolder, client: str) -> None:
    """Raise UserError where a run has no such client, or holds no model of it."""
    folder.config().client_named(client)
    if not folder.holds(model_path(folder, client)):
        raise UserError(
            f'{folder.path}: holds no model of client "{client}"; it was not asked yet, or its '
            "model is on its own device"
        )


def client_shape(folder: RunFolder, client: str) -> ExpertShape:
    """Return which experts a client's own model has, as it was saved.

    Raises UserError where the run has no such client, or no model of it.
    """
    require_model(folder, client)
    return _shape_of(folder, client, folder.load(model_path(folder, client)))


def _shape_of(folder: RunFolder, client: str, saved: Mapping[str, Tensor]) -> ExpertShape:
    config = folder.config()
    shape = load_method(config).shape(config.shape_of(config.client_named(client)))
    return shape_as_saved(shape, saved)


def client_tensors(
    folder: RunFolder, client: str, base: Base, attachment: Attachment
) -> dict[Slot, Tensor]:
    """Return the tensors of a client's own model, on the base's device. Raises UserError.

    attachment: with the run's settings of experts.
    """
    require_model(folder, client)
    method, saved = load_method(folder.config()), folder.load(model_path(folder, client))
    shape = _shape_of(folder, client, saved)
    shapes = attachment.slot_shapes(shape, method.mixing == "routed", method.merges)
    tensors = {slot: torch.empty(size, device=base.device) for slot, size in shapes.items()}
    load_tensors(tensors, saved, client)
    return tensors


class _Pieces(BaseStreamer):
    """This streamer puts text into a queue as its tokens are written, and None at its end.

    Those of `transformers` decode the new tokens alone, and so lose the space before the first with
    tokenizers that mark words by one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.queue: SimpleQueue[str | None] = SimpleQueue()
        self._text = Transcript(Vocabulary(tokenizer), 0, ())
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first (1, L), then each token (1,)."""
        tokens = [] if self._is_prompt else value.flatten().tolist()
        self._is_prompt = False
        for token in tokens:
            if text := self._text.add(token, None).text:
                self.queue.put(text)

    def end(self) -> None:
        """Tell what is left of the text, and that it ends."""
        if text := self._text.end("length").text:
            self.queue.put(text)
        self.queue.put(None)


class _Once(StoppingCriteria):
    """This criterion stops writing once an event is set, or the process is about to end."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Return (batch,) whether each text stops."""
        done = self.event.is_set() or not main_thread().is_alive()
        return torch.full(input_ids.shape[:1], done, device=input_ids.device)
