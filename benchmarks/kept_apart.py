"""What it changes to keep a tenth of valid apart from the router, for the choice of the best round.

    python benchmarks/kept_apart.py OUT [--train-share 0.05] [--seeds 42 45 47]

Three runs for each seed on the four languages: one whose routers (and adoption) learn from all of
valid, one whose routers learn from its first nine tenths, and that one once more with the last
tenth in the place of test, which tells what the tenth comes to in each round. Training sees nothing
of what is measured, so the last two train alike. OUT keeps them; what is finished is not run again.

A row for each seed: mean test perplexity of the clients' models of the last round, of the round
that valid (or the nine tenths, or the tenth) chooses, and of the one that test would choose, which
no way of choosing can beat.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.table import Table

from comigs.app import api
from comigs.config import load_config
from comigs.runs.folder import RunFolder

HERE = Path(__file__).resolve().parent.parent
DATA, CONFIG = HERE / "data" / "multilingual", HERE / "configs" / "multilingual.toml"
CLIENTS = ("fr", "de", "it", "nl")
APART = 0.1
Curve = dict[str, dict[int, float]]  # client -> round -> nats per token


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-share", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 45, 47])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--set", nargs="+", default=[], dest="more", help="as of comigs run")
    given = parser.parse_args()
    write_texts(given.out / "text")

    table = Table("seed", "router's text", "last", "valid chooses", "a tenth chooses", "test would")
    for seed in given.seeds:
        whole, apart, judged = (run_of(given, kind, seed) for kind in ("whole", "apart", "judged"))
        assert losses(apart) == losses(judged), "what is measured changed what is learnt"
        test = curve(whole, "test")
        by_valid = mean_at(test, lowest(curve(whole, "valid")))
        table.add_row(str(seed), "all", *cells(test, by_valid, None))
        test = curve(apart, "test")
        by_nine = mean_at(test, lowest(curve(apart, "valid")))
        by_tenth = mean_at(test, lowest(curve(judged, "test")))
        table.add_row("", "nine tenths", *cells(test, by_nine, by_tenth))
    Console(width=110).print(table)


def write_texts(folder: Path) -> None:
    """Write valid in two parts for each client: its first nine tenths in bytes, and the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS:
        with gzip.open(DATA / f"{client}.valid.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        first, rest = split_texts(texts, 1 - APART)
        for name, part in (("nine", first), ("tenth", rest)):
            written = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"{client}.{name}.jsonl").write_text(written, encoding="utf-8")


def split_texts(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Return the texts up to a share of their characters, and what is left of them."""
    room = round(share * sum(map(len, texts)))
    first: list[str] = []
    rest: list[str] = []
    for text in texts:
        for part, to in ((text[:room], first), (text[room:], rest)):
            if part:
                to.append(part)
        room = max(0, room - len(text))
    return first, rest


def run_of(given: argparse.Namespace, kind: str, seed: int) -> RunFolder:
    """Return the finished run of that kind and seed, after running it where it is not there."""
    path = given.out / kind / f"seed-{seed}"
    if path.exists():
        return api.resume(path, say=print)
    text = given.out.resolve() / "text"
    splits = ["test"] if kind == "judged" else ["valid", "test"]
    overrides = [
        f"seed={seed}",
        f"rounds={given.rounds}",
        f"data.train_share={given.train_share}",
        f"evaluation.splits={json.dumps(splits)}",
        'evaluation.keep="last"',
        # The last round is measured as all others are, and not after a choice at the end.
        'options.finish="mixture"',
        "client.batch_size=4",
        "client.lr=4e-3",
        *given.more,
    ]
    for number, client in enumerate(CLIENTS):
        if kind != "whole":
            overrides.append(f'clients.{number}.text.valid="{text / client}.nine.jsonl"')
        if kind == "judged":
            overrides.append(f'clients.{number}.text.test="{text / client}.tenth.jsonl"')
    return api.run(load_config(CONFIG, overrides), path, say=print)


def curve(folder: RunFolder, split: str) -> Curve:
    """Return what each client's own model came to on a split after each round."""
    found: Curve = {client: {} for client in CLIENTS}
    for line in folder.metrics():
        if line.kind == "evaluation" and line.split == split and line.model == "personal":
            found[line.client][line.round] = line.nats_per_token
    return found


def losses(folder: RunFolder) -> list[object]:
    """Return the loss of every local step of a run."""
    lines = folder.metrics()
    return [line.train_nats_per_token_by_step for line in lines if line.kind == "train"]


def lowest(of: Curve) -> dict[str, int]:
    """Return each client's round with the lowest loss, of equals the first."""
    return {client: min(rounds, key=lambda r: (rounds[r], r)) for client, rounds in of.items()}


def mean_at(test: Curve, rounds: dict[str, int]) -> float:
    """Return the mean over clients of the test perplexity in these rounds."""
    return fmean(math.exp(test[client][round]) for client, round in rounds.items())


def cells(test: Curve, by_valid: float, by_tenth: float | None) -> list[str]:
    """Return the figures of one run."""
    last = mean_at(test, {client: max(rounds) for client, rounds in test.items()})
    tenth = "" if by_tenth is None else f"{by_tenth:.2f}"
    return [f"{last:.2f}", f"{by_valid:.2f}", tenth, f"{mean_at(test, lowest(test)):.2f}"]


if __name__ == "__main__":
    main()
