"""The energy of a training, measured by perun: https://github.com/Helmholtz-AI-Energy/perun.

pip install perun
dtrain run examples/energy_perun.py --ranks 2
"""

import sys
from importlib.util import find_spec

from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    mesh=dtrain.Mesh(stages=2),
    partition=dtrain.Partition(cuts=[3]),
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=2 if QUICK else 30,
    batch_size=64,
)


results = []


def train():
    results.append(dtrain.train(run, resume="fresh"))


if __name__ == "__main__":
    rank = dtrain.init().rank  # MPI starts here, before perun looks for it
    if find_spec("perun"):
        from perun import perun

        perun(data_out="runs/energy", format="text", app_name="digits")(train)()
        message = "perun wrote its report into runs/energy"
    else:
        train()
        message = "trained without measuring energy: perun is not installed"
    if rank == 0:
        print(f"test accuracy {results[-1].test_accuracy:.3f}; {message}")
