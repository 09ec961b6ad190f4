"""Cuts that balance seconds: each layer is run on this device, forward and backward, and timed.

Invariant: a measurement differs from machine to machine and from run to run, so it is made once,
by one rank, before the plan. Its result is a run with explicit cuts, which all ranks and all later
starts of the run use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtrain import partition
from dtrain.block.device import select_device
from dtrain.config.run import RunConfig
from dtrain.models.graph import GraphLayer, ModelGraph, chain_graph, has_gradient
from dtrain.models.layers import merge_layers
from dtrain.models.shape_inference import free_tensors, no_context
from dtrain.planning.block_costs import BlockCosts, total_macs
from dtrain.planning.layout import make_block_costs
from dtrain.planning.plan import load_run
from dtrain.rng import fixed_random_numbers

WARMUPS, REPEATS = 1, 3
"""Runs of a layer that are not timed, and runs of which the fastest counts."""

MIN_ROWS = 2
"""Rows that batch statistics need."""


def measure_cuts(run: RunConfig, ranks: int) -> list[str]:
    """Return the names of the layers at which blocks 1, 2, ... of equal seconds start.

    A local head is not run: its seconds are its multiply-adds at the rate of the layers.

    Parameters
    ----------
    ranks : int
        Ranks of the run: they decide the rows of a micro-batch, and the number of blocks where the
        run says none.

    Raises
    ------
    DtrainError
        Data, model and partition do not fit each other.
    """
    data, model, data_spec = load_run(run)
    block_costs = make_block_costs(run, model, data_spec)
    stages = run.stages or ranks
    replicas = max(1, ranks // stages)
    samples = min(run.settings.batch_size, data.train.size)
    rows = max(MIN_ROWS, -(-samples // (replicas * run.settings.micro_batches)))
    seconds = layer_seconds(run, block_costs, rows)
    profiles = block_costs.layer_specs
    cuts = partition.balanced_cuts(
        len(profiles),
        run.partition.chosen_blocks or stages,
        _range_cost(seconds, block_costs),
        run.partition.weights,
    )
    return [profiles[index].name for index in cuts]


def _range_cost(seconds: Sequence[float], block_costs: BlockCosts) -> Callable[[int, int], float]:
    """Return the seconds of a block of layers i .. j-1, its head included."""
    sums = [0.0, *accumulate(seconds)]
    macs = sum(map(total_macs, block_costs.layer_specs))
    seconds_per_mac = sums[-1] / macs if macs else 0.0

    def cost(i: int, j: int) -> float:
        spec, head = block_costs.provisional_head(j)
        passes = block_costs.objective.forward_passes(spec)
        return (sums[j] - sums[i]) * passes + total_macs(head) * seconds_per_mac

    return cost


def layer_seconds(run: RunConfig, block_costs: BlockCosts, rows: int) -> list[float]:
    """Return the seconds of forward and backward of every layer for `rows` samples."""
    device = select_device(run.settings.device, 0, "this host")
    dtype: torch.dtype = getattr(torch, run.settings.dtype)
    model, data_spec = block_costs.model, block_costs.data_spec
    graph = model.graph or chain_graph(model.names)
    first_dtype = data_spec.sample_dtype(dtype)
    shape = block_costs.layer_specs[0].input_shape
    inputs = [(shape, first_dtype), *data_spec.other_inputs]
    with fixed_random_numbers(0), torch.enable_grad():
        layers = model.build_each(range(len(model.names)), run.settings.seed, dtype)
        modules = {name: module.to(device) for name, module in merge_layers(layers).items()}
        values: dict[str, Any] = dict(graph.defaults) | {
            name: _random(rows, shape, dtype).to(device)
            for name, (shape, dtype) in zip(graph.inputs, inputs, strict=False)
        }
        return [_time_layer(graph, layer, modules, values, device) for layer in graph.layers]


def _random(rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return samples of random numbers; zeros where they are integers, of unknown range."""
    make = torch.randn if has_gradient(dtype) else torch.zeros
    return make(rows, *shape, dtype=dtype)


def _time_layer(
    graph: ModelGraph,
    layer: GraphLayer,
    modules: Mapping[str, nn.Module],
    values: dict[str, Any],
    device: torch.device,
) -> float:
    """Time a layer on what earlier layers wrote into `values`, and add what it writes itself."""
    tensors = free_tensors(modules)
    seconds = []
    for _ in range(WARMUPS + REPEATS):
        env = {name: pytree.tree_map(_detach, values[name]) for name in layer.reads}
        leaves = [t for t in pytree.tree_leaves(env) if isinstance(t, Tensor) and t.requires_grad]
        copies = pytree.tree_map(_as_interior, env)
        weights = {id(p): p for path in layer.modules for p in modules[path].parameters()}
        weights |= {id(tensors[n]): tensors[n] for n in layer.tensors}  # type: ignore[misc]
        targets = [t for t in (*leaves, *weights.values()) if t.requires_grad]
        _wait(device)
        start = time.perf_counter()
        graph.run(layer.nodes, modules, tensors, copies, layer.writes, no_context)
        written = {name: copies[name] for name in layer.writes}
        outputs = [t for t in pytree.tree_leaves(written) if _has_gradient(t)]
        if outputs and targets:
            ones = [torch.ones_like(t) for t in outputs]
            torch.autograd.grad(outputs, targets, ones, allow_unused=True)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    values |= {name: pytree.tree_map(_detach, value) for name, value in written.items()}
    return min(seconds[WARMUPS:])


def _detach(leaf: object) -> object:
    """Return a tensor as a new leaf of autograd, and anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.is_floating_point())


def _as_interior(leaf: object) -> object:
    """Return a copy of a leaf, on which a layer may work in place."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _has_gradient(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _wait(device: torch.device) -> None:
    """Wait until an accelerator has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
