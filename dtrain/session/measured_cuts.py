"""Settle `[partition] balance = "time"`: rank 0 measures, all ranks get explicit cuts.

Invariant: the ranks have equal cuts. A run that a checkpoint completed has cuts already.
"""

from __future__ import annotations

from functools import partial

from dtrain.comm.agree import broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.planning.measured_costs import measure_cuts


def settle_cuts(run: RunConfig, comm: Comm, ranks: int | None = None) -> RunConfig:
    """Return `run` with the cuts that `balance = "time"` finds. Collective over `comm`.

    A run with another balance, or with cuts, is returned as it is.

    Parameters
    ----------
    run : RunConfig
        With the blocks of the checkpoint that it resumes from (`with_checkpoint_blocks`).
    ranks : int, optional
        Ranks to plan for, if not those of `comm`.

    Raises
    ------
    DtrainError
        On all ranks, if the model cannot be measured.
    """
    if run.partition.balance != "time" or run.partition.cuts is not None:
        return run
    return run.with_cuts(broadcast_object(comm, partial(measure_cuts, run, ranks or comm.size)))
