"""Check a user's own objective, sync or schedule against the laws of training.

::

    dtrain.testing.check_objective(Focal(gamma=1.0))
    dtrain.testing.check_sync(EveryFourth())
    dtrain.testing.check_schedule("mine:Capped")

Each function trains small built-in nets with ranks as threads of this process, in a few seconds. It
returns a report of the laws that hold, prints nothing, and raises `LawError` at the first law that
is broken.
"""

from dtrain.testing.laws import LawError, LawReport
from dtrain.testing.objective_laws import check_objective
from dtrain.testing.schedule_laws import check_schedule
from dtrain.testing.sync_laws import check_sync

__all__ = ["LawError", "LawReport", "check_objective", "check_schedule", "check_sync"]
