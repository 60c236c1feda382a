"""What a lying client costs the honest ones: 1 of 8 sends nonsense each round, against the same run
without it.

    python benchmarks/liars.py OUT [--rounds 6] [--methods comigs fedavg] [--merges mean median]

Eight clients of the bundled texts (four languages, four topics) train with mini, in-process;
`fiction` lies. liars.json in OUT gets the honest seven's mean test perplexity of each run, beside
the run folders.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from comigs.app import api
from comigs.config import Config, load_config, parse_config
from comigs.engines.in_process import InProcess
from comigs.methods.method import Download, Upload
from comigs.runs.folder import RunFolder
from comigs.server.protocol import Answers, Task

CONFIGS = Path(__file__).parent.parent / "configs"
LIAR = "fiction"
LIES: dict[str, Callable[[Upload, Download], Upload]] = {
    "NaN": lambda upload, download: {
        slot: torch.full_like(t, torch.nan) for slot, t in upload.items()
    },
    "1e6 x": lambda upload, download: {slot: 1e6 * t for slot, t in upload.items()},
    "sign-flipped": lambda upload, download: {slot: -t for slot, t in upload.items()},
    "step backwards": lambda upload, download: {
        s: 2 * download[s] - t if s in download else -t for s, t in upload.items()
    },
    "wrong shapes": lambda upload, download: {slot: t[:1] for slot, t in upload.items()},
}


def config_of(options: argparse.Namespace, method: str, merge: str, with_liar: bool) -> Config:
    """Seven or eight clients."""
    clients = []
    for name in ("multilingual", "topics"):
        tree = load_config(CONFIGS / f"{name}.toml").model_dump(mode="json", exclude_none=True)
        clients += [client for client in tree["clients"] if with_liar or client["name"] != LIAR]
    return parse_config(
        {
            "seed": options.seed,
            "method": method,
            "rounds": options.rounds,
            "clients": clients,
            "base": {"name": "mini", "threads": 1},
            "data": {"root": str(CONFIGS)},
            "client": {"steps": 8, "batch_size": 4, "router_every": 8, "router_steps": 3},
            "upload": {"merge": merge},
            "participation": {"max_failures": 1000},
            "evaluation": {"every": 0, "keep": "last"},
        }
    )


Exchange = Callable[[InProcess, Mapping[str, Task], Mapping[str, Download]], Answers]


def lying(honest: Exchange, lie: str) -> Exchange:
    """`InProcess.exchange` with a liar."""

    def exchange(
        self: InProcess, tasks: Mapping[str, Task], downloads: Mapping[str, Download]
    ) -> Answers:
        answers = honest(self, tasks, downloads)
        reply = answers.replies.get(LIAR)
        if reply is None or reply.upload is None:
            return answers
        upload = LIES[lie](dict(reply.upload), downloads.get(LIAR, {}))
        return replace(answers, replies=answers.replies | {LIAR: replace(reply, upload=upload)})

    return exchange


def perplexity_of_the_honest(folder: RunFolder) -> float:
    """Mean over the seven."""
    clients = folder.summary().clients
    honest = [figures.test.perplexity for name, figures in clients.items() if name != LIAR]
    assert len(honest) == 7
    return sum(honest) / len(honest)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--methods", nargs="+", default=["comigs", "fedavg"])
    parser.add_argument("--merges", nargs="+", default=["mean", "median"])
    options = parser.parse_args()
    exchange, rows = InProcess.exchange, list[dict[str, Any]]()
    for method in options.methods:
        for merge in options.merges:
            lies = (
                list(LIES) if merge == "mean" else ["sign-flipped", "step backwards"]
            )  # all others are found out
            for lie in ("nobody lies", "no eighth client", *lies):
                InProcess.exchange = lying(exchange, lie) if lie in LIES else exchange  # type: ignore[method-assign]
                path = options.out / "-".join((method, merge, lie.replace(" ", "-")))
                done = (path / "summary.json").exists()
                config = config_of(options, method, merge, with_liar=lie != "no eighth client")
                folder = RunFolder.open(path) if done else api.run(config, path)
                rows.append(
                    {
                        "method": method,
                        "merge": merge,
                        "liar": lie,
                        "perplexity": perplexity_of_the_honest(folder),
                    }
                )
                print(rows[-1], flush=True)
    table = Table(title="mean test perplexity of the seven honest clients")
    for column in ("method", "merge", "the eighth", "perplexity"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["method"], row["merge"], row["liar"], f"{row['perplexity']:.1f}")
    Console(width=100).print(table)
    environment = {key: folder.environment()[key] for key in ("versions", "commit", "dtype")}
    content = {
        "seed": options.seed,
        "rounds": options.rounds,
        "runs": rows,
        "environment": environment,
    }
    (options.out / "liars.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
