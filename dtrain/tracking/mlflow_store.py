"""MLflow: a run in the file store `mlruns/` of the run folder, or at `MLFLOW_TRACKING_URI`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, final

from dtrain.schema import Table
from dtrain.tracking.base import RunFacts, Tracker, flat_settings, require_package, scalars

EXPERIMENT = "dtrain"


@final
class MlflowStore(Tracker):
    """The numbers of a run by update: `mlflow ui --backend-store-uri RUN/mlruns`.

    All starts of a run folder write into the same MLflow run, which has the tag `dtrain.folder`.
    """

    def __init__(self) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for it
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._package = require_package("mlflow", ("mlflow",), "mlflow-skinny")
        self._client: Any = None
        self._run_id = ""
        self._status = "FAILED"

    def start(self, run: Table, facts: RunFacts) -> None:
        folder = facts.folder.resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").as_uri()
        self._client = self._package.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else None
        experiment_id = experiment.experiment_id if number is None else number
        tag = str(folder).replace("'", "")
        runs = self._client.search_runs([experiment_id], f"tags.`dtrain.folder` = '{tag}'")
        if facts.attempt > 1 and runs:
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {"dtrain.folder": tag}
        created = self._client.create_run(experiment_id, tags=tags, run_name=facts.name)
        self._run_id = created.info.run_id
        for key, value in flat_settings(run).items():
            self._client.log_param(self._run_id, key, value)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        self._log({f"{kind}/{k}": v for k, v in scalars(values).items()}, values["update"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._log({f"summary/{k}": v for k, v in scalars(summary).items()}, summary["updates"])
        self._status = "FINISHED" if summary["status"] == "finished" else "KILLED"

    def _log(self, numbers: Mapping[str, float], update: int) -> None:
        metric = self._package.entities.Metric
        now = int(1000 * time.time())
        metrics = [metric(name, value, now, update) for name, value in numbers.items()]
        for start in range(0, len(metrics), 1000):  # a batch has at most so many
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def close(self) -> None:
        if self._run_id:
            self._client.set_terminated(self._run_id, self._status)
