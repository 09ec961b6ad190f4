"""Settle `[partition] balance = "time"`: rank 0 measures, all ranks get explicit cuts.

Invariant: the ranks have equal cuts, and a resumed run has those of its checkpoint.
"""

from __future__ import annotations

from functools import partial

from dtrain.comm.agree import broadcast_object
from dtrain.comm.communicator import Comm
from dtrain.config.run import RunConfig
from dtrain.planning.measured_costs import measure_cuts
from dtrain.planning.plan import with_cuts
from dtrain.schema import Table


def settle_cuts(
    run: RunConfig, comm: Comm, run_table: Table | None = None, ranks: int | None = None
) -> RunConfig:
    """Return `run` with the cuts that `balance = "time"` finds. Collective over `comm`.

    A run with another balance, or with cuts, is returned as it is.

    Parameters
    ----------
    run_table : dict, optional
        The resolved run of the checkpoint to resume from: its cuts are taken, unless `run` asks for
        another number of blocks.
    ranks : int, optional
        Ranks to plan for, if not those of `comm`.

    Raises
    ------
    DtrainError
        On all ranks, if the model cannot be measured.
    """
    section = run.partition
    if section.balance != "time" or section.cuts is not None:
        return run
    saved = (run_table or {}).get("partition", {}).get("cuts")
    if saved is not None and section.chosen_blocks in (None, len(saved) + 1):
        return with_cuts(run, saved)
    return with_cuts(run, broadcast_object(comm, partial(measure_cuts, run, ranks or comm.size)))
