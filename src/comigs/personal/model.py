"""A client's own model: the base with the client's experts on it, as an ordinary `transformers`
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from comigs.bases.load import Base
from comigs.client.evaluate import Measurement, evaluate
from comigs.client.state import load_tensors
from comigs.data.corpus import TokenStore
from comigs.errors import UserError
from comigs.experts.attach import Attachment
from comigs.methods.loading import load_method
from comigs.runs.folder import RunFolder


class PersonalModel:
    """model: the base with the client's experts attached, usable as any `transformers` model;
    tokenizer: its own.
    """

    def __init__(self, folder: RunFolder, client: str, base: Base) -> None:
        folder.require_a_round()
        config, method = folder.config(), load_method(folder.config())
        shape = method.shape(config.shape_of(config.client_named(client)))
        path = f"clients/{client}/{'personal' if folder.checkpoint().finished else 'experts'}"
        if not folder.holds(path):
            raise UserError(
                f'{folder.path}: holds no model of client "{client}"; it was not asked yet, or its model is on its own '
                "device"
            )
        recorded = folder.environment()["base_fingerprint"]
        if recorded != base.fingerprint:
            raise UserError(
                f'{folder.path}: base "{base.name}" is not the one these experts were trained on'
            )
        self.attachment = Attachment(
            base.model, base.architecture, config.experts, summed=method.mixing == "sum"
        )
        self.model, self.tokenizer = base.model, base.tokenizer
        shapes = self.attachment.slot_shapes(shape, method.mixing == "routed", method.merges)
        tensors = {slot: torch.empty(size, device=base.device) for slot, size in shapes.items()}
        load_tensors(tensors, folder.load(path), client)
        self.attachment.bind(tensors)
        self.config, self.dtype, self.tensors = config, base.dtype, tensors

    def evaluate(self, stores: Sequence[TokenStore], untouched_base: bool = False) -> Measurement:
        """Every token once, as in the run; with the base alone where asked."""
        self.attachment.bind({} if untouched_base else self.tensors)
        result = evaluate(
            self.attachment,
            stores,
            self.config.data.sequence_length,
            self.config.evaluation.batch_size,
            self.dtype,
        )
        self.attachment.bind(self.tensors)
        return result

    def generate(self, prompt: str, **settings: Any) -> str:
        """The prompt and what the model writes after it; `settings` go to `transformers`'
        generate.
        """
        return prompt + "".join(self.stream(prompt, **settings))

    def stream(
        self, prompt: str, max_new_tokens: int = 60, seed: int | None = None, **settings: Any
    ) -> Iterator[str]:
        """The continuation, piece by piece as it is written. seed: makes sampling repeatable.
        Raises UserError.
        """
        encoded = self.tokenizer(
            prompt or self.tokenizer.eos_token, return_tensors="pt", add_special_tokens=False
        )
        room = self.model.config.max_position_embeddings - encoded["input_ids"].shape[1]
        if room < 1:
            raise UserError(
                f"--prompt: longer than the {self.model.config.max_position_embeddings} tokens this base reads"
            )
        streamer, unwanted = (
            TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            Event(),
        )
        arguments = {
            **encoded.to(self.model.device), "streamer": streamer, "max_new_tokens": min(max_new_tokens, room),
            "pad_token_id": self.tokenizer.eos_token_id, "do_sample": False,
            "use_cache": self.config.experts.routing != "sequence",  # which reads the whole text so far
            **settings,
            "stopping_criteria": StoppingCriteriaList([*settings.get("stopping_criteria", ()), _Once(unwanted)]),
        }  # fmt: skip
        sampling, failure = arguments["do_sample"], list[BaseException]()

        def write() -> None:
            try:
                with torch.random.fork_rng(enabled=sampling), torch.no_grad():
                    if sampling and seed is not None:
                        torch.manual_seed(seed)
                    self.model.generate(**arguments)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=write, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # nobody reads on: no thread may go on writing beside what its caller does next
            unwanted.set()
            thread.join()
        if failure:
            raise failure[0]

    def close(self) -> None:
        """Take the experts off again."""
        self.attachment.detach()


class _Once(StoppingCriteria):
    """Stops writing once an event is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.event.is_set(), device=input_ids.device)
