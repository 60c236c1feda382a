"""One table says of every setting of a config who reads it, and what is given and never read.

What would make another run than was asked for is refused (`methods/loading.py`, the engines). What
only has no effect is noted, as one config is often run with many methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from comigs.config import ClientEntry, Config, ExpertShape, Text
from comigs.methods.loading import load_method
from comigs.methods.method import Method
from comigs.slots import Slot
from comigs.text import listed

Engine = Literal["in-process", "flower"]


@dataclass(frozen=True)
class Choice:
    """A choice is what decides who reads a setting: the config, its method and the engine."""

    config: Config
    method: Method
    engine: Engine

    @property
    def shapes(self) -> list[ExpertShape]:
        """The experts of every client, as the method makes them."""
        return [self.method.shape(self.config.shape_of(client)) for client in self.config.clients]

    @property
    def has_router(self) -> bool:
        """Whether any client has a router."""
        several = any(shape.num_experts > 1 for shape in self.shapes)
        return self.method.mixing == "routed" and several


Reason = str  # why nobody reads a setting; "" where somebody does
Reader = Callable[[Choice], Reason]


def always(choice: Choice) -> Reason:
    """Say of a setting that every run reads."""
    return ""


def a_router(choice: Choice) -> Reason:
    """Say of a setting of routers whether there is one."""
    if choice.has_router:
        return ""
    return f"with {choice.config.method} no client has a router"


def phases(choice: Choice) -> Reason:
    """Say of a setting of the router's own phases whether there are any."""
    if choice.has_router and choice.method.schedule == "joint":
        return f"with {choice.config.method} the router learns with the experts"
    return a_router(choice)


def folds(choice: Choice) -> Reason:
    """Say of the number of folds whether train is cut into any."""
    return of_source("crossfit", choice)


def prior(choice: Choice) -> Reason:
    """Say of the weight of a prior whether any client has one."""
    return of_source("prior", choice)


def of_source(source: str, choice: Choice) -> Reason:
    """Say of a setting of one source of routers whether any client's learns from it."""
    config = choice.config
    if all(config.router_data_of(client) != source for client in config.clients):
        return f'client.router_data is not "{source}"'
    return phases(choice)


def together(choice: Choice) -> Reason:
    """Say of the correction for experts that share a token whether any do."""
    for shape in choice.shapes:
        own = shape.generalists + shape.specialists
        if shape.others != "none":
            return "beside the others' expert all have one scale"
        if choice.method.mixing == "routed":
            own = min(own, choice.config.experts.top_k)
        if own > 1:
            return ""
    return f"with {choice.config.method} a token has one expert of the client's own"


def attention(choice: Choice) -> Reason:
    """Say of sharing attention LoRA whether the method leaves it to the config."""
    config, shared = choice.config, []
    for wanted in (True, False):
        experts = config.experts.model_copy(update={"share_attention": wanted})
        method = load_method(config.model_copy(update={"experts": experts}))
        shared.append([method.shares(Slot(0, "q", "attention", matrix)) for matrix in "AB"])
    return "" if shared[0] != shared[1] else f"{config.method} decides that itself"


def shape_of_all(key: str, choice: Choice) -> Reason:
    """Say of a number in [experts] whether any client's experts depend on it."""
    experts = choice.config.experts
    more = experts.model_copy(update={key: (getattr(experts, key) or 0) + 1})
    other = choice.config.model_copy(update={"experts": more})
    if Choice(other, choice.method, choice.engine).shapes != choice.shapes:
        return ""
    # What is sent has a scale that follows from [experts] alone.
    if choice.method.on_top and (key == "specialists" or experts.specialists):
        return ""
    return "no client's experts depend on it"


def shape_of_client(key: str, entry: ClientEntry, choice: Choice) -> Reason:
    """Say of a number of a client whether its experts depend on it."""
    more = entry.model_copy(update={key: (getattr(entry, key) or 0) + 1})
    before, after = map(choice.config.shape_of, (entry, more))
    if choice.method.shape(before) != choice.method.shape(after):
        return ""
    return "the client's experts do not depend on it"


def weight(entry: ClientEntry, choice: Choice) -> Reason:
    """Say of a client's weight whether the method weighs clients by their text."""
    if choice.method.weighs or "." in choice.config.method:
        return ""
    return f"{choice.config.method} does not weigh clients by their text"


def something_shared(choice: Choice) -> Reason:
    """Say of a setting of uploads whether there are any."""
    parts = ("g0", "attention")
    slots = [Slot(0, "up", part, matrix) for part in parts for matrix in "AB"]
    if any(choice.method.shares(slot) for slot in slots):
        return ""
    return f"{choice.config.method} shares nothing"


def trimmed(choice: Choice) -> Reason:
    """Say of what a trimmed mean cuts whether there is one."""
    if choice.config.upload.merge != "trimmed":
        return 'upload.merge is not "trimmed"'
    return something_shared(choice)


def network(choice: Choice) -> Reason:
    """Say of a setting of waiting whether anybody can be late."""
    if choice.engine == "flower" or choice.config.conditions.given:
        return ""
    return "in one process nobody is waited for ([conditions], or --engine flower)"


def discounted(choice: Choice) -> Reason:
    """Say of the factor of late uploads whether any count."""
    if choice.config.participation.late != "discount":
        return 'participation.late is not "discount"'
    return network(choice)


def watched(choice: Choice) -> Reason:
    """Say of the splits to evaluate whether anything is during the run."""
    return "evaluation.every is 0" if choice.config.evaluation.every == 0 else ""


def hashed(choice: Choice) -> Reason:
    """Say of the shares of a split by hash whether any text is split so."""
    if all(isinstance(client.text, Text) for client in choice.config.clients):
        return "every client's text has its splits given"
    return ""


def own_machine(choice: Choice) -> Reason:
    """Say of a folder of this machine whether any text is on it."""
    if choice.engine == "flower":
        return "the text is on the clients' devices"
    return ""


def owners(choice: Choice) -> Reason:
    """Say of the memory that a process may have whether the config decides that."""
    if choice.engine == "flower":
        return "the owners of devices say how much, with --max-memory"
    return ""


def private(choice: Choice) -> Reason:
    """Say of a setting of privacy whether there is any."""
    return "" if choice.config.privacy.is_on else 'privacy.level is "none"'


def simulated(choice: Choice) -> Reason:
    """Say of simulated conditions whether this run simulates any."""
    if choice.engine == "flower":
        return "devices have conditions of their own"
    given = choice.config.conditions.given
    return "" if given else "no device or link in it has a figure"


def summed(choice: Choice) -> Reason:
    """Say of a setting of sums whether uploads are summed."""
    if choice.config.privacy.secure_aggregation:
        return something_shared(choice)
    return "privacy.secure_aggregation is false"


def tracked(choice: Choice) -> Reason:
    """Say of what trackers are told whether there are any."""
    return "" if choice.config.track.to else "track.to names no tracker"


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(("version", "name", "seed", "method", "rounds", "workers", "options"), always),
    **dict.fromkeys(("base.name", "base.dtype", "base.weights", "base.attention"), always),
    **dict.fromkeys(("base.device", "base.recompute"), always),
    "base.memory": owners,
    **dict.fromkeys(("base.tokenizer", "base.chat_template", "base.threads"), always),
    "data.root": always,  # it is always given: the folder of the config file
    "data.cache": own_machine,
    **dict.fromkeys(("data.sequence_length", "data.loss"), always),
    "data.distribution": always,
    **dict.fromkeys(("data.valid_fraction", "data.test_fraction"), hashed),
    **dict.fromkeys(("data.short_repeat", "data.train_share", "data.valid_share"), always),
    "experts.generalists": partial(shape_of_all, "generalists"),
    "experts.specialists": partial(shape_of_all, "specialists"),
    "experts.rank": partial(shape_of_all, "rank"),
    "experts.specialist_rank": partial(shape_of_all, "specialist_rank"),
    "experts.attention_rank": always,
    "experts.share_attention": attention,
    **dict.fromkeys(("experts.alpha", "experts.scaling"), always),
    "experts.strength": together,
    **dict.fromkeys(("experts.top_k", "experts.routing", "experts.router_start"), a_router),
    **dict.fromkeys(("client.steps", "client.batch_size", "client.micro_batch_size"), always),
    **dict.fromkeys(("client.lr", "client.weight_decay", "client.betas"), always),
    "client.router_lr": a_router,
    **dict.fromkeys(("client.router_every", "client.router_steps", "client.router_data"), phases),
    "client.folds": folds,
    "client.prior_coef": prior,
    **dict.fromkeys(("client.balance_coef", "client.generalist_share"), a_router),
    **dict.fromkeys(("evaluation.every", "evaluation.keep", "evaluation.batch_size"), always),
    "evaluation.splits": watched,
    **dict.fromkeys(("participation.clients_per_round", "participation.min_clients"), always),
    "participation.max_failures": always,
    **dict.fromkeys(("participation.deadline", "participation.late"), network),
    "participation.late_discount": discounted,
    **dict.fromkeys(
        ("upload.format", "upload.max_norm", "upload.max_norm_ratio"), something_shared
    ),
    "upload.merge": something_shared,
    "upload.trim": trimmed,
    "privacy.level": always,
    "privacy.secure_aggregation": something_shared,
    "privacy.threshold": summed,
    **dict.fromkeys(("privacy.epsilon", "privacy.noise_multiplier", "privacy.delta"), private),
    **dict.fromkeys(("privacy.clip", "privacy.expected_batch", "privacy.noise_seed"), private),
    "conditions": simulated,
    "track.to": always,
    "track.names": tracked,
}
OF_CLIENTS: Mapping[str, Callable[[ClientEntry, Choice], Reason]] = {
    "name": lambda entry, choice: "",
    "text": lambda entry, choice: "",
    "specialists": partial(shape_of_client, "specialists"),
    "rank": partial(shape_of_client, "rank"),
    "specialist_rank": partial(shape_of_client, "specialist_rank"),
    "router_data": lambda entry, choice: phases(choice),
    "weight": weight,
}


def unread(config: Config, method: Method, engine: Engine) -> str:
    """Return a line on what the config gives and nobody reads; "" where there is nothing."""
    choice, fields = Choice(config, method, engine), dict[str, list[str]]()
    for field, reason in _reasons(choice):
        if reason:
            fields.setdefault(reason, []).append(field)
    parts = [f"{listed(names)} ({reason})" for reason, names in fields.items()]
    return f"given, but without effect here: {'; '.join(parts)}" if parts else ""


def _reasons(choice: Choice) -> Iterator[tuple[str, Reason]]:
    """Give every field that is not as by default, and why nobody reads it."""
    for field, reader in READERS.items():
        value: Any = choice.config
        section: Any = value
        for key in field.split("."):
            section, value = value, getattr(value, key)
        if value != type(section).model_fields[field.rpartition(".")[2]].default:
            yield field, reader(choice)
    for entry in choice.config.clients:
        for key, of_client in OF_CLIENTS.items():
            if getattr(entry, key) is not None:
                yield f"clients.{entry.name}.{key}", of_client(entry, choice)
