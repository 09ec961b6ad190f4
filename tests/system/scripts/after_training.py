"""Section 6 of the contract: evaluate, predict, export and report."""

import numpy as np
from my_model import run

import dtrain

if __name__ == "__main__":
    dtrain.train(run.replace(epochs=1), out="runs/a")
    result = dtrain.train(run.replace(epochs=1, objective="backprop"), out="runs/b")
    metrics = dtrain.evaluate("runs/b", split="test")
    assert metrics["accuracy"] == result.test_accuracy
    x_new = np.zeros((5, 1, 8, 8), np.float32)
    outputs = dtrain.predict("runs/b", x_new)
    assert outputs is None if result.rank else outputs.shape == (5, 10)
    dtrain.export("runs/b", "net.safetensors")
    dtrain.report(["runs/a", "runs/b"], "report.html")
