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
from typing import Any, Literal

import torch
from torch import Tensor, nn, optim

from dtrain.calm import may_draw, writes
from dtrain.live import Live
from dtrain.seeds import seeded
from dtrain.split import Split
from dtrain.weights import Step, Weights

Pull = tuple[Tensor, Tensor]
Grain = Literal["block", "layer"]
Heard = Callable[[Tensor], None]
Rule = Callable[[optim.Optimizer], None]


class Block(Weights):
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
        helper: nn.Module | None,
        step: Step,
        seed: int = 0,
        grain: Grain = "block",
        recompute: bool = False,
        ends: tuple[bool, bool] = (False, False),
    ) -> None:
        self.index, self.layers, self.helper = index, dict(layers), helper
        roots = {**self.layers, **({} if helper is None else {f"heads.{index}": helper})}
        super().__init__(roots, step, ends)
        self.seed, self.grain, self.recompute = seed, grain, recompute
        self.drawing = {name for name, layer in self.layers.items() if may_draw(layer)}
        self.helps = helper is not None and may_draw(helper)
        self.writing = {name for name, layer in self.layers.items() if writes(layer)}
        self.outs: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.split: Split | None = None

    def train(self, mode: bool = True) -> None:
        """Put every module into training mode, or into evaluation mode."""
        for module in self.roots.values():
            module.train(mode)

    def tap(self, names: Iterable[str]) -> None:
        """Keep in `taps`, in every forward, what the modules of these global names make."""
        modules = self.modules()
        for name in names:
            modules[name].register_forward_hook(
                lambda _module, _args, out, name=name: self.taps.__setitem__(name, out)
            )

    # ---- forward and learning

    def owned(self, x: Tensor, sample: Tensor | None) -> Tensor:
        """Return x, in memory of its own where a layer may write to the sample that others read."""
        return x.clone() if self.writing and sample is not None else x

    def forward(self, x: Tensor, draw: tuple[int, ...]) -> Tensor:
        """Run the layers in order on `x` (rows, ...); `draw` keys the layers' random numbers."""
        if self.writing and (x.requires_grad or self.recompute):
            x = x.clone()  # neither a leaf nor what is needed again may be written to
        for name, layer in self.layers.items():
            if self.grain == "layer" and name in self.writing:
                x = x.clone()  # the layer before it learns from what it made
            if name in self.drawing:
                with seeded(self.seed, name, *draw, device=x.device):
                    x = layer(x)
            else:
                x = layer(x)
            if self.grain == "layer":
                self.outs[name] = x
                x = x.detach()
        return x

    def helping(self, live: Live) -> AbstractContextManager[None]:
        """Return a context in which the helper's random numbers are those of this micro-batch."""
        if not self.helps:
            return nullcontext()
        return seeded(self.seed, f"heads.{self.index}", *live.draw, device=live.x.device)

    def run(self, x: Tensor, draw: tuple[int, ...], traced: bool) -> dict[str, Any]:
        """Run a forward and return what a `Live` keeps of it, with a graph where `traced`."""
        before = self._copies() if self.recompute else {}
        self.outs, self.taps = {}, {}
        with torch.set_grad_enabled(traced and not self.recompute):
            y = self.forward(x, draw)
        calls = self.split.taken() if self.split else []
        kept = {"outs": self.outs, "taps": self.taps, "calls": calls}
        return {"x": x, "y": y, "draw": draw, "buffers": before, **kept}

    def recall(self, live: Live) -> None:
        """Compute again what was not kept: the same bits, from the buffers of that moment.

        The buffers themselves (batch statistics) stay what they are now.
        """
        now = self._hold(live.buffers)
        self.outs, self.taps = {}, {}
        live.y = self.forward(live.x, live.draw)
        live.outs, live.taps = self.outs, self.taps
        live.calls = self.split.taken() if self.split else []
        self._hold(now)

    def _copies(self) -> dict[str, Tensor]:
        """Return copies of the layers' buffers; the helper is not run in a forward."""
        helper = f"heads.{self.index}."
        own = self.buffers.items()
        return {name: buffer.clone() for name, buffer in own if not name.startswith(helper)}

    def _hold(self, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let buffers hold the memory of others; return what they held.

        Nothing is copied: autograd may have saved a buffer and would see that it was written to.
        """
        own = self.buffers
        held = {name: own[name].data for name in others}
        for name, data in others.items():
            own[name].data = data
        return held

    def learn(self, pulls: Iterable[Pull], heard: Heard | None = None) -> None:
        """Add the gradients of ``sum <tensor, cotangent>`` to this block's parameters and to x.

        `heard` is called with each trained parameter that is reached, once its gradient is there.
        A block without parameters whose input nobody asks about has nothing to learn.
        """
        reached = [(tensor, force) for tensor, force in pulls if tensor.requires_grad]
        if not reached:
            return
        tensors, forces = zip(*reached, strict=True)
        asked = self.trained if heard is not None else []
        hooks = [each.register_post_accumulate_grad_hook(heard) for each in asked]  # type: ignore[no-untyped-call]
        try:
            torch.autograd.backward(tensors, forces)
        finally:
            for hook in hooks:
                hook.remove()

    # ---- updates

    def update(self, rule: Rule | None = None) -> None:
        """Take one optimizer step, by a `rule` where one is given; forget the gradients."""
        if self.optimizer is not None:
            if rule is None:
                self.optimizer.step()
            else:
                rule(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)

    def kept(self) -> list[Tensor]:
        """Return what the helper keeps from update to update, beside parameters and buffers."""
        return list(getattr(self.helper, "kept", ()))
