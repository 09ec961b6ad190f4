"""One block: consecutive layers, the head that the objective adds, and one optimizer.

Invariant: a block knows nothing of ranks or messages. Received tensors are detached, so the loss of
one block changes no parameter of another.

::

        x (leaf)          y                      pairs = [(tensor, cotangent), ...]
    ----------> layers ------> heads.<block>  ------> backward ------> gradients, x.grad
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn, optim

from dtrain import eager_torch
from dtrain.block.micro_batch import MicroBatch
from dtrain.block.module_traits import may_skip_parameters, may_use_rng, works_in_place
from dtrain.block.optimizer import OptimizerFactory
from dtrain.block.parameters import BlockParameters
from dtrain.block.split_backward import SplitBackward
from dtrain.rng import seeded

BackwardPair = tuple[Tensor, Tensor]
"""A tensor and its cotangent, as in ``torch.autograd.backward(tensors, grad_tensors)``."""


DetachEvery = Literal["block", "layer"]


GradientHook = Callable[[Tensor], None]
"""Called with a parameter whose gradient is complete."""


OptimizerStep = Callable[[optim.Optimizer], None]
"""Takes an optimizer's step in its place."""


class Program(Protocol):
    """The calls of a block whose layers are no chain."""

    @property
    def main_input(self) -> str:
        """Name of the block's input."""

    @property
    def main_output(self) -> str:
        """Name of the block's output."""

    @property
    def data_inputs(self) -> Mapping[str, int]:
        """Names and positions of the inputs of the data that the block reads beside its main
        input."""

    @property
    def skip_outputs(self) -> tuple[str, ...]:
        """Names of the tensors that later blocks read beside the output of the block before."""

    def layer_of(self, call: str) -> str:
        """Return the name of the layer to which a call belongs."""

    def calls(self) -> dict[str, str]:
        """Return the calls of each layer as text, by its name."""

    def run(
        self,
        modules: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        context: Callable[[str], AbstractContextManager[None]],
        layer_outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run the block; return the outputs by name.

        `context` gives the context of a call, by name. `layer_outputs` receives the main output of
        every layer; the graph is then cut after every layer.
        """


class Reversible(Protocol):
    """A layer whose input follows from its output."""

    def inverse(self, output: Tensor) -> Tensor:
        """Return the input of which the layer makes `output`."""


class Block(BlockParameters):
    """Layers, head and optimizer of one block.

    Parameters
    ----------
    index : int
        Position among the run's blocks.
    layers : mapping of str to nn.Module
        The block's layers under their global names, in order.
    head : nn.Module or None
        The module that the objective adds; its parameters are named ``heads.<index>.*``.
    make_optimizer : callable
        Makes the block's optimizer from its parameters.
    seed : int
        The run's seed; together with a layer's name and `rng_key` it keys the layer's random
        numbers.
    detach_every : "block" or "layer"
        Where the graph is cut: after the block, or also after every layer.
    recompute : bool
        Keep only the input and output of a forward, and compute the rest again in the backward
        (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    keeps_forward : bool
        Whether a forward that is recomputed keeps its output, and its buffers; otherwise it keeps
        the input alone, and is recomputed with the buffers of that time.
    rebuilds_input : bool
        Whether not even the input is kept; see `rebuild_input`.
    model_ends : (bool, bool)
        Whether the block holds the first layer of the model, and the last.
    program : Program, optional
        The calls of the block, where its layers are no chain.
    first_copies : mapping of str to (str, str), optional
        As for `BlockParameters`.

    Attributes
    ----------
    rng_layers, inplace_layers : set of str
        Names of the layers that may use random numbers, and that work in place.
    may_skip_parameters : bool
        Whether some micro-batches may leave out parameters that others use.
    layer_outputs, taps : dict of str to Tensor
        Of the present forward; see `MicroBatch`.
    split_backward : SplitBackward or None
        Set where the schedule splits the backward.
    """

    def __init__(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        head: nn.Module | None,
        make_optimizer: OptimizerFactory,
        seed: int = 0,
        detach_every: DetachEvery = "block",
        recompute: bool = False,
        model_ends: tuple[bool, bool] = (False, False),
        program: Program | None = None,
        first_copies: Mapping[str, tuple[str, str]] | None = None,
        keeps_forward: bool = True,
        rebuilds_input: bool = False,
    ) -> None:
        self.index = index
        self.layers = dict(layers)
        self.head = head
        self.program = program
        roots = {**self.layers, **({} if head is None else {f"heads.{index}": head})}
        super().__init__(roots, make_optimizer, model_ends, first_copies)
        self.seed = seed
        self.detach_every = detach_every
        self.recompute = recompute
        self.keeps_forward = keeps_forward
        self.rebuilds_input = rebuilds_input
        self.rng_layers = {name for name, layer in self.layers.items() if may_use_rng(layer)}
        self.head_uses_rng = head is not None and may_use_rng(head)
        self.inplace_layers = {name for name, layer in self.layers.items() if works_in_place(layer)}
        self.may_skip_parameters = any(map(may_skip_parameters, roots.values()))
        self.layer_outputs: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.split_backward: SplitBackward | None = None

    def train(self, mode: bool = True) -> None:
        """Put every module into training mode, or into evaluation mode."""
        for module in self.roots.values():
            module.train(mode)

    def register_taps(self, names: Iterable[str]) -> None:
        """Record the outputs of the modules of these global names in `taps`, in every forward."""
        modules = self.modules()
        for name in names:
            modules[name].register_forward_hook(
                lambda _module, _args, output, name=name: self.taps.__setitem__(name, output)
            )

    def structure(self) -> dict[str, str]:
        """Return modules and calls of the layers as text, to compare two builds of a model."""
        texts = {name: repr(layer) for name, layer in self.layers.items() if name}
        if self.program is not None:
            calls = self.program.calls()
            texts |= {name: f"{texts.get(name, '')}\n{text}" for name, text in calls.items()}
        return {name: re.sub(" at 0x[0-9a-f]+", "", text) for name, text in texts.items()}

    # ---- forward and backward

    def forward(self, x: Tensor, rng_key: tuple[int, ...]) -> Tensor:
        """Run the layers in order on `x` (rows, ...); `rng_key` keys their random numbers."""
        if self.inplace_layers and (x.requires_grad or self.recompute):
            x = x.clone()  # a leaf, and an input that is needed again, must not be written to
        for name, layer in self.layers.items():
            if self.detach_every == "layer" and name in self.inplace_layers:
                x = x.clone()  # the backward of the layer before needs its output
            if name in self.rng_layers:
                with seeded(self.seed, name, *rng_key, device=x.device):
                    x = layer(x)
            else:
                x = layer(x)
            if self.detach_every == "layer":
                self.layer_outputs[name] = x
                x = x.detach()
        return x

    def head_rng(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Return a context in which the head's random numbers depend on this micro-batch."""
        if not self.head_uses_rng:
            return nullcontext()
        return seeded(
            self.seed, f"heads.{self.index}", *micro_batch.rng_key, device=micro_batch.x.device
        )

    def run_forward(self, micro_batch: MicroBatch, needs_graph: bool = True) -> MicroBatch:
        """Run the layers on `micro_batch.x`; set and return what the forward computes.

        With `needs_graph` autograd records it, unless the forward will be recomputed.
        """
        if self.recompute and self.keeps_forward:
            micro_batch.saved_buffers = self._copy_layer_buffers()
        with torch.set_grad_enabled(needs_graph and not self.recompute):
            self._run_layers(micro_batch)
        return micro_batch

    def recompute_forward(self, micro_batch: MicroBatch) -> None:
        """Compute a forward again, with its graph: the same bits, from the buffers of its time.

        A block that does not keep its forwards uses its present buffers. The buffers themselves
        (batch statistics) keep their present values.
        """
        if not self.keeps_forward:
            micro_batch.saved_buffers = self._copy_layer_buffers()
        buffers = self._swap_buffers(micro_batch.saved_buffers)
        self._run_layers(micro_batch)
        self._swap_buffers(buffers)

    def repeat_forward(self, micro_batch: MicroBatch) -> MicroBatch:
        """Run the layers once more on the same input, from the same buffers, with the same random
        numbers; return a new record. The buffers keep their present values."""
        again = copy(micro_batch)
        buffers = micro_batch.saved_buffers or self._copy_layer_buffers()
        previous = self._swap_buffers({name: data.clone() for name, data in buffers.items()})
        try:
            self._run_layers(again)
        finally:
            self._swap_buffers(previous)
        return again

    @torch.no_grad()
    def rebuild_input(self, output: Tensor, rng_key: tuple[int, ...]) -> Tensor:
        """Return the input (rows, ...) of which the layers, as they are now, make `output`.

        All layers are `Reversible`. The buffers keep their present values.
        """
        buffers = self._swap_buffers(self._copy_layer_buffers())
        for name, layer in reversed(self.layers.items()):
            uses_rng, device = name in self.rng_layers, output.device
            with seeded(self.seed, name, *rng_key, device=device) if uses_rng else nullcontext():
                output = cast(Reversible, layer).inverse(output)
        self._swap_buffers(buffers)
        return output

    def _run_layers(self, micro_batch: MicroBatch) -> None:
        self.layer_outputs, self.taps = {}, {}
        if self.program is None:
            micro_batch.y = self.forward(micro_batch.x, micro_batch.rng_key)
        else:
            self._run_program(self.program, micro_batch)
        micro_batch.layer_outputs, micro_batch.taps = self.layer_outputs, self.taps
        if self.split_backward is not None:
            micro_batch.leaf_calls = self.split_backward.pop_leaf_calls()

    def _run_program(self, program: Program, micro_batch: MicroBatch) -> None:
        """Run the calls of the block; set `y` and `skip_outputs`."""
        x, rng_key = micro_batch.x, micro_batch.rng_key
        inputs = {program.main_input: x, **micro_batch.skip_inputs}
        if program.data_inputs:
            assert micro_batch.samples is not None
            samples = (micro_batch.samples, *micro_batch.other_samples)
            inputs |= {name: samples[number] for name, number in program.data_inputs.items()}
        if self.inplace_layers:
            inputs = {
                name: tensor.clone() if tensor.requires_grad or self.recompute else tensor
                for name, tensor in inputs.items()
            }

        def context(name: str) -> AbstractContextManager[None]:
            if name in self.layers and name not in self.rng_layers:
                return nullcontext()
            return seeded(self.seed, name, *rng_key, device=x.device)

        layer_outputs = self.layer_outputs if self.detach_every == "layer" else None
        outputs = program.run(self.layers, inputs, context, layer_outputs)
        micro_batch.y = outputs[program.main_output]
        micro_batch.skip_outputs = {name: outputs[name] for name in program.skip_outputs}

    def _copy_layer_buffers(self) -> dict[str, Tensor]:
        """Return copies of the layers' buffers; those of the head do not change in a forward."""
        head = f"heads.{self.index}."
        return {
            name: buffer.clone()
            for name, buffer in self.buffers.items()
            if not name.startswith(head)
        }

    def _swap_buffers(self, replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give buffers the memory of `replacements`; return the memory that they had.

        Nothing is copied: autograd may have saved a buffer, and would raise if it was written to.
        """
        buffers = self.buffers
        previous = {name: buffers[name].data for name in replacements}
        for name, data in replacements.items():
            buffers[name].data = data
        return previous

    def backward(
        self, backward_pairs: Iterable[BackwardPair], gradient_hook: GradientHook | None = None
    ) -> None:
        """Add the gradients of ``sum <tensor, cotangent>`` to this block's parameters and to x.

        Does nothing where no tensor has a graph: the block has no parameters, and no gradient of
        its input is needed.

        Parameters
        ----------
        gradient_hook : callable, optional
            Called with each trained parameter in the graph, once its gradient is complete.
        """
        pairs = [pair for pair in backward_pairs if pair[0].requires_grad]
        if not pairs:
            return
        tensors, cotangents = zip(*pairs, strict=True)
        handles = []
        if gradient_hook is not None:
            handles = [
                parameter.register_post_accumulate_grad_hook(gradient_hook)  # type: ignore[no-untyped-call]
                for parameter in self.trainable_parameters
            ]
        try:
            eager_torch.backward(tensors, cotangents)
        finally:
            for handle in handles:
                handle.remove()

    # ---- updates

    def update(self, optimizer_step: OptimizerStep | None = None) -> None:
        """Take one step of the optimizer, or `optimizer_step` in its place; drop the gradients."""
        if self.optimizer is not None:
            if optimizer_step is None:
                self.optimizer.step()
            else:
                optimizer_step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)

    @property
    def caches_tensors(self) -> bool:
        """Whether the head keeps tensors from update to update."""
        return hasattr(self.head, "cached_tensors")

    def cached_tensors(self) -> list[Tensor]:
        """Return the tensors that the head keeps between updates, beside parameters and buffers."""
        return list(getattr(self.head, "cached_tensors", ()))
