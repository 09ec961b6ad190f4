"""Description of a block: position, shapes and data, as an objective sees it.

Invariant: plain values, a pure function of the run file and of the data's shape, equal on every
rank. `DownstreamLayer.make` makes a layer under the run's own seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from dtrain.models.flow import SkipInput
from dtrain.tasks.task import DEFAULT_TASK, Task


@dataclass(frozen=True)
class DownstreamLayer:
    """A layer of the model that an objective may copy: after a block, in it, or the first one.

    Attributes
    ----------
    name : str
        Name in the model.
    output_shape : tuple of int
        Shape of one sample of its output.
    parameters : int
        Number of elements of its parameters.
    make : callable
        Makes the layer anew, with the initial weights that it has in this run.
    draw : callable
        Makes the layer anew, with the initial weights of another seed.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    make: Callable[[], nn.Module] = field(compare=False, repr=False)
    draw: Callable[[int], nn.Module] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class BlockSpec:
    """Description of one block. All shapes are those of one sample, without the rows.

    Attributes
    ----------
    index, blocks : int
        Position of the block, from 0, and number of blocks.
    input_shape, output_shape : tuple of int
        Shapes of what enters and leaves the block.
    dtype : torch.dtype
        Of the output.
    classes : int
        Number of outputs of the model per position: of labels, where targets are classes.
    sample_shape : tuple of int
        Shape of the data.
    next_output_shape : tuple of int
        Output shape of the next block, or of the next layer while cuts are being balanced. Empty in
        the last block.
    feature_shape : tuple of int
        Input shape of the block's last layer; in the last block that layer is the model's head.
    train_samples : int
        Size of the training split.
    has_raw_samples : bool
        Whether the value range of the data is known, so that ``micro_batch.raw_samples`` exists.
    frozen : bool
        Whether the run file freezes the layers of the block.
    prediction_shape : tuple of int or None
        Shape of the model's output; None where it is ``(classes,)``.
    task : Task
        Loss, targets and metrics of the run.
    last_layer : DownstreamLayer or None
        The block's last layer, if the objective `needs_downstream_layers`.
    downstream_layers : tuple of DownstreamLayer
        All layers after the block, if the objective `needs_downstream_layers`.
    first_layer : DownstreamLayer or None
        The model's first layer, if the objective `needs_block_layers`.
    own_layers : tuple of DownstreamLayer
        The block's layers in the model, if the objective `needs_block_layers`, or `needs_layers`:
        then only the last one while cuts are being balanced.
    integer_samples : bool
        Whether samples are integers (int64), which the model takes as they are: tokens, say.
    complex_samples : bool
        Whether samples are complex numbers.
    other_inputs : tuple of (shape, dtype)
        Further inputs of a sample.
    skip_inputs : tuple of SkipInput
        Tensors that the block reads beside the output of the block before.
    data_inputs : tuple of int
        Positions of the inputs of a sample that the block reads beside the first one in block 0.
    graph_nodes : int
        Number of nodes, where the samples are the nodes of a graph and their second input is their
        number; else 0. Virtual nodes of the classes have the numbers that follow.
    rebuilds_input : bool
        Whether the block rebuilds its input from its output, which the next block returns.
    """

    index: int
    blocks: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: torch.dtype
    classes: int
    sample_shape: tuple[int, ...] = ()
    next_output_shape: tuple[int, ...] = ()
    feature_shape: tuple[int, ...] = ()
    train_samples: int = 0
    has_raw_samples: bool = False
    frozen: bool = False
    prediction_shape: tuple[int, ...] | None = None
    task: Task = DEFAULT_TASK
    last_layer: DownstreamLayer | None = None
    downstream_layers: tuple[DownstreamLayer, ...] = ()
    first_layer: DownstreamLayer | None = None
    own_layers: tuple[DownstreamLayer, ...] = ()
    integer_samples: bool = False
    complex_samples: bool = False
    other_inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    skip_inputs: tuple[SkipInput, ...] = ()
    data_inputs: tuple[int, ...] = ()
    graph_nodes: int = 0
    rebuilds_input: bool = False

    def sample_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of samples in a run whose real numbers have `dtype`."""
        if self.integer_samples:
            return torch.int64
        return dtype.to_complex() if self.complex_samples else dtype

    @classmethod
    def from_data(
        cls,
        sample_shape: tuple[int, ...],
        classes: int,
        train_samples: int = 0,
        has_raw_samples: bool = False,
        task: Task = DEFAULT_TASK,
    ) -> BlockSpec:
        """Return a spec that describes the data only, with the shapes of a model of one block."""
        return cls(
            index=0,
            blocks=1,
            input_shape=sample_shape,
            output_shape=(classes,),
            dtype=torch.float32,
            classes=classes,
            sample_shape=sample_shape,
            train_samples=train_samples,
            has_raw_samples=has_raw_samples,
            task=task,
        )

    @property
    def scores_shape(self) -> tuple[int, ...]:
        """The shape of a prediction, of the model or of a head."""
        return (self.classes,) if self.prediction_shape is None else self.prediction_shape

    @property
    def scores_width(self) -> int:
        """The numbers of a prediction."""
        return math.prod(self.scores_shape)

    @property
    def has_positions(self) -> bool:
        """Whether a prediction has several positions, such as pixels."""
        return len(self.scores_shape) > 1

    @property
    def is_last(self) -> bool:
        """Whether the block is the last one, which ends in the model's own head."""
        return self.index == self.blocks - 1
