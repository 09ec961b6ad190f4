"""What the ranks may be asked for while they train: a checkpoint, or a checkpoint and the end.

Invariant: a request is a number, since ranks send it to each other and a signal handler sets it. Of
several requests the largest counts.
"""

from __future__ import annotations

import signal

SAVE = 1
"""Save a checkpoint and go on."""


TIME_LIMIT = 100
"""Save and stop before the job ends. All larger requests stop the run, too."""


FIRST_SIGNAL = 200


def signal_request(number: int) -> int:
    """Return the request of a signal: save and stop."""
    return FIRST_SIGNAL + number


def stops(request: int) -> bool:
    """Return whether the run saves and ends."""
    return request >= TIME_LIMIT


def reason(request: int) -> str:
    """Return why a run stops, for people."""
    if request < FIRST_SIGNAL:
        return "the time limit of the job"
    return f"stopped by {signal.Signals(request - FIRST_SIGNAL).name}"
