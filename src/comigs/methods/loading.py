"""This module finds a method by its name and reads its options."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from itertools import product
from types import ModuleType
from typing import TypeVar

from pydantic import ValidationError

from comigs import methods
from comigs.config import SPECIALISTS_RANGE, Config, Section
from comigs.config.errors import one_line
from comigs.errors import UserError, nearest
from comigs.methods.merging import mean_of_uploads
from comigs.methods.method import Method
from comigs.slots import Slot

Settings = TypeVar("Settings", bound=Section)
# what methods are made of
NO_METHODS = ("alone", "full_step", "loading", "lowrank", "merging", "method", "readers", "shapes")


def list_methods() -> list[str]:
    """Return the names of the methods in this folder, as users type them."""
    files = [module.name for module in pkgutil.iter_modules(methods.__path__)]
    return [file.replace("_", "-") for file in files if file not in NO_METHODS]


def method_module(name: str) -> ModuleType:
    """Return the module that defines a method: a file of this folder, or `package.module`.

    Raises UserError with the nearest name.
    """
    known = list_methods()
    if not re.fullmatch(r"\w+(\.\w+)+", name) and name not in known:
        raise UserError(
            f'method: unknown method "{name}".{nearest(name, known)} Known: {", ".join(known)}'
        )
    path = name if "." in name else f"comigs.methods.{name.replace('-', '_')}"
    try:
        return importlib.import_module(path)
    except ImportError as error:
        raise UserError(
            f'method: "{name}" cannot be used: {error}; expected a module with method(config) that '
            "Python finds (set PYTHONPATH to the folder that it is in)"
        ) from None


def load_method(config: Config) -> Method:
    """Return the method that the config names. Raises UserError."""
    name = config.method
    module = method_module(name)
    build: Callable[[Config], Method] | None = getattr(module, "method", None)
    if build is None:
        raise UserError(f'method: "{name}" cannot be used: expected a module with method(config)')

    # Methods that build on another one read its options too, so unknown ones are refused here.
    kind = getattr(module, "Options", Section)
    unknown = [key for key in config.options if key not in kind.model_fields]
    if unknown:
        takes = ", ".join(kind.model_fields) or "none"
        near = nearest(unknown[0], list(kind.model_fields))
        raise UserError(
            f'options.{unknown[0]}: "{name}" has no such option.{near} Its options: {takes}'
        )
    options(config, kind)
    method = build(config)
    if not isinstance(method, Method):
        kind = type(method).__name__
        raise UserError(f'method: "{name}" cannot be used: method(config) returned {kind}')
    _require_possible(config, method)
    return method


def options(config: Config, kind: type[Settings]) -> Settings:
    """Return the config's [options] as the method's own section, or those of them that it has.

    Raises UserError naming the field.
    """
    own = {key: value for key, value in config.options.items() if key in kind.model_fields}
    try:
        return kind.model_validate(own)
    except ValidationError as error:
        raise UserError(f"options.{one_line(error, dict(config.options), {'': kind})}") from None


def _require_power(config: Config, method: Method) -> None:
    """Refuse conditions that may leave a client with fewer experts than a token uses, or none.

    Raises UserError naming the number.
    """
    # Whatever group a client is drawn into, and wherever a rate may lead, it must have enough.
    conditions, top_k = config.conditions, config.experts.top_k
    if not any(c.specialists or c.specialists_rate for c in conditions.everyone()):
        return
    for client in config.clients:
        for condition in conditions.possible(client.name):
            field, numbers = "specialists", [number for _, number in condition.specialists or ()]
            if condition.specialists_rate is not None:
                least, most = condition.specialists_range or SPECIALISTS_RANGE
                field, numbers = "specialists_range", list(range(least, most + 1))
            for number in numbers:
                entry = client.model_copy(update={"specialists": number})
                experts = method.shape(config.shape_of(entry)).num_experts
                if experts == 0 or top_k > experts > 1:
                    raise UserError(
                        f"conditions.{field}: {number} leaves {experts} experts, but a token "
                        f"uses {top_k} (experts.top_k)"
                    )


def _sent(config: Config, method: Method) -> set[Slot]:
    """Return what clients of this run send of a linear, in one of two rounds."""
    sent = set()
    for client in config.clients:
        shape = method.shape(config.shape_of(client))
        parts = list(shape.parts)
        if shape.attention_rank:
            parts.append("attention")
        for part, matrix in product(parts, "AB"):
            slot = Slot(0, "up", part, matrix)
            if method.sends(slot, 1) or method.sends(slot, 2):
                sent.add(slot)
    return sent


def _other_than_a_mean(method: Method, sent: Iterable[Slot]) -> str:
    """Return why a server that adds noise to a mean is not all that this method gives back."""
    if not method.averages:
        return (
            "what its server gives back is not the mean of uploads (comigs can do that, with "
            'options.attention = "mean")'
        )
    for slot in sent:
        if method.sends(slot, 1) != method.sends(slot, 2):
            return "its clients send other tensors in every other round"
        if not method.receives(slot):
            return "its clients do not start from the mean of all"
    return ""


def _require_possible(config: Config, method: Method) -> None:
    """Refuse settings of other sections that this method cannot follow.

    Raises UserError naming the field.
    """
    level, leaks = config.privacy.level, ""
    if level != "none":
        sent = _sent(config, method)
        leaks = method.leaks if config.privacy.by_document else _other_than_a_mean(method, sent)
        if not leaks and not sent:
            leaks = "as it is set it sends nothing, so there is nothing to bound"
    if leaks:
        raise UserError(
            f'privacy.level: given "{level}", but {config.method} cannot be private: '
            f'{leaks}; must be "none", or choose another method'
        )
    is_the_mean = method.aggregate is mean_of_uploads and not method.centralized
    if config.privacy.secure_aggregation and not is_the_mean:
        raise UserError(
            f"privacy.secure_aggregation: given true, but {config.method} as configured does more "
            "with uploads than average them all, and the server would have their sum alone; must "
            "be false, or choose what averages, such as fedavg, or comigs with options.attention = "
            '"mean"'
        )
    merge = config.upload.merge
    if merge != "mean" and not method.averages:
        raise UserError(
            f'upload.merge: given "{merge}", but {config.method} merges in its own way; '
            f'must be "mean" (what averages can do "{merge}": fedavg, comigs with '
            'options.attention = "mean", and others)'
        )
    # A token cannot choose more experts than there are; a single one needs no choice. A device's
    # owner may have chosen none.
    for client in config.clients:
        experts, top_k = method.shape(config.shape_of(client)).num_experts, config.experts.top_k
        if experts == 0:
            raise UserError(
                f'specialists: client "{client.name}" has 0 experts with {config.method}; give it '
                "at least one"
            )
        if top_k > experts > 1:
            raise UserError(
                f'experts.top_k: {top_k} experts per token, but client "{client.name}" has '
                f"{experts} with {config.method}; allowed: 1 to {experts}"
            )
    _require_guides(config, method)
    _require_power(config, method)
    # Where text is centralized, one place has it all, and nobody can be away.
    everybody = {"clients_per_round": len(config.clients), "min_clients": 1}
    for name, allowed in everybody.items():
        given = getattr(config.participation, name)
        if method.centralized and given not in (None, allowed):
            raise UserError(
                f"participation.{name}: given {given}, but {config.method} trains one model in one "
                "place on everybody's text; leave it out"
            )


def _require_guides(config: Config, method: Method) -> None:
    """Refuse a router that is to follow similar clients where there is none it could follow.

    Raises UserError naming the field. A device knows of one client only, and asks nothing.
    """
    if method.mixing != "routed" or method.schedule == "joint" or len(config.clients) == 1:
        return
    guides = [client for client in config.clients if config.router_data_of(client) == "valid"]
    parts = [method.shape(config.shape_of(guide)).parts for guide in guides]
    for client in config.clients:
        own = method.shape(config.shape_of(client)).parts
        if config.router_data_of(client) == "prior" and len(own) > 1 and own not in parts:
            field = "client" if client.router_data is None else f"clients.{client.name}"
            raise UserError(
                f'{field}.router_data: given "prior", but no other client with the experts of '
                f'"{client.name}" ({", ".join(own)}) learns from valid; give one '
                'clients.NAME.router_data = "valid"'
            )
