"""A training loop of your own: it prints block losses and lowers the learning rate itself.

dtrain run examples/own_loop.py --ranks 2
"""

import sys

from torch import nn

import dtrain

QUICK = "--quick" in sys.argv


def net():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU()),
        nn.Linear(96, 10),
    )


run = dtrain.Run(
    model=net,
    data=dtrain.data.digits(),
    partition=dtrain.Partition(cuts=[3]),
    mesh=dtrain.Mesh(stages=2),
    optimizer=dtrain.Optimizer("adam", lr=2e-3),
    epochs=2 if QUICK else 12,
    batch_size=64,
)

if __name__ == "__main__":
    with dtrain.Session(run) as session:  # restores the newest checkpoint of runs/own_loop
        for segment in session.segments():
            session.set_lr_scale(0.9**segment.epoch)  # all ranks do the same
            for update in session.updates(segment):
                if update % 20 == 0:  # a rank has the losses of its own blocks
                    print(f"update {update}, rank {session.rank}: {session.losses()}")
            session.finish(segment)
            if segment.ends_epoch:
                metrics = session.evaluate()  # the same on all ranks, so all decide alike
                session.save()
                if metrics["accuracy"] > 0.95:
                    break  # leaving early is a legal end: the status of the run is "stopped"
    if session.rank == 0:
        print(session.summary()["status"], session.history[-1]["metrics"])
