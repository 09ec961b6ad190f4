"""Section 1 of the contract of the Python API."""

from torch import nn

import dtrain


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU()),
        nn.Linear(96, 10),
    )


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    mesh=dtrain.Mesh(stages=2),
    partition=dtrain.Partition(cuts=[3]),
    objective=dtrain.objectives.MonoForward(),
    sync="every-step",
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=8,
    batch_size=64,
    seed=0,
)

if __name__ == "__main__":
    print(dtrain.plan(run, ranks=2))
    result = dtrain.train(run, out="runs/mine")
    if result.rank == 0:
        print(result.test_accuracy, result.history[-1]["train_loss"])
        model = net()
        model.load_state_dict(result.state_dict())
