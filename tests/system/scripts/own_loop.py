"""Section 5 of the contract: a loop of one's own."""

from my_model import run

import dtrain

if __name__ == "__main__":
    with dtrain.Session(run.replace(epochs=2), out="runs/by-hand") as session:
        for segment in session.segments():
            for update in session.updates(segment):
                if session.rank == 0 and update % 10 == 0:
                    print(update, session.losses())
            session.finish(segment)
            if segment.ends_epoch:
                metrics = session.evaluate()
                session.save()
                if metrics["accuracy"] > 0.97:
                    break
