"""Trackers: programs and files that receive the records of a run.

`TRACKERS` holds the class of each name as text, so that no tracker's package is imported before a
run names it.
"""

from __future__ import annotations

TRACKERS = {
    "csv": "dtrain.tracking.csv_files:CsvFiles",
    "mlflow": "dtrain.tracking.mlflow_store:MlflowStore",
    "tensorboard": "dtrain.tracking.tensorboard:TensorBoard",
    "wandb": "dtrain.tracking.wandb_run:WandbRun",
}
"""The trackers that `[log] trackers` may name; `metrics.jsonl` is always written."""
