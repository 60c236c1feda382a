"""This module lists the methods, bases and datasets there are: what `comigs list` shows."""

from __future__ import annotations

from comigs.app.dry_run import budgets
from comigs.bases.load import load_base, loaders, modules
from comigs.config import parse_config
from comigs.data.sources import list_sources
from comigs.methods.loading import list_methods, load_method, method_module
from comigs.text import Table, size


def inventory() -> dict[str, Table]:
    """Return the tables of methods, bases and datasets, by those names."""
    return {"methods": _methods(), "bases": _bases(), "datasets": _datasets()}


def _methods() -> Table:
    """Return every method with its budget: default experts on the bundled base, four clients."""
    entries = [{"name": name, "text": name} for name in ("a", "b", "c", "d")]
    config = parse_config(
        {"base": {"name": "mini", "dtype": "float32", "device": "cpu"}, "clients": entries}
    )
    base, rows = load_base(config.base), []
    for name in list_methods():
        settings = config.model_copy(update={"method": name})
        method, budget = load_method(settings), budgets(settings, base)["a"]

        # a method without options has no class of that name
        options = []
        if own := getattr(method_module(name), "Options", None):
            options = [f"{key} = {field.default}" for key, field in own.model_fields.items()]
        rows.append(
            (
                name,
                method.summary,
                method.weights,
                ", ".join(options),
                method.paper,
                f"{budget.trained_parameters:,}",
                size(budget.uploaded_bytes),
                size(budget.downloaded_bytes),
            )
        )
    words = ("method", "what it does", "weight of a client", "[options]", "paper")
    return Table((*words, "trained", "up", "down"), tuple(rows), names=len(words))


def _bases() -> Table:
    families: list[str] = []
    for module in modules().values():
        if hasattr(module, "ARCHITECTURE"):
            families += module.ARCHITECTURE.model_types
    rows = [(name, loader.summary) for name, loader in loaders().items()]
    others = "a local folder, .gguf file or hub name of: " + ", ".join(families)
    rows.append(("FOLDER or ORG/MODEL", others))
    return Table(("base.name", "what it is"), tuple(rows), names=2)


def _datasets() -> Table:
    rows = tuple((*source.summary.split(": ", 1), source.license) for source in list_sources())
    return Table(("text", "what it reads", "licence"), rows, names=3)
