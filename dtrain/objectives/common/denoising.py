"""Denoising (NoProp, DiffusionBlocks): blocks that learn from samples and noisy labels alone.

A class c has a fixed code u_c of d numbers, equal in all blocks. In training a block reads the
sample and a noisy code of its label, at the noise level of the block, and learns to predict the
class; nothing is sent. In prediction the state z starts as noise and passes through the chain of
blocks::

    training     x, noisy code --> block 0     x, noisy code --> block 1     x, noisy code --> ...

    prediction   noise --> block 0 --z--> block 1 --z--> block 2 --> scores      each reads x, too

A block is the user's layers of that block, between an inlet and an outlet. The inlet reads the
sample by the block's own copy of the model's *first layer*, whose initial weights are those of the
model; see `denoising_inlet`. The outlet of the last block is the model's own head, elsewhere a
linear layer.

Invariant: noise belongs to (seed, block, update, sample) in training and to (seed, block, sample)
in prediction, so it depends neither on the ranks nor on the cut into micro-batches.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Generator, Tensor, nn

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.errors import ConfigError
from dtrain.models.layers import NamedFactories
from dtrain.objectives.base import ExecutionMode, MessageSpec, Objective, forward_routes
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.common import head_networks, prediction_heads
from dtrain.objectives.common.denoising_inlet import (
    LEVEL_FEATURES,
    Inlet,
    can_fit,
    embed_levels,
    positions_of,
)
from dtrain.rng import derive_seed
from dtrain.schedules.actions import Route
from dtrain.tasks.task import Task

STATE = "state"
"""Route name of z, from block to block in prediction."""


STATE_DTYPE = torch.float64


STEM_SHARE = 0.5
"""Part of all parameters that the copies of the first layer may have without a warning."""


@dataclass(frozen=True)
class Denoising(Objective):
    """Base of objectives whose blocks denoise the code of a label. The last block predicts.

    Parameters
    ----------
    width : int
        Numbers of a code: 0 for one-hot codes, else fixed random codes of that width.
    chains : int
        Chains of a sample in prediction, each with noise of its own. The prediction is the mean of
        their class probabilities, where one chain draws a sample of them.

    Raises
    ------
    ConfigError
        `width` is negative or 1, or `chains` is below 1.
    """

    needs_block_layers: ClassVar[bool] = True
    default_schedule: ClassVar[str] = "stream"
    prediction_fields: ClassVar[tuple[str, ...]] = ("chains", "steps")

    width: int = 0
    chains: int = 1

    def __post_init__(self) -> None:
        if self.chains < 1:
            raise ConfigError(
                "objective.chains-too-few",
                f"[objective] chains = {self.chains} must be at least 1",
            )
        if self.width < 0 or self.width == 1:
            raise ConfigError(
                "objective.width-too-small",
                f"[objective] width = {self.width} must be 0, for one-hot codes, or at least 2, "
                "the numbers of a random code",
            )

    # ---- the method

    def code_length(self, width: int) -> float:
        """Return the length of a code of `width` numbers."""
        return 1.0

    @property
    @abstractmethod
    def has_levels(self) -> bool:
        """Whether a block reads its noise level, since it learns at several."""

    @property
    @abstractmethod
    def prediction_steps(self) -> int:
        """How often a block runs in a prediction."""

    @abstractmethod
    def training_input(self, spec: BlockSpec, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return noisy codes (rows, *P, d) as the block reads them, and their levels (rows,)."""

    @abstractmethod
    def prediction_input(
        self, spec: BlockSpec, state: Tensor, step: int
    ) -> tuple[Tensor, Tensor | float]:
        """Return the state (rows, *P, d) as the block reads it in a step of a prediction, and its
        level."""

    @abstractmethod
    def start(self, noise: Tensor) -> Tensor:
        """Return the state (rows, *P, d) with which a prediction starts, of normal noise."""

    @abstractmethod
    def advance(
        self,
        spec: BlockSpec,
        block: Block,
        micro_batch: MicroBatch,
        state: Tensor,
        step: int,
        chain: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the state (rows, *P, d) after a step of a chain, and the class scores (rows, ...)
        of the block; ``micro_batch.y`` is its output in this step."""

    # ---- properties

    @property
    def scales_to_many_blocks(self) -> bool:
        """True: both methods were published for more than four blocks."""
        return True

    def serves(self, task: Task) -> str | None:
        """Return None where a target is a class per sample or per position, all alike."""
        if task.kind != "classes":
            return "needs class labels, per sample or per position"
        return "averages over samples and positions" if task.counts_positions else None

    def warnings(self, specs: Sequence[BlockSpec], rows: int) -> list[str]:
        """Warn where the copies of the model's first layer are most of the parameters."""
        stem = specs[0].first_layer
        assert stem is not None
        own = sum(layer.parameters for spec in specs for layer in spec.own_layers)
        copies = (len(specs) - 1) * stem.parameters
        if copies <= STEM_SHARE * (own + copies):
            return []
        return [
            f"the {len(specs) - 1} copies of the first layer '{stem.name}' have {copies:,} of "
            f"{own + copies:,} parameters: use fewer blocks, or a smaller first layer"
        ]

    # ---- codes and noise

    def code_width(self, spec: BlockSpec) -> int:
        """Return d, the numbers of a code."""
        return self.width or spec.classes

    def code_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return (*P, d): a code for each position of a target."""
        return (*spec.task.target_spec.shape, self.code_width(spec))

    def codes(self, spec: BlockSpec) -> Tensor:
        """Return the code of each class, (C, d) in float64, the same in all blocks and runs."""
        classes, width = spec.classes, self.code_width(spec)
        here: Any = {"dtype": STATE_DTYPE, "device": "cpu"}  # on meta a head has no numbers
        if self.width:
            generator = Generator().manual_seed(derive_seed("codes", classes, width))
            table = torch.randn(classes, width, generator=generator, **here)
            table = table / table.norm(dim=1, keepdim=True)
        else:
            table = torch.eye(classes, **here)
        return table * self.code_length(width)

    def clean_codes(self, spec: BlockSpec, micro_batch: MicroBatch) -> Tensor:
        """Return the codes (rows, *P, d) of the labels; of some class where a label is ignored."""
        targets = micro_batch.targets.clamp(0, spec.classes - 1)
        return self.codes(spec).to(targets.device)[targets]

    def draw_noise(self, spec: BlockSpec, micro_batch: MicroBatch, name: str) -> Tensor:
        """Return standard normal noise (rows, *P, d) of the samples, in float64."""
        shape = self.code_shape(spec)
        noise = micro_batch.row_random.generate(
            name, lambda n, g: torch.randn(n, *shape, generator=g, dtype=STATE_DTYPE)
        )
        return noise.to(micro_batch.targets.device)

    def draw_uniform(self, micro_batch: MicroBatch, name: str) -> Tensor:
        """Return numbers (rows,) between 0 and 1, in float64."""
        numbers = micro_batch.row_random.generate(
            name, lambda n, g: torch.rand(n, generator=g, dtype=STATE_DTYPE)
        )
        return numbers.to(micro_batch.targets.device)

    def expand(self, spec: BlockSpec, numbers: Tensor) -> Tensor:
        """Return a number per sample (rows,) with the dimensions of codes (rows, *P, d)."""
        return numbers.view(-1, *(1 for _ in self.code_shape(spec)))

    def expected_code(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return the mean of the codes (rows, *P, d) under the softmax of scores (rows, ...), the
        best estimate of a code in squared error; in float64."""
        probabilities = self.classes_last(spec, scores).to(STATE_DTYPE).softmax(-1)
        return probabilities @ self.codes(spec).to(scores.device)

    def classes_last(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return scores (rows, ...) of the model's shape as (rows, *P, C)."""
        moves = spec.has_positions and not spec.task.classes_last
        return scores.movedim(1, -1) if moves else scores

    def as_scores(self, spec: BlockSpec, scores: Tensor) -> Tensor:
        """Return scores (rows, *P, C) in the model's shape."""
        moves = spec.has_positions and not spec.task.classes_last
        return scores.movedim(-1, 1) if moves else scores

    # ---- the parts of a block

    def replacement_layers(self, spec: BlockSpec) -> NamedFactories:
        """Return the inlet and the block's own layers; the inlet of block 0 has the first one.

        Raises
        ------
        ConfigError
            Samples are complex, or the shapes of stem, block and targets do not fit.
        """
        own = spec.own_layers[0 if spec.index else 1 :]
        return [("inlet", self._inlet(spec)), *((layer.name, layer.make) for layer in own)]

    def _inlet(self, spec: BlockSpec) -> Callable[[], Inlet]:
        """Return the factory of a block's inlet."""
        stem = spec.first_layer
        assert stem is not None
        if spec.complex_samples:
            raise ConfigError(
                "objective.complex-samples",
                "this objective reads samples and labels together, as real numbers, and the "
                'samples are complex: set [objective] name = "backprop"',
            )
        shape = spec.input_shape if spec.index else stem.output_shape
        positions = spec.task.target_spec.shape
        if positions and positions != positions_of(shape):
            raise ConfigError(
                "objective.positions-differ",
                f"block {spec.index} takes {shape} for a sample, and the labels have the "
                f"positions {positions}: a noisy label needs a position of its own; cut where "
                'they are equal, or set [objective] name = "backprop"',
            )
        if not can_fit(stem.output_shape, shape):
            raise ConfigError(
                "objective.stem-does-not-fit",
                f"block {spec.index} takes {shape} for a sample, and the first layer, which every "
                f"block copies to read the samples, returns {stem.output_shape}: cut where the "
                "shapes are equal, or give the first layer that output, or set [objective] name = "
                '"backprop"',
            )
        return partial(
            Inlet,
            stem.make,
            stem.output_shape,
            spec.sample_shape,
            spec.integer_samples,
            self.code_shape(spec),
            shape,
            LEVEL_FEATURES if self.has_levels else 0,
        )

    def block_input_shape(self, spec: BlockSpec) -> tuple[int, ...]:
        """Return the numbers of a sample, its noisy code and the noise level, in one row."""
        numbers = math.prod(spec.sample_shape) + math.prod(self.code_shape(spec))
        return (numbers + (LEVEL_FEATURES if self.has_levels else 0),)

    def class_outlet(self, spec: BlockSpec) -> nn.Module:
        """Return a linear layer from a block's output to class scores."""
        if spec.has_positions:
            return prediction_heads.per_position(spec)
        return head_networks.greedy(spec.output_shape, spec.classes)

    def head_input_shape(self, spec: BlockSpec) -> tuple[int, ...] | None:
        """Return the block's output shape; None in a last block without an outlet."""
        return None if spec.is_last else spec.output_shape

    # ---- training and prediction

    def routes(self, blocks: int, mode: ExecutionMode) -> tuple[Route, ...]:
        """Send nothing in training, and the state forward in prediction."""
        return forward_routes(blocks, STATE) if mode == "predict" else ()

    def make_message(self, route: Route, block: Block, micro_batch: MicroBatch | None) -> Tensor:
        """Return the state after the block's last step."""
        assert micro_batch is not None
        return micro_batch.received[STATE]

    def message_spec(self, route: Route, specs: Sequence[BlockSpec], rows: int) -> MessageSpec:
        """Return the shape (rows, chains, *P, d) of the states."""
        return (rows, self.chains, *self.code_shape(specs[0])), STATE_DTYPE

    def needs_samples(self, spec: BlockSpec, mode: ExecutionMode) -> bool:
        """True: every block reads the samples."""
        return True

    def make_input(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return samples, noisy codes and levels side by side (rows, numbers)."""
        if micro_batch.training:
            return self._side_by_side(block, micro_batch, *self.training_input(spec, micro_batch))
        if STATE not in micro_batch.received:
            names = [chain_noise("start", chain) for chain in range(self.chains)]
            states = [self.start(self.draw_noise(spec, micro_batch, name)) for name in names]
            micro_batch.received[STATE] = torch.stack(states, 1)
        state = self.prediction_input(spec, micro_batch.received[STATE][:, 0], 0)
        return self._side_by_side(block, micro_batch, *state)

    def predict(self, spec: BlockSpec, block: Block, micro_batch: MicroBatch) -> Tensor:
        """Return the class scores of this block, for several chains the logarithm of their mean
        probabilities; the next block gets the states."""
        ends = [
            self._run_chain(spec, block, micro_batch, state, chain)
            for chain, state in enumerate(micro_batch.received[STATE].unbind(1))
        ]
        micro_batch.received[STATE] = torch.stack([state for state, _ in ends], 1)
        if self.chains == 1:
            return ends[0][1]
        logs = [self.classes_last(spec, scores).log_softmax(-1) for _, scores in ends]
        return self.as_scores(spec, torch.stack(logs).logsumexp(0) - math.log(self.chains))

    def _run_chain(
        self, spec: BlockSpec, block: Block, micro_batch: MicroBatch, state: Tensor, chain: int
    ) -> tuple[Tensor, Tensor]:
        """Run the steps of one chain, the first of which has run for chain 0; return its state
        (rows, *P, d) and class scores."""
        scores = micro_batch.y
        for step in range(self.prediction_steps):
            if step or chain:
                read = self.prediction_input(spec, state, step)
                x = self._side_by_side(block, micro_batch, *read)
                micro_batch.y = block.forward(x, micro_batch.rng_key)
            state, scores = self.advance(spec, block, micro_batch, state, step, chain)
        return state, scores

    def _side_by_side(
        self, block: Block, micro_batch: MicroBatch, state: Tensor, level: Tensor | float
    ) -> Tensor:
        """Return the input (rows, numbers) of the inlet."""
        assert micro_batch.samples is not None
        inlet = next(iter(block.layers.values()))
        assert isinstance(inlet, Inlet)
        rows, dtype = len(state), inlet.dtype
        parts = [micro_batch.samples.reshape(rows, -1), state.reshape(rows, -1)]
        if self.has_levels:
            levels = torch.as_tensor(level, dtype=STATE_DTYPE, device=state.device)
            parts.append(embed_levels(levels.expand(rows)))
        return torch.cat([part.to(dtype) for part in parts], 1)


@final
class DenoiserHead(nn.Module):
    """The outlet of a block, and the classifier of the last state."""

    uses_rng = False

    def __init__(self, outlet: nn.Module | None, classifier: nn.Linear | None = None) -> None:
        super().__init__()
        self.outlet, self.classifier = outlet, classifier

    def forward(self, y: Tensor) -> Tensor:
        """Return what the outlet makes of a block's output (rows, ...)."""
        output: Tensor = y if self.outlet is None else self.outlet(y)
        return output


def chain_noise(name: str, chain: int) -> str:
    """Return the name of the noise of a chain."""
    return f"{name} {chain}" if chain else name


def outlet_of(block: Block, output: Tensor) -> Tensor:
    """Return what the outlet makes of a block's output; in a block without one the output."""
    if block.head is None:
        return output
    result: Tensor = block.head(output)
    return result
