# %% [markdown]
# # dtrain in a notebook
# Open this file in VS Code or with jupytext: every `# %%` is a cell. A notebook is one rank, which
# holds all blocks; `dtrain run examples/notebook.py --ranks 2` trains the same on two.

# %%
import sys

from torch import nn

import dtrain

epochs = 2 if "--quick" in sys.argv else 10


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU()),
        nn.Linear(96, 10),
    )


# %% Two runs that differ in what a block learns
local = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    partition=dtrain.Partition(cuts=[3]),
    mesh=dtrain.Mesh(stages=2),
    objective="mono-forward",
    optimizer=dtrain.Optimizer("adam", lr=1e-3),
    epochs=epochs,
    batch_size=64,
)
backprop = local.replace(objective="backprop", micro_batches=4)

# %% What would two ranks do?
if dtrain.init().rank == 0:
    print(dtrain.plan(local, ranks=2))

# %%
results = {
    "local": dtrain.train(local, out="runs/notebook/local"),
    "backprop": dtrain.train(backprop, out="runs/notebook/backprop"),
}
results["local"]

# %% Curves, and one page about both runs; the files are written on rank 0
for name, result in results.items():
    result.plot(f"runs/notebook/{name}.png")
if dtrain.init().rank == 0:
    dtrain.report([result.out for result in results.values()], "runs/notebook/report.html")

# %% Outputs for samples, in their order
scores = dtrain.predict(results["local"].out, "test")
if scores is not None:
    print(scores.shape, scores[0].round(2))
