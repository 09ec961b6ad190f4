"""The plan of a run: a run file with its data, layout and a proof that its schedule ends.

Invariant: every rank makes the same plan without a message.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from dtrain.config.run import RunConfig
from dtrain.data import augment as augments
from dtrain.data import load_data
from dtrain.data.conversion import cast_dtype
from dtrain.data.dataset import Dataset, DatasetSplits
from dtrain.data.sample_weights import check_sampler, count_classes, make_draws
from dtrain.data.sampler import (
    BatchSplitter,
    DrawWeights,
    Indices,
    epoch_order,
    updates_per_epoch,
)
from dtrain.data.shuffle_windows import shuffle_window
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.models.integer_inputs import takes_integers
from dtrain.models.layers import LayerStack
from dtrain.models.output_spec import OutputSpec
from dtrain.models.pretrained import check_pretrained
from dtrain.objectives.block_spec import BlockSpec
from dtrain.planning.graph_checks import check_graph
from dtrain.planning.initial_weights import open_weights
from dtrain.planning.layout import DTYPES, Layout, make_layout
from dtrain.schedules.segments import TrainingLength
from dtrain.schedules.verify import PlanError, ScheduleReport
from dtrain.tasks.task import Task
from dtrain.user_code import find_value, require_object, value_text

PROOF_UPDATES = 8
"""Updates at an epoch's start that the proof and the drawing contain."""


@dataclass(frozen=True)
class Plan:
    """A run that fits its data and its ranks.

    Attributes
    ----------
    run : RunConfig
        The run file, with the numbers of blocks and stages filled in.
    proof : ScheduleReport
        Timeline, live micro-batches, staleness and bubble of the proven schedule.
    blocks_assumed : bool
        Whether the number of blocks was taken from the number of stages.
    """

    run: RunConfig
    data: DatasetSplits
    layout: Layout
    training_length: TrainingLength
    batch_splitter: BatchSplitter
    proof: ScheduleReport
    blocks_assumed: bool

    @cached_property
    def draws(self) -> DrawWeights | None:
        """How often training samples are drawn in an epoch, computed on first need; None: once."""
        sampler, task = self.run.data.sampler, self.run.task
        if not isinstance(sampler, str) or ":" in sampler:
            sampler = find_value(sampler, self.run.folder, "sampler")
        return make_draws(sampler, self.data.train, task)

    def epoch_order(self, epoch: int) -> Indices:
        """Return the training samples of an epoch, (n,), in their order."""
        seed, shuffle, train = self.run.settings.seed, self.run.data.shuffle, self.data.train
        window = shuffle_window(train.stored_pieces)
        return epoch_order(train.size, seed, epoch, shuffle, *window, draws=self.draws)


def make_plan(run: RunConfig, ranks: int) -> Plan:
    """Load the data's description and the model, lay `run` out on `ranks` ranks and prove that its
    schedule ends.

    Raises
    ------
    DtrainError
        Data, model, mesh, partition or schedule do not fit each other.
    """
    samples, model, data_spec = load_run(run)
    train = samples.train
    layout = make_layout(run, model, data_spec, ranks)
    check_graph(run, samples, layout.mesh.replicas)
    settings = run.settings
    length = TrainingLength.from_settings(
        updates_per_epoch(train.size, settings.batch_size),
        settings.epochs,
        settings.updates,
        settings.segment,
        run.checkpoint.every,
        run.evaluate.every_updates,
    )
    splitter = _split_batches(run, layout, train.size)
    return Plan(
        run=_resolve(run, layout),
        data=samples,
        layout=layout,
        training_length=length,
        batch_splitter=splitter,
        proof=_prove(run, layout, _proof_sizes(splitter, train.size, length.updates_per_epoch)),
        blocks_assumed=run.partition.chosen_blocks is None,
    )


def load_run(run: RunConfig) -> tuple[DatasetSplits, LayerStack, BlockSpec]:
    """Load the data's description and the model; return them, and the facts of the data that all
    block specs share."""
    for choice, kind in ((run.dataset, "data"), (run.model, "model")):
        require_object(choice.target, choice.name, choice.fingerprint, kind)
    samples = load_data(
        run.dataset.name,
        run.dataset.fields,
        run.folder,
        normalise=run.data.normalise,
        channels=run.data.channels,
        task=run.task,
        validation=run.data.validation,
        labels=run.data.labels,
        seed=run.settings.seed,
        target=run.dataset.target,
    )
    train = samples.train
    is_weighted = train.sample_weights is not None
    task = run.task.bind(train.target_shape, train.target_dtype, train.classes, is_weighted)
    if task.balances_classes:
        task = task.balance_classes(count_classes(train, task).tolist())
    _check_objective(run, task)
    _check_augment(run, train, task)
    check_sampler(run.data.sampler, train, task)
    model, data_spec = _load_model(run, train, task)
    return samples.as_integers() if data_spec.integer_samples else samples, model, data_spec


def _load_model(run: RunConfig, train: Dataset, task: Task) -> tuple[LayerStack, BlockSpec]:
    """Return the model, and the facts of the data that all block specs share."""
    outputs = task.outputs_per_value * train.classes
    input_shape = run.objective.instance.model_input_shape(train.shape, outputs)
    model = load_model(
        run.model.name,
        run.model.fields,
        run.folder,
        input_shape,
        outputs,
        inputs=1 + len(train.other_inputs),
        open_names=run.open_modules(),
        target=run.model.target,
        graph=train.graph,
        output=_output_spec(task, outputs),
    )
    for name in run.model_options.open:
        if not any(layer.startswith(f"{name}.") for layer in model.names):
            raise ConfigError(
                "model.open-unknown",
                f"[model] open: no layer is inside '{name}'; the layers are "
                f"{', '.join(model.names)}: name a container of your module, or leave it out",
            )
    if run.weights_path is not None:
        check_pretrained(open_weights(run.weights_path), model, run.model_options.strict)
    dtype = DTYPES[run.settings.dtype]
    others = tuple((spec.shape, cast_dtype(spec.dtype, dtype)) for spec in train.other_inputs)
    integers = takes_integers(model, input_shape, train.input_dtype, others)
    has_raw_samples = train.value_range is not None and not integers
    data_spec = BlockSpec.from_data(train.shape, outputs, train.size, has_raw_samples, task)
    return model, dataclasses.replace(
        data_spec,
        other_inputs=others,
        integer_samples=integers,
        complex_samples=train.input_dtype.is_complex,
        graph_nodes=0 if train.graph is None else train.graph.nodes,
    )


def _output_spec(task: Task, outputs: int) -> OutputSpec:
    """Return the output that a task needs of a model, for one sample."""
    shape = task.expected_output_shape()
    if shape is None:  # a user's loss
        shape = (outputs,) if task.has_classes else task.target_spec.shape
    if not task.has_classes or not task.has_positions or len(shape) < 2:
        return OutputSpec(shape)
    return OutputSpec(shape, -1 if task.classes_last else 0)


def _check_augment(run: RunConfig, train: Dataset, task: Task) -> None:
    """Refuse an augmentation that does not fit the samples or the task."""
    augment = augments.build_augment(run.data.augment, run.settings.seed)
    if augment is None:
        return
    if task.target == "input":
        raise ConfigError(
            "task.input-target-augmented",
            '[task] target = "input" is the input before augment = '
            f'"{value_text(run.data.augment)}", not what the model sees: set augment = "none"',
        )
    augment.check_shape(train.shape)


def _check_objective(run: RunConfig, task: Task) -> None:
    """Refuse an objective that cannot learn the task."""
    reason = run.objective.instance.serves(task)
    if reason is not None:
        raise ConfigError(
            "task.objective-needs-classes",
            f"[objective] '{run.objective.name}' {reason}, but [task] loss = \"{task.loss_name}\" "
            f"has targets of shape {task.target_spec.shape} that are {task.kind}: set "
            '[objective] name = "backprop" or "local-head"',
        )
    if run.weights_path is not None and run.objective.instance.needs_block_layers:
        raise ConfigError(
            "objective.weights-replaced",
            f"[objective] '{run.objective.name}' gives every block layers of its own, for which "
            f"{run.weights_path.name} has no weights: leave out [model] weights",
        )
    if task.target_spec.weighted and not run.objective.instance.takes_sample_weights():
        raise ConfigError(
            "data.weights-objective",
            f"[objective] '{run.objective.name}' has a loss of its own that counts all samples "
            'alike, but the data have sample weights: set [objective] name = "backprop" or '
            '"local-head", or leave out the weights',
        )


def _split_batches(run: RunConfig, layout: Layout, samples: int) -> BatchSplitter:
    """Return the splitter of batches; refuse a last batch that is too small for its layers."""
    settings, coupling_layers = run.settings, layout.coupling_layers
    batch_size = settings.batch_size
    min_rows = 2 if coupling_layers else 1
    mesh = layout.mesh
    splitter = BatchSplitter(
        batch_size, mesh.replicas, settings.micro_batches, min_rows, mesh.shares
    )
    last_batch = (samples - 1) % batch_size + 1
    if last_batch < splitter.min_rows:
        raise ConfigError(
            "data.last-batch-too-small",
            f"the last update of an epoch has 1 of {samples} samples, too few for the batch "
            f"statistics of layer '{coupling_layers[0]}': set batch-size = {batch_size + 1} or "
            f"{max(batch_size - 1, 2)}",
        )
    return splitter


def _resolve(run: RunConfig, layout: Layout) -> RunConfig:
    """Return the run with the numbers of blocks and stages, and the cuts that a function chose.

    So a resumed run has these cuts, whether the function still returns them or not.
    """
    if run.partition.cut_function is not None:
        run = run.with_cuts([layout.layer_specs[index].name for index in layout.cuts])
    return run.resolve(len(layout.block_layouts), layout.mesh.stages)


def _prove(run: RunConfig, layout: Layout, sizes: list[list[int]]) -> ScheduleReport:
    """Prove that the schedule ends; refuse places of the run file for which it does not."""
    try:
        return layout.prove(sizes)
    except PlanError as error:
        if run.partition.places is None:
            raise
        raise ConfigError(
            "schedule.places-deadlock",
            f"[schedule] '{run.schedule.name}' cannot run places = {list(layout.place)} "
            f'({error}): leave out places, or set schedule.name = "drained"',
        ) from error


def _proof_sizes(splitter: BatchSplitter, samples: int, updates: int) -> list[list[int]]:
    """Return ``[replica][update]`` micro-batches of an epoch's first updates and its last."""
    first = splitter.count_micro_batches(samples, 0, min(updates, PROOF_UPDATES))
    last = splitter.count_micro_batches(samples, max(updates - 1, 0), updates)
    return [start + end for start, end in zip(first, last, strict=True)]
