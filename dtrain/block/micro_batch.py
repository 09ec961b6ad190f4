"""One micro-batch in one block: its inputs, and the results of the block's forward and backward.

Invariant: the random numbers of an objective depend on (seed, block, update) and on the sample's
row in the update, in prediction on (seed, block) and the sample; splitting into micro-batches or
replicas does not change them.

::

    samples, received, targets -- make_input --> x -- layers --> y, taps -- backward_pairs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from dtrain.rng import derive_seed
from dtrain.tasks.task import DEFAULT_TASK, Task

SAMPLES_PER_DRAW = 64
"""Samples that share a generator in prediction."""


class RowRandom(NamedTuple):
    """Random numbers for some rows of one update, or in prediction for some samples of a split.

    Attributes
    ----------
    seed, block, update : int
        The numbers depend on these and on a name.
    total_rows : int
        Samples of the update, over all replicas.
    first_row, local_rows : int
        The rows of this micro-batch: their start and their number.
    samples : Tensor or None
        In prediction the positions of the samples in the split, (rows,) int64.
    """

    seed: int
    block: int
    update: int
    total_rows: int
    first_row: int
    local_rows: int
    samples: Tensor | None = None

    @staticmethod
    def of_samples(seed: int, block: int, samples: Tensor) -> RowRandom:
        """Return the random numbers of a prediction; `samples` are positions (rows,) int64."""
        return RowRandom(seed, block, 0, 0, 0, len(samples), samples)

    def generate(self, name: str, make: Callable[[int, Generator], Tensor]) -> Tensor:
        """Return this micro-batch's rows of ``make(total_rows, generator)``, on the CPU.

        `make` returns a tensor with the samples first. It is called for the whole update, or in
        prediction for groups of samples, and the result is sliced:
        ``row_random.generate("noise", lambda n, g: torch.randn(n, 10, generator=g))``.
        """
        if self.samples is not None:
            return self._generate_for_samples(name, make, self.samples)
        assert self.total_rows, "this micro-batch has no random numbers"
        numbers = make(self.total_rows, self._generator(name))
        return numbers[self.first_row : self.first_row + self.local_rows]

    def generate_shared(self, name: str, make: Callable[[Generator], Tensor]) -> Tensor:
        """Return ``make(generator)``, on the CPU: the same in all micro-batches of the update, and
        in all replicas."""
        assert self.total_rows, "only micro-batches of training have random numbers"
        return make(self._generator(name))

    def _generator(self, name: str) -> Generator:
        return Generator().manual_seed(derive_seed(self.seed, name, self.block, self.update))

    def _generate_for_samples(
        self, name: str, make: Callable[[int, Generator], Tensor], samples: Tensor
    ) -> Tensor:
        """Return the rows of samples, of draws for groups of consecutive ones."""
        groups, positions = torch.unique(samples // SAMPLES_PER_DRAW, return_inverse=True)
        draws = []
        for group in groups.tolist():
            seed = derive_seed(self.seed, name, "prediction", self.block, group)
            draws.append(make(SAMPLES_PER_DRAW, Generator().manual_seed(seed)))
        return torch.cat(draws)[positions * SAMPLES_PER_DRAW + samples % SAMPLES_PER_DRAW]


NO_ROW_RANDOM = RowRandom(0, 0, 0, 0, 0, 0)


NO_TENSOR = torch.empty(0)


NO_INDICES = torch.empty(0, dtype=torch.int64)


@dataclass(slots=True)
class MicroBatch:
    """One forward pass of a micro-batch in one block, until the end of its backward.

    The fields before `loss` but `x` and `y` are set before the forward; the forward sets `x`, `y`
    and those from `layer_outputs` on.

    Attributes
    ----------
    x : Tensor
        Input of the block's first layer, a leaf, (rows, ...); empty before the forward.
    y : Tensor
        Output of the block's layers, with its graph in training; detached where the graph is cut
        at every layer: then `layer_outputs` have the graphs. Empty before the forward.
    targets : Tensor
        Targets of the rows, (rows, ...): one int64 label each, unless `task` says otherwise.
    loss_scale : float
        Rows of this micro-batch over the rows of this replica in this update (n_i / n_r), or the
        ratio of their counted positions or weights. A loss is multiplied by it once, by the
        objective that computes it.
    skip_inputs, skip_outputs : dict of str to Tensor
        Further inputs of the layers, leaves, and outputs that later blocks read, with their graph;
        by name. Empty where the model is a chain.
    received : dict of str to Tensor
        Messages of the routes to this forward, and later to its backward, by the route's name;
        `make_input` may remove messages that are not needed again.
    samples : Tensor or None
        The data, (rows, ...), standardised and augmented, where the objective needs them in this
        block. They are shared: do not write to them.
    other_samples : tuple of Tensor
        Further inputs of the data, (rows, ...) each, where the layers of this block read them.
    raw_samples : Tensor or None
        The data before they were standardised, in 0 ... 1, where the objective needs them and
        their range is known.
    indices : Tensor
        Positions of the samples in the training split, (rows,) int64; empty in prediction.
    row_random : RowRandom
        Random numbers of the objective.
    pass_ : int
        Which forward pass of the micro-batch this is, from 0.
    previous_pass : MicroBatch or None
        The record of the pass before this one.
    training : bool
        Whether a backward follows; if not, the micro-batch is only predicted.
    rng_key : tuple of int
        Key of the layers' random numbers: update, micro-batch, replica.
    saved_sizes : dict of int to int
        Bytes of the storages that all passes keep for the backward; see `SavedTensors`.
    loss : Tensor or None
        Mean loss over the rows, as a user sees it; set by the objective.
    metrics : dict of str to Tensor
        Means over the rows of further quantities that are recorded; set by the objective.
    layer_outputs : dict of str to Tensor
        Output of each layer, by name, where the objective trains layer by layer.
    taps : dict of str to Tensor
        Outputs of the tapped modules.
    saved_buffers : dict of str to Tensor
        The block's buffers before the forward, where the forward will be recomputed.
    leaf_calls : list of (nn.Module, Tensor)
        Leaf modules and their outputs, where the backward is split.
    pending_weight_gradients : list of (Tensor, list of Parameter, Tensor)
        Weight gradients that a split backward has not computed yet: output of a leaf module, its
        parameters, and the gradient of that output.
    task : Task
        Loss, targets and metrics of the run.
    weights : Tensor or None
        Weights of the samples in the loss, (rows,) float64; None where all count alike.
    """

    x: Tensor = NO_TENSOR
    y: Tensor = NO_TENSOR
    targets: Tensor = NO_INDICES
    loss_scale: float = 1.0
    skip_inputs: dict[str, Tensor] = field(default_factory=dict)
    skip_outputs: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    other_samples: tuple[Tensor, ...] = ()
    raw_samples: Tensor | None = None
    indices: Tensor = NO_INDICES
    row_random: RowRandom = NO_ROW_RANDOM
    pass_: int = 0
    previous_pass: MicroBatch | None = None
    training: bool = False
    rng_key: tuple[int, ...] = ()
    saved_sizes: dict[int, int] = field(default_factory=dict)
    loss: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    layer_outputs: dict[str, Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    saved_buffers: dict[str, Tensor] = field(default_factory=dict)
    leaf_calls: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    pending_weight_gradients: list[tuple[Tensor, list[nn.Parameter], Tensor]] = field(
        default_factory=list
    )
    task: Task = DEFAULT_TASK
    weights: Tensor | None = None

    @property
    def sample_scale(self) -> float:
        """The factor of the gradient of a *sum* of losses: `loss_scale` over the count of the
        targets."""
        count = self.count
        return self.loss_scale / count if count else 0.0

    @property
    def count(self) -> float:
        """The number by which the mean loss of the rows divides: of rows or counted positions, or
        the sum of their weights."""
        return self.task.count(self.targets, self.weights)

    def mean_loss(self, output: Tensor) -> Tensor:
        """Return the task's loss () of a prediction (rows, ...), weighted where samples have
        weights."""
        return self.task.mean_loss(output, self.targets, self.weights)

    def release_forward(self, keep_input: bool) -> None:
        """Drop the outputs of the forward, which is computed again, and the input unless it is
        kept."""
        self.y = NO_TENSOR
        self.skip_outputs, self.layer_outputs, self.taps = {}, {}, {}
        if not keep_input:
            self.x, self.samples = NO_TENSOR, None

    def next_pass(self, received: dict[str, Tensor]) -> MicroBatch:
        """Return the record of the next forward pass of the same samples."""
        return MicroBatch(
            targets=self.targets,
            weights=self.weights,
            task=self.task,
            loss_scale=self.loss_scale,
            received=received,
            samples=self.samples,
            other_samples=self.other_samples,
            raw_samples=self.raw_samples,
            indices=self.indices,
            row_random=self.row_random,
            pass_=self.pass_ + 1,
            previous_pass=self,
            training=self.training,
            rng_key=self.rng_key,
            saved_sizes=self.saved_sizes,
        )

    def passes(self) -> list[MicroBatch]:
        """Return the records of all passes of this micro-batch, the first one first."""
        return [*(self.previous_pass.passes() if self.previous_pass else ()), self]
