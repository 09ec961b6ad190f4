"""One block: consecutive layers, the objective's helper modules, one optimizer.

Invariant: a block knows nothing of ranks or messages, and a loss of one block moves no parameter
of another, because what arrives is detached from what sent it.

::

        x (leaf)          y                      pulls = [(tensor, cotangent), ...]
    ----------> layers ------> heads.<block>  ------> backward ------> gradients, x.grad
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn, optim

from dtrain.block.micro_batch import MicroBatch
from dtrain.block.module_traits import may_use_rng, works_in_place
from dtrain.block.parameters import BlockParameters, OptimizerFactory
from dtrain.block.split_backward import SplitBackward
from dtrain.rng import seeded

BackwardPair = tuple[Tensor, Tensor]


DetachEvery = Literal["block", "layer"]


GradientHook = Callable[[Tensor], None]


OptimizerStep = Callable[[optim.Optimizer], None]


class Block(BlockParameters):
    """Layers, helpers and optimizer of one block.

    Parameters
    ----------
    index : int
        Position among the run's blocks.
    layers : mapping of str to nn.Module
        The block's layers under their global names, in order.
    helper : nn.Module or None
        What the objective adds; its parameters are named ``heads.<index>.*``.
    step : callable
        Makes the block's optimizer from its parameters.
    seed : int
        The run's seed; with a layer's name and the clock it keys the layer's random draws.
    grain : "block" or "layer"
        Where the graph is cut: after the block, or after every layer too.
    ends : (bool, bool)
        Whether it holds the first layer of the model, and the last.
    recompute : bool
        Keep only what enters and leaves; compute the rest again when it is learnt (Chen et al.
        2016, "Training Deep Nets with Sublinear Memory Cost").
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
    ) -> None:
        self.index, self.layers, self.head = index, dict(layers), head
        roots = {**self.layers, **({} if head is None else {f"heads.{index}": head})}
        super().__init__(roots, make_optimizer, model_ends)
        self.seed, self.detach_every, self.recompute = seed, detach_every, recompute
        self.rng_layers = {name for name, layer in self.layers.items() if may_use_rng(layer)}
        self.head_uses_rng = head is not None and may_use_rng(head)
        self.inplace_layers = {name for name, layer in self.layers.items() if works_in_place(layer)}
        self.layer_outputs: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.split_backward: SplitBackward | None = None

    def train(self, mode: bool = True) -> None:
        """Put every module into training mode, or into evaluation mode."""
        for module in self.roots.values():
            module.train(mode)

    def register_taps(self, names: Iterable[str]) -> None:
        """Keep in `taps`, in every forward, what the modules of these global names make."""
        modules = self.modules()
        for name in names:
            modules[name].register_forward_hook(
                lambda _module, _args, out, name=name: self.taps.__setitem__(name, out)
            )

    # ---- forward and learning

    def forward(self, x: Tensor, rng_key: tuple[int, ...]) -> Tensor:
        """Run the layers in order on `x` (rows, ...); `draw` keys the layers' random numbers."""
        if self.inplace_layers and (x.requires_grad or self.recompute):
            x = x.clone()  # neither a leaf nor what is needed again may be written to
        for name, layer in self.layers.items():
            if self.detach_every == "layer" and name in self.inplace_layers:
                x = x.clone()  # the layer before it learns from what it made
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
        """Return a context in which the helper's random numbers are those of this micro-batch."""
        if not self.head_uses_rng:
            return nullcontext()
        return seeded(
            self.seed, f"heads.{self.index}", *micro_batch.rng_key, device=micro_batch.x.device
        )

    def run_forward(self, micro_batch: MicroBatch, needs_graph: bool = True) -> MicroBatch:
        """Run the layers on `micro_batch.x`; set and return what the forward computes.

        With `needs_graph` autograd records it, unless the forward will be recomputed.
        """
        if self.recompute:
            micro_batch.saved_buffers = self._copy_layer_buffers()
        with torch.set_grad_enabled(needs_graph and not self.recompute):
            self._run_layers(micro_batch)
        return micro_batch

    def recompute_forward(self, micro_batch: MicroBatch) -> None:
        """Compute a forward again, with its graph: the same bits, from the buffers of its time.

        The buffers themselves (batch statistics) keep their present values.
        """
        buffers = self._swap_buffers(micro_batch.saved_buffers)
        self._run_layers(micro_batch)
        self._swap_buffers(buffers)

    def _run_layers(self, micro_batch: MicroBatch) -> None:
        self.layer_outputs, self.taps = {}, {}
        micro_batch.y = self.forward(micro_batch.x, micro_batch.rng_key)
        micro_batch.layer_outputs, micro_batch.taps = self.layer_outputs, self.taps
        if self.split_backward is not None:
            micro_batch.leaf_calls = self.split_backward.pop_leaf_calls()

    def _copy_layer_buffers(self) -> dict[str, Tensor]:
        """Return copies of the layers' buffers; the helper is not run in a forward."""
        helper = f"heads.{self.index}."
        own = self.buffers.items()
        return {name: buffer.clone() for name, buffer in own if not name.startswith(helper)}

    def _swap_buffers(self, replacements: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let buffers hold the memory of others; return what they held.

        Nothing is copied: autograd may have saved a buffer and would see that it was written to.
        """
        own = self.buffers
        held = {name: own[name].data for name in replacements}
        for name, data in replacements.items():
            own[name].data = data
        return held

    def backward(
        self, backward_pairs: Iterable[BackwardPair], gradient_hook: GradientHook | None = None
    ) -> None:
        """Add the gradients of ``sum <tensor, cotangent>`` to this block's parameters and to x.

        `heard` is called with each trained parameter that is reached, once its gradient is there.
        A block without parameters whose input nobody asks about has nothing to learn.
        """
        reached = [(tensor, force) for tensor, force in backward_pairs if tensor.requires_grad]
        if not reached:
            return
        tensors, forces = zip(*reached, strict=True)
        asked = self.trainable_parameters if gradient_hook is not None else []
        hooks = [each.register_post_accumulate_grad_hook(gradient_hook) for each in asked]  # type: ignore[no-untyped-call]
        try:
            torch.autograd.backward(tensors, forces)
        finally:
            for hook in hooks:
                hook.remove()

    # ---- updates

    def update(self, optimizer_step: OptimizerStep | None = None) -> None:
        """Take one optimizer step, by a `rule` where one is given; forget the gradients."""
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
        """Return what the helper keeps from update to update, beside parameters and buffers."""
        return list(getattr(self.head, "cached_tensors", ()))
