"""The model card of an export: what it is, how good it is, what is in it and how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comigs.bases.load import modules
from comigs.personal.export.form import Format
from comigs.personal.export.source import Source
from comigs.slots import OTHERS

if TYPE_CHECKING:
    from comigs.personal.export.export import Exported

ROLES = {"g": "generalist", "s": "specialist"}


def model_card(source: Source, exported: Exported, form: Format) -> str:
    """Return the whole README.md of an export."""
    # The header is for the hub, the table for people.
    config, environment = source.model.config, source.folder.environment()
    versions = environment.get("versions", {})
    rows = [
        ("base", f"{source.base.title} ({license_of(source.base.name)})"),
        ("method", f"{config.method}: {source.method.summary}"),
        ("run", f"{config.name}, {trained(source)}, seed {config.seed}"),
        (
            "comigs",
            f"{versions.get('comigs')}, commit {environment.get('commit') or 'not recorded'}",
        ),
        ("format", f"{exported.format}, {exported.type}: {form.summary}"),
        ("size", f"{exported.bytes:,} bytes"),
        ("in it", contents(source, form)),
        ("private", privacy(source, exported)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    sections = [
        f"---\nlibrary_name: {library(exported.format)}\ntags: [comigs, federated-learning]\n---",
        f"# {source.client}'s own model, from the run {config.name}",
        f"Trained with CoMiGS in a run of {len(config.clients)} clients, and exported with "
        "`comigs export`.",
        f"| what | |\n|---|---|\n{table}",
        measured(source, exported),
    ]
    if exported.notes:
        sections.append("\n".join(f"- {note}" for note in exported.notes))
    sections.append(f"## How to run it\n{form.run(source)}")
    return "\n\n".join(sections) + "\n"


def contents(source: Source, form: Format) -> str:
    """Say which of the client's experts are in it."""
    if "experts" not in form.holds:
        return "the base alone, nothing of any client"
    return ", ".join(" + ".join(names_of(parts)) for parts in source.experts)


def measured(source: Source, exported: Exported) -> str:
    """Return the perplexities, and how near the export is to the run's own model."""
    rows = [
        ("the base alone", exported.base),
        ("the run's own model", exported.personal),
        ("this export", exported.export),
    ]
    table = "\n".join(f"| {name} | {perplexity:.4g} |" for name, perplexity in rows)
    # Whether it computes the same is one thing, how its numbers are stored another.
    cost = exported.export / exported.personal - 1
    nearness = "It is near the run's own model"
    if exported.exact:
        nearness = (
            f"It computes what the run's own model does, its numbers stored as {exported.type}"
        )
    # A finished run has measured all of test.
    test = ""
    if source.folder.checkpoint().finished:
        scores = source.folder.summary().clients[source.client]
        base, own = scores.base_test.perplexity, scores.test.perplexity
        if base is not None and own is not None:
            test = f" On all of test the run measured {base:.4g} (base) and {own:.4g} (its own)."
    return f"""## Perplexity
On {exported.tokens:,} tokens of this client's valid, in float32, read back from the files:

| model | perplexity |
|---|---|
{table}

{nearness}: {cost:+.3%} in perplexity, logits at most {exported.difference:.2g} apart.{test}"""


def trained(source: Source) -> str:
    """Say how far the run is."""
    rounds = source.folder.checkpoint().round
    return f"{rounds} of {source.model.config.rounds} rounds"


def names_of(parts: Sequence[str]) -> list[str]:
    """Return the experts for people: "generalist 0", "specialist 0", "the others' expert"."""
    words = []
    for part in parts:
        if part == OTHERS:
            words.append("the others' expert (everybody's mean generalist)")
        elif part in ("router", "attention"):
            words.append(part)
        else:
            words.append(f"{ROLES[part[0]]} {part[1:]}")
    return words


def privacy(source: Source, exported: Exported) -> str:
    """Say whether what never left the client is in it, and what protects the rest."""
    kept = ", ".join(names_of(list(exported.private_parts)))
    protected = f"The run had {source.model.config.privacy.promise}."
    if kept:
        return (
            f"**yes**: {kept} never left the client before; whoever gets this gets what they "
            f"learnt from its text, which nothing bounds. {protected}"
        )
    return f"nothing that the other participants' server has not seen. {protected}"


def license_of(base: str) -> str:
    """Return the licence of a base of ours; else where to find it."""
    for module in modules().values():
        if base in getattr(module, "LOADERS", {}) and hasattr(module, "LICENSE"):
            return f"{module.LICENSE}"
    return "its own licence applies"


def library(format: str) -> str:
    """Return the library that the hub names for such a file."""
    if format in ("peft", "flat"):
        return "peft"
    return "transformers" if format == "transformers" else "gguf"
