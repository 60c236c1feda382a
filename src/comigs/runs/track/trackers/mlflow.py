"""MLflow: a database in the run folder, or the server that $MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from comigs.runs.layout import TRACK
from comigs.runs.track.curves import Row
from comigs.runs.track.tracker import Subject, Tracker

DATABASE = f"{TRACK}/mlflow.db"
ID = "comigs.id"  # the tag by which a run is found again
NOWHERE = "mlflow-artifacts:/"  # a place for artifacts, of which there are none; else it is a path
ENVIRONMENT = {  # unless the user says otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
BATCH = 1000  # metrics that a server takes at once


class Metrics:
    """Metrics go into one run of MLflow's.

    Its client, unlike `mlflow.start_run`, adds no user, no program and no commit.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.known: set[tuple[str, int]] = set()
        for key in client.get_run(run_id).data.metrics:
            history = client.get_metric_history(run_id, key)
            self.known |= {(key, metric.step) for metric in history}

    def write(self, rows: Sequence[Row]) -> None:
        """Write what the run does not have yet."""
        from mlflow.entities import Metric

        now, new = int(1000 * time.time()), []
        for row in rows:
            for name, figure in row.figures.items():
                key = f"{row.of}/{name}"
                if (key, row.step) not in self.known:
                    new.append(Metric(key, figure, now, row.step))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self.client.log_batch(self.run_id, metrics=batch)
            self.known |= {(metric.key, metric.step) for metric in batch}

    def close(self, finished: bool) -> None:
        """Say how the run has ended."""
        self.client.set_terminated(self.run_id, "FINISHED" if finished else "KILLED")


class LocalMetrics(Metrics):
    """Local metrics are in a database that is closed with them."""

    def __init__(self, client: Any, run_id: str, engine: Any) -> None:
        self.engine = engine
        super().__init__(client, run_id)

    def close(self, finished: bool) -> None:
        """Say how the run has ended, and close the database."""
        super().close(finished)
        self.engine.dispose()


def _open(subject: Subject) -> Metrics:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    # A URI that the user gives is used as it is. Our own database is made first, as MLflow would
    # note the working folder in it, for artifacts.
    uri, engine = os.environ.get("MLFLOW_TRACKING_URI"), None
    if not uri:
        uri = f"sqlite:///{subject.files.path.absolute() / DATABASE}"
        engine = _database(subject, uri)
    client = MlflowClient(tracking_uri=uri)
    run_id = _run(client, subject, None if engine is None else NOWHERE)
    client.update_run(run_id, status="RUNNING")
    return Metrics(client, run_id) if engine is None else LocalMetrics(client, run_id, engine)


def _database(subject: Subject, uri: str) -> Any:
    """Make or open the database in the run folder, and return its engine."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    subject.files.make_folder(TRACK)
    subject.files.refuse_link(DATABASE)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return SqlAlchemyStore(uri, NOWHERE).engine


def _run(client: Any, subject: Subject, artifacts: str | None) -> str:
    """Return the id of the tracker's run that is this one; it is made where there is none."""
    from mlflow.entities import Param

    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "comigs")
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        number = client.create_experiment(name, artifact_location=artifacts)
    else:
        number = experiment.experiment_id
    found = client.search_runs([number], f"tags.`{ID}` = '{subject.id}'")
    if not found:
        found = [client.create_run(number, run_name=subject.name, tags={ID: subject.id})]

    # A process that was killed may have made the run and not told it the settings.
    run_id = str(found[0].info.run_id)
    if not found[0].data.params:
        params = [Param(name, str(value)) for name, value in subject.settings.items()]
        client.log_batch(run_id, params=params)
    return run_id


def _place() -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return "MLFLOW_TRACKING_URI" if uri else f"{DATABASE} of the run folder"


TRACKER = Tracker(("mlflow", "sqlalchemy", "alembic"), _place, _open)
