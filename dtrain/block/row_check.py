"""Facts about a block's layers that are found by running them once on two samples.

A run reports them at its start: a layer in which the output of a sample depends on the other
samples, a layer that keeps a tensor from one call to the next, and a layer that draws random
numbers. With any of these, one micro-batch is not four.

Invariant: the layers themselves are not run, and random states are as before.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtrain.block.block import Block
from dtrain.block.micro_batch import MicroBatch
from dtrain.rng import fixed_random_numbers, generator_states

CallContext = Callable[[str], AbstractContextManager[None]]
"""Returns the context of a call, given its name."""


ROWS = 2


TOLERANCE = 1e-3
"""Relative difference that rounding may cause; the effect of another sample is far above it."""


@final
@dataclass(frozen=True)
class RowCheck:
    """Findings about the layers of one block, by name.

    Attributes
    ----------
    coupled : tuple of str
        The first layer in which a sample's output depends on the other samples, if any.
    stateful : tuple of str
        Layers that keep a tensor between calls, outside parameters and buffers, or whose buffers
        change in training, batch statistics apart.
    random : tuple of str
        Layers with dropout, or that draw random numbers in training in another way.
    """

    coupled: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    random: tuple[str, ...] = ()


def check_rows(block: Block, micro_batch: MicroBatch) -> RowCheck:
    """Run copies of a block's layers on a micro-batch of two samples and return what it shows.

    Parameters
    ----------
    micro_batch : MicroBatch
        With `x`, and the skip inputs and samples that the layers read. Layers that cannot be
        copied, or cannot run on it, have no findings.
    """
    originals = block.layers
    names = list(originals)
    dropout = [name for name in names if any(map(_drops, originals[name].modules()))]
    try:
        block.layers = copy.deepcopy(originals)
        with torch.no_grad(), fixed_random_numbers(0):
            _set_training(block, False)
            both, random = _outputs(block, micro_batch)
            alone = [_outputs(block, _one_row(micro_batch, row))[0] for row in range(ROWS)]
            before = {name: _buffers(layer) for name, layer in block.layers.items()}
            _set_training(block, True)
            _, random_in_training = _outputs(block, micro_batch)
            stateful = [n for n in names if _keeps_state(block.layers[n], before[n])]
    except Exception:  # of any kind; training raises it again
        return RowCheck(random=tuple(dropout))
    finally:
        block.layers = originals
    coupled: list[str] = []
    for name in both:
        if name in stateful or name in random:  # nothing that follows can be compared
            break
        if any(_differs(both[name], alone[row].get(name), row) for row in range(ROWS)):
            coupled = [name]
            break
    drawing = dict.fromkeys([*dropout, *random_in_training])
    return RowCheck(tuple(coupled), tuple(stateful), tuple(drawing))


def _set_training(block: Block, training: bool) -> None:
    for layer in block.layers.values():
        layer.train(training)


def _outputs(block: Block, micro_batch: MicroBatch) -> tuple[dict[str, list[Tensor]], list[str]]:
    """Return the tensors that every layer returns, in the order of the calls, and the layers that
    draw random numbers."""
    outputs: dict[str, list[Tensor]] = {}
    random: dict[str, None] = {}
    with _recorded(block.layers, outputs, random), _watched(block, random):
        block.run_forward(_copy(micro_batch), needs_graph=False)
    return outputs, list(random)


@contextmanager
def _recorded(
    layers: Mapping[str, nn.Module], outputs: dict[str, list[Tensor]], random: dict[str, None]
) -> Iterator[None]:
    """Record the first output of every layer, and which layers draw random numbers."""
    states: dict[str, object] = {}

    def note_state(name: str) -> None:
        states[name] = generator_states()

    def record(name: str, output: Any) -> None:
        if generator_states() != states[name]:
            random[name] = None
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        outputs.setdefault(name, tensors)

    handles = []
    for name, layer in layers.items():
        handles += [
            layer.register_forward_pre_hook(lambda _m, _a, name=name: note_state(name)),
            layer.register_forward_hook(lambda _m, _a, output, name=name: record(name, output)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(block: Block, random: dict[str, None]) -> Iterator[None]:
    """Record which layers draw random numbers between the calls of their modules."""
    program = block.program
    if program is None:
        yield
        return

    @contextmanager
    def watch(context: CallContext, name: str) -> Iterator[None]:
        with context(name):
            before = generator_states()
            yield
            if generator_states() != before:
                random[program.layer_of(name)] = None

    def run(
        modules: Mapping[str, nn.Module],
        inputs: Mapping[str, Tensor],
        context: CallContext,
        layer_outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        return original(modules, inputs, partial(watch, context), layer_outputs)

    original = program.run
    program.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        del program.run


def _differs(both: list[Tensor], alone: list[Tensor] | None, row: int) -> bool:
    """Return whether the output of a sample is another one without the other sample."""
    for pair, single in zip(both, alone or [], strict=False):
        rows_first = len(pair) == ROWS and len(single) == 1 and pair.shape[1:] == single.shape[1:]
        if not (rows_first and (pair.is_floating_point() or pair.is_complex())):
            continue
        scale = float(single.abs().max()) if single.numel() else 0.0
        if not math.isfinite(scale):  # training reports the cause
            continue
        if not torch.allclose(pair[row : row + 1], single, rtol=TOLERANCE, atol=TOLERANCE * scale):
            return True
    return False


def _buffers(layer: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers that are no batch statistics."""
    statistics = nn.modules.batchnorm._NormBase
    return {
        f"{path}.{name}": buffer.clone()
        for path, module in layer.named_modules()
        if not isinstance(module, statistics)
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def _keeps_state(layer: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Return whether a training forward changed a buffer, or a module holds a tensor that is
    neither parameter nor buffer."""
    if any(not torch.equal(buffer, before[name]) for name, buffer in _buffers(layer).items()):
        return True
    registered = {id(t) for t in [*layer.parameters(), *layer.buffers()]}
    return any(
        isinstance(leaf, Tensor) and id(leaf) not in registered
        for module in layer.modules()
        for name, value in vars(module).items()
        if not name.startswith(("_parameters", "_buffers", "_modules"))
        for leaf in pytree.tree_leaves(value)
    )


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _copy(micro_batch: MicroBatch) -> MicroBatch:
    return MicroBatch(
        x=micro_batch.x.clone(),
        skip_inputs={name: tensor.clone() for name, tensor in micro_batch.skip_inputs.items()},
        samples=micro_batch.samples,
        other_samples=micro_batch.other_samples,
        rng_key=(0, 0, 0),
    )


def _one_row(micro_batch: MicroBatch, row: int) -> MicroBatch:
    rows = len(micro_batch.x)

    def one(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1] if len(tensor) == rows else tensor

    samples = micro_batch.samples
    return MicroBatch(
        x=one(micro_batch.x),
        skip_inputs={name: one(tensor) for name, tensor in micro_batch.skip_inputs.items()},
        samples=None if samples is None else one(samples),
        other_samples=tuple(map(one, micro_batch.other_samples)),
        rng_key=(0, 0, 0),
    )
