"""The cuts of a run: those of the run file, those of a user's function, or balanced ones.

Invariant: cuts depend on the run, the model and the shape of the data; without `blocks` on the
number of stages, too. They never depend on the rank.
"""

from __future__ import annotations

from collections.abc import Callable

from dtrain import partition
from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.models.shape_inference import LayerProfile
from dtrain.object_names import object_name
from dtrain.objectives.base import Objective
from dtrain.planning.block_costs import BlockCosts
from dtrain.planning.layer_list import describe_layers
from dtrain.planning.memory_costs import MemoryCosts
from dtrain.user_code import import_object


def choose_cuts(run: RunConfig, block_costs: BlockCosts, stages: int) -> tuple[int, ...]:
    """Return the layers at which blocks 1, 2, ... start.

    Raises
    ------
    ConfigError
        The cuts of the run file or of the function are impossible, or `balance = "time"` was not
        measured yet.
    """
    section, layers = run.partition, len(block_costs.layer_specs)
    if section.explicit_cuts is not None:
        names = [profile.name for profile in block_costs.layer_specs]
        return partition.cuts_from_names(names, section.explicit_cuts)
    blocks = section.chosen_blocks or stages
    if section.cut_function is not None:
        return _call_cut_function(run, block_costs, blocks)
    costs: dict[str, Callable[[], Callable[[int, int], int]]] = {
        "flops": lambda: block_costs.flops,
        "parameters": lambda: block_costs.parameters,
        "layers": lambda: lambda i, j: j - i,
        "memory": lambda: MemoryCosts(run, block_costs),
    }
    if section.balance not in costs:
        raise ConfigError(
            "partition.time-not-measured",
            '[partition] balance = "time" needs a measurement, which `dtrain train` and '
            '`dtrain plan` make: use one of them, or set balance = "flops", or cuts',
        )
    ends = [may_end_block(layer, block_costs.objective) for layer in block_costs.layer_specs]
    cost = costs[section.balance]()
    return partition.balanced_cuts(layers, blocks, cost, section.weights, ends)


def may_end_block(spec: LayerProfile, objective: Objective) -> bool:
    """Return whether a cut may stand behind a layer: it has an output that can be learnt from."""
    if spec.writes and not spec.main_value:
        return False
    return spec.dtype.is_floating_point or (
        spec.dtype.is_complex and objective.takes_complex_outputs
    )


def _call_cut_function(run: RunConfig, block_costs: BlockCosts, blocks: int) -> tuple[int, ...]:
    """Return the cuts that a user's function chooses."""
    function, names = run.partition.cut_function, [p.name for p in block_costs.layer_specs]
    if isinstance(function, str):
        if ":" not in function:
            raise ConfigError(
                "partition.cuts-text",
                f'[partition] cuts = "{function}" is a text: give a list, cuts = ["{function}"], '
                'or a function, cuts = "module:function"',
            )
        function = import_object(function, run.folder, "cuts")
    assert function is not None
    name = object_name(function)
    result = function(describe_layers(block_costs.layer_specs, block_costs.model), blocks)
    if hasattr(result, "tolist"):  # an array of numpy or torch
        result = result.tolist()
    if not isinstance(result, list | tuple) or not all(map(_is_cut, result)):
        raise ConfigError(
            "partition.function-result",
            f"[partition] cuts: {name} returned {result!r}: return a list of layer names or "
            "numbers, at which blocks 1, 2, ... start",
        )
    if len(result) != blocks - 1:
        raise ConfigError(
            "partition.function-count",
            f"[partition] cuts: {name} returned {len(result)} cuts for {blocks} blocks: return "
            f"{blocks - 1}, one for every block but the first",
        )
    try:
        return partition.cuts_from_names(names, result)
    except ConfigError as error:
        raise error.with_prefix(name) from error


def _is_cut(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
