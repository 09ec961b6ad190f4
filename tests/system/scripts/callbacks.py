"""Section 5 of the contract: hooks without a loop of one's own."""

from my_model import run

import dtrain

evaluations = []


def my_function(session, event):
    if event.kind == "evaluation":
        evaluations.append(session.metric("test_loss"))


if __name__ == "__main__":
    dtrain.train(
        run.replace(epochs=3),
        out="runs/callbacks",
        callbacks=[
            dtrain.callbacks.EarlyStopping("test_loss", patience=3),
            dtrain.callbacks.BestCheckpoint("accuracy"),
            my_function,
        ],
    )
    assert len(evaluations) == 3
