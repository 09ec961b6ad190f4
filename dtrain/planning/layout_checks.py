"""Refuse layouts that cannot run: cuts, places, schedules that do not fit model and objective."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.config.run import RunConfig
from dtrain.errors import ConfigError
from dtrain.models.shape_inference import LayerProfile
from dtrain.objectives.base import Objective
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.messages import reads_samples
from dtrain.planning.cut_choice import may_end_block
from dtrain.schedules.base import Schedule


def check_clip(run: RunConfig, schedule: Schedule) -> None:
    """Refuse a clip over the model where no action has the gradients of all blocks."""
    options = run.optimizer_options
    if options.clip and options.clip_over == "model" and not schedule.flushes:
        raise ConfigError(
            "optimizer.clip-over-schedule",
            f'[optimizer] clip-over = "model" needs the whole gradient before any update, and '
            f"'{run.schedule.name}' updates block by block: set clip-over = \"block\", or "
            'schedule.name = "1f1b" or "fill-drain"',
        )


def check_block_numbers(run: RunConfig, blocks: int) -> None:
    """Refuse keys that name a block which does not exist."""
    for key, numbers in run.partition.blocks_by_key().items():
        for block in numbers:
            if not 0 <= block < blocks:
                raise ConfigError(
                    "partition.unknown-block",
                    f"[partition] {key} names block {block}, but there are {blocks} "
                    f"(0 to {blocks - 1}): name one of those",
                )


def check_stages(run: RunConfig, ranks: int) -> None:
    if run.stages is None and run.partition.chosen_blocks is None:
        return
    stages, blocks = run.stages or ranks, run.partition.chosen_blocks
    if blocks is not None and blocks < stages:
        raise ConfigError(
            "partition.fewer-blocks-than-stages",
            f"{blocks} blocks cannot fill {stages} stages: set [mesh] stages = {blocks} or less, "
            f"or [partition] blocks = {stages} or more",
        )


def check_cuts(
    layer_specs: Sequence[LayerProfile], layers: Sequence[range], objective: Objective
) -> None:
    """Refuse a cut behind a layer whose output gives the objective nothing to learn from."""
    for indices in layers:
        spec = layer_specs[indices.stop - 1]
        if may_end_block(spec, objective) or (spec.writes and not spec.main_value):
            continue  # the second is refused with the flow of the blocks
        cure = "cut behind a layer that returns real numbers"
        if spec.dtype.is_complex:
            cure += ', or set objective.name = "backprop"'
        raise ConfigError(
            "partition.cut-not-real",
            f"layer '{spec.name}' returns {spec.dtype}, so no block can end there: {cure}",
        )


def check_outputs(layer_specs: Sequence[LayerProfile], data_spec: BlockSpec) -> None:
    """Refuse a model whose outputs are not real, or not those of the task: for class labels, one
    number per class."""
    last, classes, task = layer_specs[-1], data_spec.classes, data_spec.task
    if task.class_per_sample and last.output_shape != (classes,):
        raise ConfigError(
            "model.outputs-not-classes",
            f"layer '{last.name}' returns {last.output_shape} for a sample, but the data has "
            f"{classes} classes: end the model with {classes} outputs",
        )
    if not last.dtype.is_floating_point:
        raise ConfigError(
            "model.layer-not-real",
            f"layer '{last.name}' returns {last.dtype}: the model must return real numbers",
        )
    task.check_output(last.output_shape, last.dtype)


def check_in_place(layer_specs: Sequence[LayerProfile], layers: Sequence[range]) -> None:
    """Refuse a layer that overwrites a tensor of an earlier block that a later block reads, too.

    It would overwrite its block's copy alone.
    """
    owners = {
        value.node: block
        for block, indices in enumerate(layers)
        for index in indices
        for value in layer_specs[index].writes
    }
    for block, indices in enumerate(layers):
        later = {name for spec in layer_specs[indices.stop :] for name in spec.reads}
        for index in indices:
            spec = layer_specs[index]
            if any(owners.get(n, -1) != block and n in later for n in spec.overwrites):
                raise ConfigError(
                    "model.in-place-skip",
                    f"layer '{spec.name}' works in place on a tensor of an earlier block that a "
                    f"later block reads, too: set inplace=False, or cut elsewhere",
                )


def chain_error() -> ConfigError:
    """Return the error of a model whose layers cannot be replaced."""
    return ConfigError(
        "objective.needs-chain",
        "this objective replaces the layers of a block, which must then be a chain of modules: "
        "return an nn.Sequential, or choose another objective",
    )


def check_replay(run: RunConfig, specs: Sequence[BlockSpec]) -> None:
    """Refuse a replay of inputs without the samples that belong to them, or of rounded inputs."""
    objective = run.objective.instance
    if any(reads_samples(objective, spec, "train") for spec in specs[1:]):
        raise ConfigError(
            "schedule.replay-needs-samples",
            f"'{run.objective.name}' needs the samples in later blocks, and 'stream-replay' has "
            'only their activations there: set schedule.name = "stream"',
        )
    if run.partition.activation_compression != "exact":
        raise ConfigError(
            "schedule.replay-compressed",
            "'stream-replay' sends activations as they are: leave out [partition] "
            "activation-compression",
        )
