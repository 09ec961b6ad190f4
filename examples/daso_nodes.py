"""DASO on several nodes: gradients inside a node in every update, weights between nodes rarely.

On a desk, all ranks are one node and DASO is every-step, bit for bit:

    dtrain run examples/daso_nodes.py --ranks 4

Under Slurm, on 2 nodes with 4 ranks each (2 stages x 4 replicas):

    sbatch --nodes=2 --ntasks-per-node=4 --wrap \
        "srun --mpi=pmix --kill-on-bad-exit=1 python examples/daso_nodes.py"
"""

import sys

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
    mesh=dtrain.Mesh(stages=2, placement="stages-in-node"),  # a node has whole replicas
    partition=dtrain.Partition(cuts=[3]),
    sync=dtrain.syncs.DASO(warmup_epochs=1, cooldown_epochs=1, max_global_skips=4),
    optimizer=dtrain.Optimizer("sgd", lr=0.05, momentum=0.9),
    epochs=3 if QUICK else 12,
    batch_size=64,
    seed=1,
)

if __name__ == "__main__":
    hosts = set(dtrain.init().hosts)
    result = dtrain.train(run, out="runs/daso-{epochs}")  # DASO depends on the length of the run
    if result.rank == 0:
        summary = result.summary
        inside, between = summary["bytes_intra_node"], summary["bytes_inter_node"]
        print(f"test accuracy {result.test_accuracy:.3f} on {len(hosts)} node(s)")
        print(f"bytes inside nodes {inside:,}, between nodes {between:,}")
        if len(hosts) == 1:
            print("one node: every update averaged all gradients, so nothing was asynchronous")
