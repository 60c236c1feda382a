"""Reading run folders, and the made-up run that the tests of the report use (`write_run`)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comigs.config import parse_config, to_toml
from comigs.errors import UserError
from comigs.runs.report.read import read_run

LANGUAGES = ("de", "fr", "it", "nl")


def config_text(clients: tuple[str, ...], rounds: int, **tree: Any) -> str:
    entries = [{"name": name, "text": f"wiki40b:{name}"} for name in clients]
    tree.setdefault("name", "four-languages")
    return to_toml(parse_config({"rounds": rounds, "clients": entries} | tree))


def score(nats: float, tokens: int = 9000) -> dict[str, Any]:
    """The three figures of one loss, 4.3 bytes a token."""
    bits = nats / math.log(2) / 4.3
    return {
        "nats_per_token": nats,
        "perplexity": math.exp(nats),
        "bits_per_byte": bits,
        "tokens": tokens,
    }


def shares(rng: np.random.Generator, layers: int, experts: int) -> dict[str, Any]:
    """Routing weights of a round; none where there is one expert or no router."""
    if experts < 2:
        return {
            "generalist_share_by_layer": None,
            "expert_share_by_layer": None,
            "adopted_share": None,
        }
    weights = rng.dirichlet(np.linspace(3, 2, experts), size=layers)
    return {
        "generalist_share_by_layer": weights[:, 0].tolist(),
        "expert_share_by_layer": weights.tolist(),
        "adopted_share": None,
    }


def write_run(
    folder: Path,
    clients: tuple[str, ...] = LANGUAGES,
    rounds: int = 10,
    done: int | None = None,
    steps: int = 10,
    layers: int = 6,
    experts: int = 2,
    uploaded: int = 1_200_000,
    warnings: tuple[dict[str, Any], ...] = (),
    seed: int = 0,
    **tree: Any,
) -> Path:
    """A run folder as docs/run-folder.md says; unfinished after `done` rounds if given."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config_text(clients, rounds, **tree))
    last = rounds if done is None else done
    lines: list[dict[str, Any]] = []
    timings: list[dict[str, Any]] = []
    start = {name: 6.0 + 0.25 * (i % 5) for i, name in enumerate(clients)}
    fall = {name: 1.6 + 0.3 * (i % 3) for i, name in enumerate(clients)}

    def loss(name: str, done: float) -> float:
        return start[name] - fall[name] * (1 - math.exp(-3 * done / rounds))

    def evaluated(name: str, round_: int, split: str, model: str) -> dict[str, Any]:
        line = {
            "kind": "evaluation",
            "round": round_,
            "client": name,
            "split": split,
            "model": model,
        }
        return (
            line
            | score(loss(name, round_) + 0.03)
            | shares(rng, layers, experts if model == "personal" else 1)
        )

    lines += [evaluated(name, 0, split, "base") for name in clients for split in ("valid", "test")]
    for r in range(1, last + 1):
        for name in clients:
            by_step = [loss(name, r - 1 + i / steps) + rng.normal(0, 0.08) for i in range(steps)]
            slots = {"generalist": {"slots": 4 * layers, "bytes": uploaded * 2 // 3}}
            slots["attention"] = {"slots": 2 * layers, "bytes": uploaded - uploaded * 2 // 3}
            line = {
                "kind": "train",
                "round": r,
                "client": name,
                "local_steps": steps,
                "router_steps": 0,
            }
            line |= {
                "learning_rate": 2e-3,
                "train_nats_per_token": float(np.mean(by_step)),
                "balance_loss": 1.0,
            }
            line |= {
                "train_nats_per_token_by_step": by_step,
                "router_nats_per_token": None,
                "trained_tokens": 81920,
            }
            line["trained_parameters"] = 590_592
            line |= {"uploaded_bytes": uploaded, "downloaded_bytes": uploaded}
            lines.append(
                line
                | {"uploaded_by_role": slots if uploaded else {}}
                | shares(rng, layers, experts)
            )
            speed = {"tokens_per_second": 2400 + 50 * r, "peak_memory_bytes": 900_000_000 + r}
            timings.append({"round": r, "client": name, "seconds": 3.2} | speed)
            lines.append(evaluated(name, r, "valid", "personal"))
        lines.append(
            {"kind": "server", "round": r, "drift": 0.5 / r + 0.05 if uploaded and r > 1 else None}
        )
        timings.append({"round": r, "client": None, "seconds": 13.1})
        lines += [w for w in warnings if w["round"] == r]
    if done is None:
        lines += [evaluated(name, rounds, "test", "personal") for name in clients]
        (folder / "summary.json").write_text(
            json.dumps(summary(clients, rounds, lines, uploaded, experts, tree))
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    (folder / "env.json").write_text(json.dumps(environment(clients)))
    for name in clients:
        file = "personal" if done is None else f"round-{last:04d}.experts"
        write_experts(folder / "clients" / name / f"{file}.safetensors", layers, experts)
    return folder


def summary(
    clients: tuple[str, ...],
    rounds: int,
    lines: list[dict[str, Any]],
    uploaded: int,
    experts: int,
    tree: dict[str, Any],
) -> dict[str, Any]:
    def tested(name: str, model: str) -> dict[str, Any]:
        found = [
            e
            for e in lines
            if (e.get("client"), e.get("split"), e.get("model")) == (name, "test", model)
        ]
        return {
            k: found[-1][k] for k in ("nats_per_token", "perplexity", "bits_per_byte", "tokens")
        }

    def mean(model: str) -> dict[str, float]:
        keys = ("nats_per_token", "perplexity", "bits_per_byte")
        means = {k: float(np.mean([tested(name, model)[k] for name in clients])) for k in keys}
        return means | {"perplexity_of_mean": math.exp(means["nats_per_token"])}

    facts = {
        "uploaded_bytes": uploaded * rounds,
        "downloaded_bytes": uploaded * rounds,
        "trained_parameters": 590_592,
    }
    facts |= {"generalists": 1, "specialists": experts - 1, "rank": 8, "specialist_rank": 8}
    results = {
        name: {"test": tested(name, "personal"), "base_test": tested(name, "base")} | facts
        for name in clients
    }
    return {
        "method": tree.get("method", "comigs"),
        "base": tree.get("base", {}).get("name", "mini"),
        "seed": 42,
        "rounds": rounds,
        "clients": results,
        "mean": {"test": mean("personal"), "base_test": mean("base")},
    }


def change_metrics(folder: Path, **values: Any) -> None:
    """Give every line that has one of these fields the new value."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changed = [line | {k: v for k, v in values.items() if k in line} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))


def environment(clients: tuple[str, ...]) -> dict[str, Any]:
    sizes = {"train": 400_000, "valid": 9000, "test": 9000}
    split = {
        s: {"tokens": n, "bytes": 4 * n, "documents": n // 300, "sha256": [f"{n:064x}"]}
        for s, n in sizes.items()
    }
    machine = {"device": "cpu", "threads": 2, "dtype": "float32"}
    return {
        "comigs": "0.1.0",
        "torch": "2.9.0",
        "machine": machine,
        "data": dict.fromkeys(clients, split),
    }


def write_experts(path: Path, layers: int, experts: int) -> None:
    """A safetensors file of zeros with a client's slots."""
    parts = ["g0", *(f"s{i}" for i in range(experts - 1))]
    names = [
        f"{i}.{site}.{p}.{m}"
        for i in range(layers)
        for site in ("up", "down")
        for p in parts
        for m in "AB"
    ]
    names += [f"{i}.q.attention.{m}" for i in range(layers) for m in "AB"]
    names += [f"{i}.mlp.router.W" for i in range(layers)] if experts > 1 else []
    size = 256
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [8, 8], "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(names)
        }
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size * len(names)))


def test_reads_what_was_written(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, rounds=3))
    assert run.clients == LANGUAGES
    assert (len(run.train), len(run.evaluations), len(run.ends), run.last_round) == (12, 24, 3, 3)
    assert run.train[0].uploaded_bytes == 1_200_000
    assert run.summary is not None and run.summary.clients["fr"].rank == 8
    assert run.summary.mean.test.perplexity_of_mean == pytest.approx(
        math.exp(run.summary.mean.test.nats_per_token or 0)
    )
    assert run.environment["torch"] == "2.9.0"


def test_unfinished_run_has_no_summary(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, done=3))
    assert run.summary is None
    assert run.last_round == 3


@pytest.mark.parametrize("torn", ['{"kind": "train", "rou', '{"kind": "serv\N{EN DASH}'])
def test_torn_last_line_of_a_live_run_is_left_out(tmp_path: Path, torn: str) -> None:
    write_run(tmp_path, done=2)
    before = read_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn.encode()[:-1])
    assert read_run(tmp_path) == before


def test_corrupt_metrics_name_file_and_line(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, done=2) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:4], "{oops}\n", *lines[5:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 5: not JSON") as raised:
        read_run(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"kind": "train", "client": "fr"}, "round: expected a whole number, found nothing"),
        ({"kind": "server", "round": 1, "drift": "far"}, "drift: expected a number, found 'far'"),
        (
            {"kind": "note", "message": "x", "say": "maybe"},
            "say: expected true or false, found 'maybe'",
        ),
        ({"kind": "warning", "round": True}, "round: expected a whole number, found True"),
        ([1, 2], r"expected an object, found \[1, 2\]"),
        ({"round": 1}, "kind: expected a text, found nothing"),
    ],
)
def test_wrong_fields_name_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    metrics = write_run(tmp_path, done=1) / "metrics.jsonl"
    count = len(metrics.read_text().splitlines())
    with metrics.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl: line {count + 1}: {message}"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["config.toml", "env.json", "metrics.jsonl"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "env.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b'{"x": "\xff"}'])
def test_corrupt_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (write_run(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_run(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "nowhere")


def test_numbers_that_are_none_of_json_count_as_not_measured(tmp_path: Path) -> None:
    metrics = write_run(tmp_path, done=1) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write(
            '{"kind": "server", "round": 2, "drift": NaN}\n'
            '{"kind": "server", "round": 3, "drift": 1e999}\n'
        )
    assert [end.drift for end in read_run(tmp_path).ends[1:]] == [None, None]


def test_timings_are_optional_and_unknown_kinds_ignored(tmp_path: Path) -> None:
    folder = write_run(tmp_path, done=1)
    (folder / "timings.jsonl").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "of-tomorrow"}\n')
    assert read_run(folder).timings == ()
