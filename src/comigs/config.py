"""The one configuration tree: frozen, validated, read from TOML and written back into every run.

Each field says its unit and what `None` means; docs/config.md is made from these texts (scripts/config_docs.py).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from comigs.config_errors import one_line
from comigs.errors import UserError, nearest

VERSION = 1
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Section(BaseModel):
    """A part of the tree: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseSection(Section):
    """[base]: the frozen language model all clients share."""

    name: str = Field("mini", description="mini, smollm2-135m, tiny-gpt2, tiny-llama, a local folder or a hub name")
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen weights and of autocast; auto: bfloat16 where the device is fast at it"
    )
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="transformers' attention; auto: eager on a CPU, a quarter faster at 128 tokens, sdpa on a GPU",
    )
    device: str = Field("auto", description='"cpu", "cuda", "cuda:1", ...; auto: cuda where there is one')
    threads: int | None = Field(
        None, gt=0, description="CPU threads; None: as torch finds them (recorded; a resumed run uses the same)"
    )


class DataSection(Section):
    """[data]: how text becomes windows of tokens."""

    root: Path = Field(
        Path("."), description="folder that relative paths in `text` start from; default: the config file's"
    )
    cache: Path = Field(Path(".cache/comigs"), description="folder of the token stores, relative to the working folder")
    sequence_length: int = Field(128, ge=2, description="tokens per window")
    distribution: Literal["in", "out"] = Field(
        "in",
        description='"in": valid and test from the client\'s own text; "out": mixture of all clients\' valid and test',
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of documents in valid where splits are made by hash"
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of documents in test where splits are made by hash"
    )
    train_share: float = Field(
        1.0, gt=0, le=1, description="share of each client's train text that is used, from its start, in bytes"
    )
    valid_share: float = Field(
        1.0, gt=0, le=1, description="share of each client's valid text that is used, from its start, in bytes"
    )


class ExpertsSection(Section):
    """[experts]: what every client trains. `clients` entries may differ."""

    generalists: int = Field(1, ge=0, description="experts averaged by the server")
    specialists: int = Field(1, ge=0, description="experts that never leave their client")
    rank: int = Field(8, ge=1, description="LoRA rank of every expert")
    specialist_rank: int | None = Field(None, ge=1, description="LoRA rank of the specialists; None: rank")
    attention_rank: int | None = Field(None, ge=1, description="LoRA rank on the attention linears; None: rank")
    share_attention: bool = Field(True, description="false: attention LoRA stays home (the all-specialist setting)")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha")
    scaling: Literal["rslora", "lora"] = Field("rslora", description="alpha / sqrt(rank) or alpha / rank")
    strength: Literal["together", "each"] = Field(
        "together",
        description='"each": every expert has that scale, as in the paper; "together": it is corrected so that experts '
        "that share a token's weight act like one LoRA of all their ranks",
    )
    top_k: int = Field(
        2, ge=1, description="experts used per token; a client with one expert has no router and no choice"
    )
    routing: Literal["token", "sequence", "client"] = Field(
        "token",
        description='what weighs the experts: each "token"; the mean of the "sequence" up to the token; '
        'or one free weight per expert and block for the whole "client"',
    )
    router_start: float = Field(
        0.02, ge=0, description="standard deviation of the router's starting weights; 0: uniform mixing exactly"
    )


class ClientSection(Section):
    """[client]: how every client trains in a round (the defaults are the paper's)."""

    steps: int = Field(10, ge=1, description="local steps per round")
    batch_size: int = Field(64, ge=1, description="windows per step")
    micro_batch_size: int | None = Field(None, ge=1, description="windows at once in memory; None: batch_size")
    lr: float | None = Field(
        None, gt=0, description="experts' peak rate, cosine to lr/10; None: 2e-3 GPT-2, 2e-4 Llama-like"
    )
    router_lr: float | None = Field(None, gt=0, description="router's constant rate; None: lr")
    weight_decay: float = Field(0.01, ge=0, description="AdamW, on everything trained")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two decay rates")
    router_every: int = Field(
        30, ge=1, description="local steps between router phases, counted over the whole run (tau)"
    )
    router_steps: int = Field(10, ge=0, description="router steps in a phase, each on a batch of router_data")
    router_data: Literal["valid", "train", "crossfit"] = Field(
        "valid",
        description='what the router learns from: "valid"; "train"; or "crossfit", a fold of train that the experts '
        "did not see since the last router phase (for clients without validation text)",
    )
    folds: int = Field(4, ge=2, description="parts of train in crossfit; each phase leaves out the next one")
    balance_coef: float = Field(0.01, ge=0, description="weight of the balance loss")
    generalist_share: float = Field(
        0.5, ge=0, lt=1, description="load that the balance loss gives the first generalist; 0: equal"
    )
    leaky_gradients: bool = Field(
        False, description="reproduce the authors' loop, in which one level's gradients leak into the other's next step"
    )

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("both must be in [0, 1)")
        return value


class EvaluationSection(Section):
    """[evaluation]: what is measured during the run. Test is always measured after the last download."""

    every: int = Field(1, ge=0, description="rounds between evaluations during the run; 0: none")
    splits: tuple[Split, ...] = Field(("valid",), description="splits evaluated during the run")
    batch_size: int = Field(32, ge=1, description="windows at once")


class Text(Section):
    """A client's text with its splits given, each as "source:argument" or a path."""

    train: str = Field(description="what the experts learn from")
    valid: str = Field(description="what the router learns from")
    test: str = Field(description="what the result is measured on, and nothing else")


class ClientEntry(Section):
    """[[clients]]: one client; what is None is taken from [experts]."""

    name: str = Field(description="letters, digits, '.', '_' and '-'; also the name of its folder in the run")
    text: str | Text = Field(
        description='"source:argument" or a path, split by hash; or {train = ..., valid = ..., test = ...}'
    )
    specialists: int | None = Field(None, ge=0, description="number of specialists; None: experts.specialists")
    rank: int | None = Field(None, ge=1, description="LoRA rank of this client's experts; None: experts.rank")
    specialist_rank: int | None = Field(
        None, ge=1, description="rank of its specialists; None: experts.specialist_rank, else rank"
    )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
            raise ValueError("1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
        return value


class Config(Section):
    """A whole run: what, on what, with which settings."""

    version: int = Field(VERSION, ge=1, le=VERSION, description="of this file's format")
    name: str = Field(
        "run", description="of the run, and of its folder in `runs`; default: the config file's, without .toml"
    )
    seed: int = Field(42, ge=0, description="the one seed everything random comes from")
    method: str = Field("comigs", description="a file of comigs/methods, or package.module of your own")
    rounds: int = Field(20, ge=1, description="exchanges with the server")
    base: BaseSection = Field(BaseSection(), description="the frozen language model all clients share")
    data: DataSection = Field(DataSection(), description="how text becomes windows of tokens")
    experts: ExpertsSection = Field(ExpertsSection(), description="what every client trains")
    client: ClientSection = Field(ClientSection(), description="how every client trains in a round")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="what is measured during the run")
    options: Mapping[str, bool | int | float | str] = Field(
        {}, description="settings of the method's own; `comigs list methods` shows them"
    )
    clients: tuple[ClientEntry, ...] = Field(description="who takes part, one [[clients]] each")

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, value: str) -> str:
        if value.startswith(".") or not value.strip() or re.search(r"[/\\\0]", value):
            raise ValueError("must be a folder's name: no slash, not empty, no dot in front")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not self.clients:
            raise ValueError('clients: none; write at least one [[clients]] with name = "..." and text = "..."')
        seen: set[str] = set()
        for client in self.clients:
            if client.name.lower() in seen:
                raise ValueError(f'clients: the name "{client.name}" is given twice; names must differ (case aside)')
            seen.add(client.name.lower())
            shape = self.shape_of(client)
            if shape.num_experts == 0:
                raise ValueError(
                    f"clients.{client.name}: 0 experts; give it at least one (experts.generalists or specialists)"
                )
            if shape.num_experts > 1 and self.experts.top_k > shape.num_experts:
                raise ValueError(
                    f"experts.top_k: {self.experts.top_k} experts per token, but client "
                    f'"{client.name}" has {shape.num_experts}; allowed: 1 to {shape.num_experts}'
                )
        if self.data.valid_fraction + self.data.test_fraction >= 1:
            raise ValueError("data: valid_fraction + test_fraction must leave documents for train (sum below 1)")
        return self

    def shape_of(self, client: ClientEntry) -> ExpertShape:
        """The experts of one client, its exceptions applied to the defaults."""
        e = self.experts
        rank = client.rank or e.rank
        return ExpertShape(
            generalists=e.generalists,
            specialists=e.specialists if client.specialists is None else client.specialists,
            rank=rank,
            specialist_rank=client.specialist_rank or e.specialist_rank or rank,
            attention_rank=e.attention_rank or e.rank,
        )

    def client_named(self, name: str) -> ClientEntry:
        """The entry of that name. Raises UserError naming the clients there are."""
        for client in self.clients:
            if client.name == name:
                return client
        names = [c.name for c in self.clients]
        raise UserError(f'no client "{name}" in this run; there are: {", ".join(names)}.{nearest(name, names)}')


class ExpertShape(Section):
    """How many experts one client has, and their ranks."""

    generalists: int
    specialists: int
    rank: int
    specialist_rank: int
    attention_rank: int

    @property
    def num_experts(self) -> int:
        return self.generalists + self.specialists


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file, apply `key=value` overrides, validate.

    Raises UserError with one line for whatever is wrong.
    """
    path = Path(path)
    tree = read_toml(path)
    for override in overrides:
        _apply(tree, override)
    tree.setdefault("name", path.stem)
    data = tree.setdefault("data", {})
    if isinstance(data, dict):
        data["root"] = str((path.parent / str(data.get("root", "."))).resolve())
    return parse_config(tree, source=str(path))


def read_toml(path: Path, what: str = "config") -> dict[str, Any]:
    """A TOML file as plain values. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what} file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; a {what} is a TOML file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None


def parse_config(tree: Mapping[str, Any], source: str = "config") -> Config:
    """Validate a tree of plain values. Raises UserError: the field, what was given, what is allowed."""
    version = tree.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{source}: version: written for config format {version}, this comigs reads up to {VERSION}; upgrade comigs"
        )
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {one_line(error, tree, SECTIONS)}") from None


def to_toml(config: Config) -> str:
    """The config as TOML; reading it back gives an equal config."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; clients are addressed by name or position: `clients.fr.rank=4`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override}: expected KEY=VALUE, for example client.steps=20")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    *parents, last = key.strip().split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            found = [n for i, n in enumerate(node) if isinstance(n, dict) and part in (n.get("name"), str(i))]
            if not found:
                names = [str(n.get("name")) for n in node if isinstance(n, dict)]
                known = ", ".join(names)
                raise UserError(f'--set {override}: no client "{part}"; there are: {known}.{nearest(part, names)}')
            node = found[0]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        raise UserError(f"--set {override}: say which field of the client, for example {key}.rank=4")
    node[last] = value


SECTIONS: Mapping[str, type[BaseModel]] = {
    "": Config, "base": BaseSection, "data": DataSection, "experts": ExpertsSection, "client": ClientSection,
    "evaluation": EvaluationSection, "clients": ClientEntry, "text": Text,
}  # fmt: skip
