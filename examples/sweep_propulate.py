"""A sweep with Propulate (pip install propulate): evolution on islands, two ranks for each run.

dtrain run examples/sweep_propulate.py --ranks 4
"""

import random
import sys
from importlib.util import find_spec

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


def search(ranks, generations):
    from propulate import Islands  # after dtrain.init, which starts MPI
    from propulate.utils import get_default_propagator

    size = 2 if ranks.size % 2 == 0 else 1  # ranks of a run
    worker = ranks.rank // size
    group = ranks.split(worker)

    def loss(settings, *_):
        run = make_run(10 ** settings["log_lr"], settings["width"])
        out = f"runs/propulate/{worker}-{{model.width}}-{{optimizer.lr}}"
        return dtrain.train(run, out, comm=group).history[-1]["validation_loss"]

    limits = {"log_lr": (-4.0, -1.0), "width": (16, 128)}
    rng = random.Random(worker)
    options = {"num_islands": min(2, ranks.size // size), "migration_probability": 0.5}
    options |= {"ranks_per_worker": size, "checkpoint_path": "runs/propulate"}
    propagator = get_default_propagator(4, limits, rng=rng)
    islands = Islands(loss, propagator, rng, generations=generations, **options)
    islands.propulate()
    if ranks.rank == 0:
        print("the table of all runs: dtrain compare runs/propulate")


if __name__ == "__main__":
    if find_spec("propulate"):
        search(dtrain.init(), generations=2 if QUICK else 10)
    elif dtrain.init().rank == 0:
        print("skipped: propulate is not installed")
