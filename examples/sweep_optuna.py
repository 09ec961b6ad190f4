"""A sweep with Optuna (pip install optuna): all ranks train each trial, rank 0 alone asks for it.

dtrain run examples/sweep_optuna.py --ranks 2    # jobs that start it in one folder share the study
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


def net(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def make_run(lr, width):
    return dtrain.Run(
        model={"name": net, "width": width},
        data=dtrain.data.digits(validation=0.2),
        partition=dtrain.Partition(cuts=[3]),
        mesh=dtrain.Mesh(stages=2),
        optimizer=dtrain.Optimizer("adam", lr=lr),
        epochs=1 if QUICK else 5,
    )


def open_study():
    from optuna import create_study, storages

    Path("runs").mkdir(exist_ok=True)  # the journal keeps the trials: another start adds some
    storage = storages.JournalStorage(storages.journal.JournalFileBackend("runs/sweep.journal"))
    return create_study(
        study_name="digits", storage=storage, direction="maximize", load_if_exists=True
    )


def sweep(ranks, trials):
    study = open_study() if ranks.rank == 0 else None
    for _ in range(trials):
        trial, choice = study.ask() if study else None, None
        if trial:
            lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
            choice = lr, trial.suggest_int("width", 16, 128)
        choice = ranks.allgather_object(choice)[0]  # that of rank 0, on all ranks
        result = dtrain.train(make_run(*choice), out="runs/sweep/{model.width}-{optimizer.lr}")
        if study:
            study.tell(trial, result.history[-1]["validation_accuracy"])
            print("best so far:", study.best_params, study.best_value)


if __name__ == "__main__":
    if find_spec("optuna"):
        sweep(dtrain.init(), trials=2 if QUICK else 12)
    elif dtrain.init().rank == 0:
        print("skipped: optuna is not installed")
