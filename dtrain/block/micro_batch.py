"""One micro-batch on its way through one block: what it brings, and what the block made of it.

Invariant: random numbers that an objective asks for are those of the sample's row in the whole
update, under (seed, block, update): no cut into micro-batches or replicas changes them.

::

    Given   sample, told, labels ---- feed ----> x
    Live    x ---- layers ----> y, taps ---- pulls ----> gradients
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

from dtrain.rng import derive_seed


@dataclass(frozen=True, slots=True)
class RowRandom:
    """The random numbers of some rows of one update.

    Attributes
    ----------
    seed, block, update : int
        What they depend on, beside their name.
    rows : int
        Samples of the update, over all replicas.
    first, count : int
        Which of them are mine.
    """

    seed: int
    block: int
    update: int
    total_rows: int
    first_row: int
    local_rows: int

    def generate(self, name: str, make: Callable[[int, Generator], Tensor]) -> Tensor:
        """Return my rows of ``make(rows, generator)``, a tensor with the samples first.

        Made for the whole update, then sliced: ``draws.rows_of("noise", lambda n, g:
        torch.randn(n, 10, generator=g))``. It is on the CPU.
        """
        assert self.total_rows, "random numbers are of micro-batches that are learnt"
        generator = Generator().manual_seed(derive_seed(self.seed, name, self.block, self.update))
        return make(self.total_rows, generator)[self.first_row : self.first_row + self.local_rows]


NO_ROW_RANDOM = RowRandom(0, 0, 0, 0, 0, 0)


NO_INDICES = torch.empty(0, dtype=torch.int64)


@dataclass(slots=True)
class Given:
    """What a forward of one micro-batch has been given.

    Attributes
    ----------
    targets : Tensor
        Labels of the rows, (rows,) int64.
    told : dict of str to Tensor
        What the routes brought to this forward, by the route's name.
    sample : Tensor or None
        The data themselves, (rows, ...), standardised and augmented, where the objective reads
        them in this block; not to be written to.
    image : Tensor or None
        The same as they were before they were standardised, in 0 ... 1, where the objective asks
        for `raw` data and their range is known.
    indices : Tensor
        Which samples of the training split they are, (rows,) int64; empty in prediction.
    draws : Draws
        The objective's own random numbers.
    pass_ : int
        Which forward pass of the micro-batch this is.
    before : Live or None
        What the pass before it left.
    learning : bool
        Whether the micro-batch will be learnt, and is not only predicted.
    """

    targets: Tensor
    received: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    raw_samples: Tensor | None = None
    indices: Tensor = NO_INDICES
    row_random: RowRandom = NO_ROW_RANDOM
    pass_: int = 0
    previous_pass: MicroBatch | None = None
    training: bool = False


@dataclass(slots=True)
class MicroBatch:
    """One micro-batch in one block, from its forward to its learning.

    Attributes
    ----------
    x : Tensor
        What the block was fed, a leaf, (rows, ...).
    y : Tensor
        What the block's layers made of it, with its graph while training; detached where the
        graph is cut at every layer: then `outs` have the graphs.
    targets : Tensor
        Labels of the rows, (rows,) int64.
    share : float
        Rows of this micro-batch over the rows of this replica in this update (n_i / n_r): where
        a signal is born, it is scaled by it.
    told : dict of str to Tensor
        What the routes brought so far, to this forward and to its learning, by the route's name;
        `feed` may take out what is not needed again.
    loss : Tensor or None
        Mean over the rows of what a user sees as the loss; left behind by the objective.
    figures : dict of str to Tensor
        Means over the rows of whatever else a user wants to see, likewise; they are recorded.
    outs : dict of str to Tensor
        What each layer made, by name, where the objective learns layer by layer.
    taps : dict of str to Tensor
        What the tapped modules made.
    draws : Draws
        The objective's own random numbers.
    sample : Tensor or None
        The data themselves, where the objective reads them in this block.
    image : Tensor or None
        The same, not standardised.
    indices : Tensor
        Which samples they are.
    before : Live or None
        What an earlier pass left.
    draw : tuple of int
        What keyed the layers' random numbers, to compute them again.
    buffers : dict of str to Tensor
        The block's buffers before the forward, where it will be computed again.
    calls : list of (nn.Module, Tensor)
        Leaf modules and what they made, where the backward is split.
    owed : list of (Tensor, list of Parameter, Tensor)
        Weight gradients that a split backward still owes: output of a leaf module, its
        parameters, and the gradient of that output.
    """

    x: Tensor
    y: Tensor
    targets: Tensor
    loss_scale: float = 1.0
    received: dict[str, Tensor] = field(default_factory=dict)
    loss: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    layer_outputs: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    row_random: RowRandom = NO_ROW_RANDOM
    samples: Tensor | None = None
    raw_samples: Tensor | None = None
    indices: Tensor = NO_INDICES
    previous_pass: MicroBatch | None = None
    rng_key: tuple[int, ...] = ()
    saved_buffers: dict[str, Tensor] = field(default_factory=dict)
    leaf_calls: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    pending_weight_gradients: list[tuple[Tensor, list[nn.Parameter], Tensor]] = field(
        default_factory=list
    )

    def passes(self) -> list[MicroBatch]:
        """Return what all passes of this micro-batch left, the first one first."""
        return [*(self.previous_pass.passes() if self.previous_pass else ()), self]
