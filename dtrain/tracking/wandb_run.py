"""Weights & Biases: a run in `wandb/` of the run folder, offline unless `WANDB_MODE` says else."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, final

from dtrain.schema import Table
from dtrain.tracking.base import RunFacts, Tracker, flat_settings, require_package, scalars


@final
class WandbRun(Tracker):
    """The numbers of a run by update; `wandb sync RUN/wandb/offline-run-*` uploads them.

    All starts of a run folder have the same run id, which `wandb/run-id` holds.
    """

    def __init__(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nodes may have no network
        self._package = require_package("wandb", ("wandb",), "wandb")
        self._run: Any = None

    def start(self, run: Table, facts: RunFacts) -> None:
        folder = facts.folder / "wandb"
        folder.mkdir(exist_ok=True)  # else wandb takes another place
        id_file = folder / "run-id"
        if not id_file.is_file():
            id_file.write_text(os.urandom(8).hex(), encoding="utf-8")
        run_id = id_file.read_text(encoding="utf-8")
        while any(folder.glob(f"*_{time.strftime('%H%M%S')}-{run_id}")):
            time.sleep(0.1)  # wandb names the files of a start by its second
        self._run = self._package.init(
            id=run_id,
            name=facts.name,
            project=os.environ.get("WANDB_PROJECT", "dtrain"),
            dir=str(facts.folder),
            config=flat_settings(run),
            mode=os.environ.get("WANDB_MODE", "offline"),
            resume="allow",
            settings=self._package.Settings(console="off", silent=True, disable_git=True),
        )
        self._run.define_metric("update")
        self._run.define_metric("*", step_metric="update")

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        numbers = {f"{kind}/{name}": value for name, value in scalars(values).items()}
        if numbers:
            self._run.log({"update": values["update"], **numbers})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update({"status": summary["status"], **scalars(summary)})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
