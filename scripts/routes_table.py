"""Tables of where tokens go, over the clients and seeds of a sweep: no text, only weights.

    python scripts/routes_table.py runs/routes results/routes

Reads every finished run of the folder as `comigs routes` does, client by client, and writes
weights.csv.gz (a row for each run, client, block and group of tokens) and table.md: by base,
setting, group and block the mean generalist weight over clients, mean and standard deviation over
seeds. Runs that are in weights.csv.gz already are not read again, so that a sweep can be taken in
pieces, and run folders can be removed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from comigs.app.routes import routes
from comigs.runs.folder import RunFolder
from comigs.runs.routes import FREQUENCIES, KINDS

KEY = ["base", "setting", "seed", "client"]
GROUPS = ["all", *KINDS, *FREQUENCIES]
COMPARED = {  # a row of the table: two sets of groups, whose tokens are taken together
    "function words minus content words": (["function words"], ["content words"]),
    "numbers, punctuation and spaces minus words and their parts": (
        ["numbers", "punctuation", "spaces"],
        ["function words", "content words", "names", "beginnings of words", "inside words"],
    ),
}


def rows_of(run: Path, setting: str) -> list[dict[str, object]]:
    """A row for each client, block and group of one run."""
    rows: list[dict[str, object]] = []
    clients = [client.name for client in RunFolder.open(run).config().clients]
    for found in routes([run], clients, tokens=1):
        key = {"base": found.base, "setting": setting, "seed": found.seed, "client": found.client}
        for group in [found.every, *found.kinds, *found.frequencies]:
            for block, (mean, deviation) in enumerate(
                zip(group.mean, group.deviation, strict=True)
            ):
                own = {"group": group.name, "tokens": group.tokens, "block": block}
                rows.append({**key, **own, "weight": mean, "deviation": deviation})
    return rows


def collect(folder: Path, file: Path) -> pd.DataFrame:
    """The rows of all finished runs below a folder, those of `file` first."""
    known = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=KEY)
    done = set(known[KEY[:3]].itertuples(index=False, name=None))
    tables = [known] if len(known) else []
    for summary in sorted(folder.rglob("summary.json")):
        run = summary.parent
        config = RunFolder.open(run).config()
        if (config.base.name, run.parent.name, config.seed) not in done:
            print(run, flush=True)
            tables.append(pd.DataFrame(rows_of(run, run.parent.name)))
    return pd.concat(tables, ignore_index=True)


def table(rows: pd.DataFrame, base: str, setting: str) -> str:
    """Mean over clients, then mean and deviation over seeds, by group and block, in Markdown."""
    own = rows[(rows["base"] == base) & (rows["setting"] == setting)]
    seeds = own.groupby(["group", "block", "seed"])["weight"].mean()
    cells = seeds.groupby(["group", "block"]).agg(["mean", "std"])
    tokens = own.groupby(["group", "seed", "client"])["tokens"].first().groupby("group").mean()
    blocks = sorted(own["block"].unique())
    lines = [
        f"### {base}, {setting}: seeds {', '.join(map(str, sorted(own['seed'].unique())))}",
        "",
        "| | tokens a client | " + " | ".join(f"block {block}" for block in blocks) + " |",
        "|---|" + "---|" * (len(blocks) + 1),
    ]
    for group in (name for name in GROUPS if name in tokens.index):
        shown = [written(cells.loc[(group, block)]) for block in blocks]
        lines.append(f"| {group} | {tokens[group]:,.0f} | {' | '.join(shown)} |")
    for name, (these, those) in COMPARED.items():
        gap = weight_of(own, these) - weight_of(own, those)
        lines.append(f"| *{name}* | | {' | '.join(differences(gap, blocks))} |")
    return "\n".join(lines)


def weight_of(own: pd.DataFrame, groups: list[str]) -> pd.Series:
    """The mean weight of these groups' tokens by block, seed and client."""
    part = own[own["group"].isin(groups)].assign(sum=lambda rows: rows["weight"] * rows["tokens"])
    sums = part.groupby(["block", "seed", "client"])[["sum", "tokens"]].sum()
    return sums["sum"] / sums["tokens"]


def differences(gap: pd.Series, blocks: list[int]) -> list[str]:
    """By block the mean over clients, mean and deviation over seeds, and in how many of all clients
    and seeds it is above 0.
    """
    shown = []
    for block in blocks:
        here = gap.loc[block]
        seeds = here.groupby("seed").mean()
        cell = written(pd.Series({"mean": seeds.mean(), "std": seeds.std()}), "+.3f")
        shown.append(f"{cell} ({(here > 0).sum()} of {len(here)})")
    return shown


def written(cell: pd.Series, form: str = ".3f") -> str:
    """A mean and its deviation; one seed has none."""
    mean = format(cell["mean"], form)
    return mean if pd.isna(cell["std"]) else f"{mean} ± {cell['std']:.3f}"


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "weights.csv.gz"
    rows = collect(folder, file)
    rows.to_csv(file, index=False, compression={"method": "gzip", "mtime": 0})
    pairs = rows[["base", "setting"]].drop_duplicates().itertuples(index=False, name=None)
    tables = [table(rows, base, setting) for base, setting in pairs]
    (out / "table.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
