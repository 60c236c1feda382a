"""What trackers hold, read with each one's own reader, and what a run's lines say they should."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

Point = tuple[str, str, int]  # of whom, which figure, at which step


def from_lines(run: Path, seen: dict[str, str], steps: int) -> dict[Point, float]:
    """Every point of the curves, straight from metrics.jsonl. seen: what clients are called."""
    points: dict[Point, float | None] = {}
    for raw in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(raw)
        of = f"clients/{seen[line['client']]}" if line.get("client") else "server"
        at = line["round"]
        if line["kind"] == "train":
            for n, nats in enumerate(line["train_nats_per_token_by_step"], 1):
                points[of, "train_nats_per_token_by_step", (at - 1) * steps + n] = nats
            points[of, "train_nats_per_token", at] = line["train_nats_per_token"]
            if shares := line["generalist_share_by_layer"]:
                points[of, "generalist_share", at] = sum(shares) / len(shares)
        elif line["kind"] == "evaluation":
            which = line["split"] if line["model"] == "personal" else f"base_{line['split']}"
            points[of, f"{which}_nats_per_token", at] = line["nats_per_token"]
            points[of, f"{which}_perplexity", at] = line["perplexity"]
        elif line["kind"] == "server":
            points[of, "drift", at] = line["drift"]
    return {point: value for point, value in points.items() if value is not None}


def of_tensorboard(run: Path) -> list[tuple[Point, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, top = [], run / "track" / "tensorboard"
    for folder in sorted({file.parent for file in top.rglob("*tfevents*")}):
        events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.append(((str(folder.relative_to(top)), tag, event.step), event.value))
    return found


def of_mlflow(run: Path) -> list[tuple[Point, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run}/track/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "comigs"]
    (only,) = client.search_runs([experiment.experiment_id])
    found = []
    for key in only.data.metrics:
        for metric in client.get_metric_history(only.info.run_id, key):
            of, _, name = key.rpartition("/")
            found.append(((of, name, metric.step), metric.value))
    client._tracking_client.store.engine.dispose()
    return found


def wandb_records(run: Path) -> list[Any]:
    """Every record of the one part that wandb has of a run, with wandb's own reader."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = (run / "track" / "wandb").glob("offline-run-*/run-*.wandb")
    store, records = DataStore(), []
    store.open_for_scan(str(file))
    while (raw := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(raw)
        records.append(record)
    store._fp.close()
    return records


def of_wandb(run: Path, steps: int) -> list[tuple[Point, float]]:
    found = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
        values = {key: json.loads(text) for key, text in items.items()}
        for key, value in values.items():
            of, _, name = key.rpartition("/")
            if of:
                in_steps = name.endswith("_by_step")
                at = values["round"] * steps if in_steps else values["round"]
                assert abs(at - round(at)) < 1e-6
                found.append(((of, name, round(at)), value))
    return found


def as_float32(points: dict[Point, float]) -> dict[Point, float]:
    """Values as TensorBoard keeps them."""
    return {point: float(np.float32(value)) for point, value in points.items()}


def written(*places: Path) -> dict[str, bytes]:
    """Names in their folders, and bytes, of every file below folders; a link is what it says."""
    found = {}
    for place in places:
        for path in place.rglob("*"):
            if path.is_symlink():
                found[str(path.relative_to(place))] = os.readlink(path).encode()
            elif path.is_file():
                found[str(path.relative_to(place))] = path.read_bytes()
    return found
