"""dtrain: data-, pipeline- and layer-parallel local learning over MPI.

::

    import dtrain

    run = dtrain.Run(model=net, data=dtrain.data.digits(), mesh=dtrain.Mesh(stages=2),
                     optimizer=dtrain.Optimizer("adam", lr=1e-3), epochs=8)
    print(dtrain.plan(run, ranks=2))
    result = dtrain.train(run, out="runs/mine")

A script runs on one rank as `python script.py`, on more under `mpirun` or `srun`, and on this host
as `dtrain run script.py --ranks N`.

Importing this package loads neither torch nor MPI: names are resolved when they are used. MPI
starts in the first function that needs it, or in `init`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain import callbacks, data, objectives, schedules, syncs, testing
    from dtrain.api import Metrics, Result, RunPlan, evaluate, export, plan, predict, train
    from dtrain.config.sections import Checkpoint, Evaluate, Log, Mesh, Numerics, Partition, Stop
    from dtrain.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DtrainError,
        HangError,
        Interrupted,
        NumericalError,
        RankLostError,
    )
    from dtrain.objectives.block_spec import BlockSpec
    from dtrain.planning.layer_list import LayerSpec
    from dtrain.planning.layer_list import list_layers as layers
    from dtrain.rank_process import init
    from dtrain.run import Optimizer, Run
    from dtrain.run_report.page import report
    from dtrain.session.session import Event, Session
    from dtrain.tasks.task import Task

_MODULES = ("callbacks", "data", "objectives", "schedules", "syncs", "testing")

_HOMES = {
    **dict.fromkeys(("Metrics", "Result", "RunPlan"), "dtrain.api"),
    **dict.fromkeys(("evaluate", "export", "plan", "predict", "train"), "dtrain.api"),
    **dict.fromkeys(
        ("Checkpoint", "Evaluate", "Log", "Mesh", "Numerics", "Partition", "Stop"),
        "dtrain.config.sections",
    ),
    **dict.fromkeys(
        (
            *("CheckpointError", "ConfigError", "DataError", "DtrainError", "HangError"),
            *("Interrupted", "NumericalError", "RankLostError"),
        ),
        "dtrain.errors",
    ),
    "BlockSpec": "dtrain.objectives.block_spec",
    "LayerSpec": "dtrain.planning.layer_list",
    "layers": "dtrain.planning.layer_list:list_layers",
    "init": "dtrain.rank_process",
    "report": "dtrain.run_report.page",
    **dict.fromkeys(("Optimizer", "Run"), "dtrain.run"),
    **dict.fromkeys(("Event", "Session"), "dtrain.session.session"),
    "Task": "dtrain.tasks.task",
}
"""The module of every public name, and the name there if it is another."""

__all__ = [
    "BlockSpec",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DtrainError",
    "Evaluate",
    "Event",
    "HangError",
    "Interrupted",
    "LayerSpec",
    "Log",
    "Mesh",
    "Metrics",
    "NumericalError",
    "Numerics",
    "Optimizer",
    "Partition",
    "RankLostError",
    "Result",
    "Run",
    "RunPlan",
    "Session",
    "Stop",
    "Task",
    "callbacks",
    "data",
    "evaluate",
    "export",
    "init",
    "layers",
    "objectives",
    "plan",
    "predict",
    "report",
    "schedules",
    "syncs",
    "testing",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dtrain.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'dtrain' has no attribute '{name}'")
    module, _, other_name = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), other_name or name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
