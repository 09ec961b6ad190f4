"""TensorBoard: event files in `tensorboard/` of the run folder, one per start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, final

from dtrain.schema import Table, dump_toml
from dtrain.tracking.base import RunFacts, Tracker, require_package, scalars


@final
class TensorBoard(Tracker):
    """The numbers of a run as scalars, by update: `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self) -> None:
        packages = ("torch.utils.tensorboard", "tensorboardX")
        self._package = require_package("tensorboard", packages, "tensorboard")
        self._writer: Any = None

    def start(self, run: Table, facts: RunFacts) -> None:
        self._writer = self._package.SummaryWriter(str(facts.folder / "tensorboard"))
        self._writer.add_text("run.toml", f"```\n{dump_toml(run)}\n```", facts.update)

    def record(self, kind: str, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, values["update"])
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        text = f"```\n{json.dumps(summary, indent=2)}\n```"
        self._writer.add_text("summary.json", text, summary["updates"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
