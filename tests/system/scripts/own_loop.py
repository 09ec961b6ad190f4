"""Section 5 of the contract: a loop of one's own, and callbacks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from my_model import run

import dtrain

run = run.replace(epochs=2)
with dtrain.Session(run, out="runs/by-hand") as session:
    for segment in session.segments():
        for update in session.updates(segment):
            if session.rank == 0 and update % 50 == 0:
                print(update, session.losses())
        session.finish(segment)
        if segment.ends_epoch:
            metrics = session.evaluate()
            session.save()
            if metrics["accuracy"] > 0.97:
                break
