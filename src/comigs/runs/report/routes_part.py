"""Where tokens go, as it is shown: a passage whose block one can choose, and tables.

Radio buttons and the style sheet do the choosing, so that nothing is a script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from comigs import text as f
from comigs.runs.report.routing_heatmap import Cell, cell_of
from comigs.runs.routes import Group, Ranked, Routes

MEAN = "m"  # stands for all blocks, where a number stands for one


@dataclass(frozen=True)
class Shown:
    """A passage on the page: a caption, and its tokens as (text, hint, style).

    A style is the weights as variables, by block and of their mean; `style` is the mean and the
    spread of all tokens of the passage, likewise.
    """

    caption: str
    style: str
    tokens: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Part:
    """A client's part of a page: its passage in one run or several, and what is known of each.

    labels: (block, name, style) of each choice. heats: by run, rows of (kind, tokens, cells).
    sides: what the two ends of the colours are, in words.
    """

    client: str
    text: str
    labels: tuple[tuple[str, str, str], ...]
    passages: tuple[Shown, ...]
    heats: tuple[tuple[str, tuple[tuple[str, str, tuple[Cell, ...]], ...]], ...]
    extremes: tuple[tuple[str, f.Table], ...]
    languages: str
    sides: tuple[str, str]


def parts_of(found: Iterable[Routes]) -> list[Part]:
    """Return the parts of a page, one for each client; its runs are side by side."""
    parts = []
    for client, group in groupby(found, lambda routes: routes.client):
        # What does not depend on the run is taken from the first one.
        own = list(group)
        heats, extremes = [], []
        for routes in own:
            heats.append((routes.who, heat_rows(routes)))
            if (table := extremes_table(routes)) is not None:
                extremes.append((routes.who, table))
        # Runs of both kinds side by side have one legend.
        sides = {routes.sides for routes in own}
        both = sides.pop() if len(sides) == 1 else ("shared", "own")
        languages = [f"{name} {f.count(number)}" for name, number in own[0].languages.items()]
        part = Part(
            client=client,
            text=own[0].text,
            labels=tuple(_labels(own[0])),
            passages=tuple(map(_shown, own)),
            heats=tuple(heats),
            extremes=tuple(extremes),
            languages=", ".join(languages),
            sides=both,
        )
        parts.append(part)
    return parts


def block_rules(found: Iterable[Routes]) -> Markup:
    """Return the part of the style sheet that shows the block whose radio button is chosen."""
    most = max((routes.blocks for routes in found), default=0)
    rules = []
    for name in [MEAN, *map(str, range(most))]:
        chosen = f".routes>.b{name}:checked~"
        rules.append(f"{chosen}.passages span{{--w:var(--w{name})}}")
        rules.append(f"{chosen}.passages .passage{{--mean:var(--m{name});--spread:var(--s{name})}}")
        rules.append(f"{chosen}.strip .b{name}{{border-color:var(--ink);font-weight:600}}")
        rules.append(f".routes>.b{name}:focus-visible~.strip .b{name}{{outline:2px solid}}")
    return Markup("\n".join(rules))


def _labels(routes: Routes) -> list[tuple[str, str, str]]:
    """Return the choices of blocks, each with the mean weight of all tokens in it."""
    mean = sum(routes.every.mean) / routes.blocks
    labels = [(MEAN, "mean", f"--w:{mean:.3f}")]
    for block, weight in enumerate(routes.every.mean):
        labels.append((str(block), str(block), f"--w:{weight:.3f}"))
    return labels


def _shown(routes: Routes) -> Shown:
    """Return a passage with everything that a choice of a block needs."""
    tokens, columns = [], list[list[float]]()
    for token in routes.passage:
        weights = [token.mean, *token.weights]
        columns.append(weights)
        style = ";".join(_variables("w", weights))
        tokens.append((token.text, f"{token.kind}, mean {f.decimal(token.mean)}", style))

    # Around the mean of a block, two deviations are the whole colour.
    means, spreads = [], []
    for weights_of_block in zip(*columns, strict=True):
        mean = sum(weights_of_block) / len(weights_of_block)
        variance = sum((weight - mean) ** 2 for weight in weights_of_block) / len(columns)
        means.append(mean)
        spreads.append(max(0.001, 2 * variance**0.5))
    style = ";".join([*_variables("m", means), *_variables("s", spreads)])
    kept = f"the first {f.count(len(tokens))} of {f.count(routes.every.tokens)} tokens"
    return Shown(f"{routes.who}: {kept}", style, tuple(tokens))


def _variables(letter: str, values: Sequence[float]) -> list[str]:
    """Return the first value as that of all blocks, and the others as those of one each."""
    names = [MEAN, *map(str, range(len(values) - 1))]
    return [f"--{letter}{name}:{value:.3f}" for name, value in zip(names, values, strict=True)]


def groups_of(routes: Routes) -> list[Group]:
    """Return all groups of tokens that are not empty, the group of all tokens first."""
    groups = [routes.every, *routes.kinds, *routes.frequencies]
    return [group for group in groups if group.tokens]


def heat_rows(routes: Routes) -> tuple[tuple[str, str, tuple[Cell, ...]], ...]:
    """Return a row for each group of tokens: its name, its size, the mean and a cell by block."""
    rows = []
    for group in groups_of(routes):
        weights = [sum(group.mean) / routes.blocks, *group.mean]
        cells = tuple(cell_of(weight, f.decimal(weight)) for weight in weights)
        rows.append((group.name, f.count(group.tokens), cells))
    return tuple(rows)


def kinds_table(routes: Routes) -> f.Table:
    """Return the mean generalist weight by block and kind of token, as a table for people."""
    groups = groups_of(routes)
    rows = []
    for block in range(routes.blocks):
        rows.append((str(block), *[f.decimal(group.mean[block]) for group in groups]))
    last = ("tokens", *[f.count(group.tokens) for group in groups])
    return f.Table(("block", *[group.name for group in groups]), tuple(rows), last)


def extremes_table(routes: Routes) -> f.Table | None:
    """Return by block the tokens with the outermost mean weights, as a table for people.

    Blocks in which all tokens have the same weight are left out; it is None where those are all.
    """
    rows = []
    for block, extremes in enumerate(routes.extremes):
        if extremes.most_generalist:
            both = (_ranking(extremes.most_generalist), _ranking(extremes.most_specialist))
            rows.append((str(block), *both))
    if not rows:
        return None
    headers = ("block", *[f"most to {side}" for side in routes.sides])
    return f.Table(headers, tuple(rows), names=3)


def _ranking(ranking: Iterable[Ranked]) -> str:
    """Return tokens with their weights in a line; quotes show where they have spaces."""
    return "  ".join(f"{ranked.text!r} {f.decimal(ranked.weight)}" for ranked in ranking)
