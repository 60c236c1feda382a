"""What the tests of `comigs compare` share: made-up runs whose test figures are given."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comigs.config import parse_config, to_toml
from tests.test_report_runs import write_run

CLIENTS = ("ann", "bob")
BYTES_A_TOKEN = 4.3


def measured(folder: Path, nats: Mapping[str, float], seed: int = 42, **tree: Any) -> Path:
    """A finished run of these clients whose own models have these nats per token on test.

    tree: sections and fields of the config; layers, rounds, uploaded, done: as in `write_run`.
    """
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    plain = {key: value for key, value in tree.items() if key not in sections}
    write_run(folder, clients=tuple(nats), **{"rounds": 2, "layers": 1, "steps": 2, **plain})
    config = tomllib.loads((folder / "config.toml").read_text()) | {"seed": seed}
    merged = config | {key: config.get(key, {}) | value for key, value in sections.items()}
    (folder / "config.toml").write_text(to_toml(parse_config(merged)))
    summary_file = folder / "summary.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text())
        for name, value in nats.items():
            summary["clients"][name]["test"] = {
                "nats_per_token": value, "perplexity": math.exp(value),
                "bits_per_byte": value / math.log(2) / BYTES_A_TOKEN, "tokens": 9000,
            }  # fmt: skip
        summary_file.write_text(json.dumps(summary | {"seed": seed}))
    return folder


def change(folder: Path, file: str, **values: Any) -> None:
    """Give fields of summary.json or env.json new values; of every client where `file` is
    "clients".
    """
    path = folder / ("summary.json" if file == "clients" else file)
    content = json.loads(path.read_text())
    for part in content["clients"].values() if file == "clients" else [content]:
        part.update(values)
    path.write_text(json.dumps(content))


def three_methods(root: Path) -> Path:
    """local, comigs and fedavg with three seeds each, two clients; comigs is best, fedavg worst."""
    for method, level in (("local", 5.0), ("comigs", 4.9), ("fedavg", 5.2)):
        for number, seed in enumerate((42, 43, 44)):
            nats = {
                "ann": level + 0.01 * number,
                "bob": level + 0.4 - 0.03 * number * (method == "comigs"),
            }
            sent = 0 if method == "local" else 1_200_000
            measured(root / method / f"seed-{seed}", nats, seed, method=method, uploaded=sent)
    return root
