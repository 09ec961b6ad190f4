"""ModelGraph: the calls of a model's forward, grouped into layers; made by `torch.fx`.

A layer is the call of a sub-module together with the operations between it and the next call. A cut
may stand before any layer. Values of earlier layers that a layer reads cross the cuts between::

    def forward(self, x):
        a = self.down(x)                        layer    calls       reads
        b = self.mid(a)                         down     down        x
        u = self.up(b)                          mid      mid         a
        return self.out(torch.cat([a, u], 1))   up       up, cat     a, b
                                                out      out         cat

Invariant: running all layers in order computes what the user's `forward` computes, bit for bit.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dtrain.errors import ConfigError

CallContext = Callable[[str], AbstractContextManager[None]]
"""Returns the context in which a call runs, given its name: that of its random numbers."""


RANDOM_FUNCTIONS = frozenset(
    {
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "bernoulli"),
        *("feature_dropout", "rand", "randn", "rand_like", "randn_like", "randint", "randperm"),
        *("normal", "multinomial", "poisson", "rrelu", "gumbel_softmax", "bernoulli_", "uniform_"),
        *("normal_", "exponential_", "scaled_dot_product_attention", "randint_like"),
    }
)
"""Names of functions and methods that may use random numbers."""


def has_gradient(dtype: torch.dtype) -> bool:
    """Return whether tensors of a dtype can have a gradient: real and complex numbers can."""
    return dtype.is_floating_point or dtype.is_complex


@final
@dataclass(frozen=True)
class TensorSpec:
    """A tensor that crosses a cut.

    Attributes
    ----------
    name : str
        The call that makes it; with the position behind a dot where the call makes several.
    sizes, row_sizes : tuple of int
        Dimension d has ``sizes[d] + rows * row_sizes[d]`` elements.
    dtype : torch.dtype
        Dtype.
    """

    name: str
    sizes: tuple[int, ...]
    row_sizes: tuple[int, ...]
    dtype: torch.dtype

    def shape(self, rows: int) -> tuple[int, ...]:
        """Return the shape for a micro-batch of `rows` samples."""
        pairs = zip(self.sizes, self.row_sizes, strict=True)
        return tuple(size + rows * row_size for size, row_size in pairs)

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, None where the samples are not the first dimension."""
        rows_first = self.sizes[:1] == (0,) and self.row_sizes[:1] == (1,)
        return self.sizes[1:] if rows_first and not any(self.row_sizes[1:]) else None


@final
@dataclass(frozen=True)
class SizeRule:
    """An integer ``constant + rows * factor``, such as a size that `forward` reads of a tensor."""

    constant: int
    factor: int


@final
@dataclass(frozen=True)
class NodeValue:
    """The value of a call that other layers read: tensors, sizes and constants in a structure.

    Attributes
    ----------
    node : str
        The call.
    leaves : tuple
        A `TensorSpec`, a `SizeRule`, or a constant each.
    structure : TreeSpec
        Puts the leaves together.
    """

    node: str
    leaves: tuple[object, ...]
    structure: pytree.TreeSpec

    @property
    def tensors(self) -> list[TensorSpec]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    def assemble(self, tensors: Mapping[str, Tensor], rows: int, device: torch.device) -> Any:
        """Return the value, made of tensors by name."""
        leaves: list[object] = []
        for leaf in self.leaves:
            match leaf:
                case TensorSpec():
                    leaves.append(tensors[leaf.name])
                case SizeRule():
                    leaves.append(leaf.constant + rows * leaf.factor)
                case torch.device():
                    leaves.append(device)
                case _:
                    leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.structure)

    def flatten(self, value: Any) -> dict[str, Tensor]:
        """Return the tensors of a value, by name."""
        leaves, _ = pytree.tree_flatten(value)
        pairs = zip(self.leaves, leaves, strict=True)
        return {spec.name: leaf for spec, leaf in pairs if isinstance(spec, TensorSpec)}


def compare_values(node: str, value: Any, more: Any, rows: int) -> NodeValue:
    """Describe a value, given what a call returned for `rows` and for one more sample."""
    leaves, structure = pytree.tree_flatten(value)
    others, _ = pytree.tree_flatten(more)
    count = sum(isinstance(leaf, Tensor) for leaf in leaves)
    described: list[object] = []
    for number, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        name = node if count == 1 else f"{node}.{number}"
        match leaf:
            case Tensor():
                row_sizes = tuple(b - a for a, b in zip(leaf.shape, other.shape, strict=True))
                pairs = zip(leaf.shape, row_sizes, strict=True)
                sizes = tuple(size - rows * row_size for size, row_size in pairs)
                described.append(TensorSpec(name, sizes, row_sizes, leaf.dtype))
            case bool():
                described.append(leaf)
            case int():
                described.append(SizeRule(leaf - rows * (other - leaf), other - leaf))
            case _:
                described.append(leaf)
    return NodeValue(node, tuple(described), structure)


@final
@dataclass(frozen=True)
class GraphLayer:
    """One layer of a graph.

    Attributes
    ----------
    name : str
        Dotted name of its sub-module.
    nodes : tuple of fx.Node
        Its calls in order.
    reads, writes : tuple of str
        Values of earlier layers or inputs that it reads; its values that later layers read.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """Dotted names of the sub-modules that it calls."""
        return list(dict.fromkeys(str(n.target) for n in self.nodes if n.op == "call_module"))

    @property
    def tensors(self) -> list[str]:
        """Dotted names of the parameters and buffers outside sub-modules that it reads."""
        return list(dict.fromkeys(str(n.target) for n in self.nodes if n.op == "get_attr"))


@final
@dataclass(frozen=True)
class ModelGraph:
    """The layers of a model whose forward is not a chain.

    Attributes
    ----------
    inputs : tuple of str
        Names of the arguments of `forward` that the data gives.
    defaults : dict
        Values of its other arguments.
    layers : tuple of GraphLayer
        The layers in order.
    output : str
        The value that `forward` returns.
    """

    inputs: tuple[str, ...]
    defaults: Mapping[str, Any]
    layers: tuple[GraphLayer, ...]
    output: str

    def run(
        self,
        nodes: Sequence[fx.Node],
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        values: dict[str, Any],
        keep: Collection[str],
        context: CallContext,
    ) -> None:
        """Run calls; `values` holds what they read by name, and afterwards what `keep` names.

        Parameters
        ----------
        modules, tensors : mapping
            Sub-modules, and tensors outside them, by dotted name.
        context : callable
            Returns the context of a call that may use random numbers, given its name.
        """
        for call in prepare_calls(nodes, keep):
            call.run(modules, tensors, values, context)


@final
class PreparedCall:
    """A node whose arguments are looked up once, since a forward runs it for each micro-batch.

    Parameters
    ----------
    node : fx.Node
        The call.
    frees : tuple of str
        Values that nothing reads any more after it.
    """

    __slots__ = ("args", "context_name", "frees", "kwargs", "name", "op", "target")

    def __init__(self, node: fx.Node, frees: tuple[str, ...]) -> None:
        self.name, self.op, self.frees = node.name, node.op, frees
        self.target: Any = node.target
        self.args = tuple(map(_argument, node.args))
        self.kwargs = {name: _argument(value) for name, value in node.kwargs.items()}
        is_random = function_name(node) in RANDOM_FUNCTIONS
        self.context_name: str | None = node.meta.get("call", node.name if is_random else None)

    def run(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        values: dict[str, Any],
        context: CallContext,
    ) -> None:
        """Run the call, and free the values that it reads last."""
        if self.op == "get_attr":
            values[self.name] = tensors[self.target]
            return
        args = [_look_up(argument, values) for argument in self.args]
        kwargs = {name: _look_up(argument, values) for name, argument in self.kwargs.items()}
        if self.op == "call_module":
            function: Any = modules[self.target]
        elif self.op == "call_method":
            function = getattr(args.pop(0), self.target)
        else:
            function = self.target
        if self.context_name is None:
            values[self.name] = function(*args, **kwargs)
        else:
            with context(self.context_name):
                values[self.name] = function(*args, **kwargs)
        for name in self.frees:
            values.pop(name, None)


class _Read(str):
    """The name of a value that is an argument."""

    __slots__ = ()


@final
class _Nested(NamedTuple):
    """An argument that holds values in a structure."""

    structure: Any


def _argument(value: Any) -> Any:
    """Return an argument of a node as `_look_up` takes it."""
    if isinstance(value, fx.Node):
        return _Read(value.name)
    reads: list[fx.Node] = []
    fx.map_arg(value, reads.append)
    return _Nested(value) if reads else value


def _look_up(argument: Any, values: Mapping[str, Any]) -> Any:
    kind = type(argument)
    if kind is _Read:
        return values[argument]
    if kind is _Nested:
        return fx.map_arg(argument.structure, lambda read: values[read.name])
    return argument


def prepare_calls(nodes: Sequence[fx.Node], keep: Collection[str]) -> list[PreparedCall]:
    """Return calls to run one after the other; `keep` names the values to keep until the end."""
    last_use = {read.name: node.name for node in nodes for read in node.all_input_nodes}
    return [
        PreparedCall(
            node,
            tuple(
                read.name
                for read in node.all_input_nodes
                if last_use[read.name] == node.name and read.name not in keep
            ),
        )
        for node in nodes
    ]


def function_name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


# ---- tracing


@final
class _Tracer(fx.Tracer):
    """Traces `forward` with sub-modules as leaves, but those whose names are in `open_names`."""

    def __init__(self, open_names: Collection[str]) -> None:
        super().__init__()
        self.open_names = open_names

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return qualified_name not in self.open_names


def trace_model(
    module: nn.Module, name: str, inputs: int, open_names: Collection[str]
) -> ModelGraph:
    """Return the graph of a module's forward.

    Parameters
    ----------
    module : nn.Module
        The user's model, on any device.
    name : str
        The model's name in the run file, for the messages.
    inputs : int
        Number of inputs of a sample; further arguments of `forward` keep their defaults.
    open_names : collection of str
        Dotted names of sub-modules whose own forward is traced, too.

    Raises
    ------
    ConfigError
        The forward cannot be traced; it depends on `training`; it returns no tensor; it takes too
        few arguments, or calls no sub-module.
    """
    arguments = _forward_arguments(module, name, inputs)
    graph = _trace(module, name, arguments[inputs:], open_names)
    was_training = module.training
    module.train(not was_training)
    other = _trace(module, name, arguments[inputs:], open_names)
    module.train(was_training)
    if _text(graph) != _text(other):
        raise ConfigError(
            "model.forward-reads-training",
            f"the forward of model '{name}' depends on self.training outside its sub-modules: "
            f"move that part into a sub-module",
        )
    return make_graph(graph, [argument.name for argument in arguments[:inputs]], name, module)


def chain_graph(names: Sequence[str]) -> ModelGraph:
    """Return the graph of layers that are called one after the other, each on the whole result of
    the one before."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for name in names:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return make_graph(graph, ["x"], "", None)


def make_graph(
    graph: fx.Graph, inputs: Sequence[str], model: str, module: nn.Module | None
) -> ModelGraph:
    """Group the nodes of an fx graph into layers."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    [result] = [node for node in graph.nodes if node.op == "output"]
    output = _main_output(result.args[0])
    if not isinstance(output, fx.Node):
        raise ConfigError(
            "model.output-not-a-tensor",
            f"the forward of model '{model}' returns {type(output).__name__}: return a tensor, or "
            f"a tuple or dict whose first entry is one",
        )
    names = {node.name: str(node.target) for node in placeholders}
    groups = _group_nodes(graph, model, module)
    owners = {node.name: index for index, (_, nodes) in enumerate(groups) for node in nodes}
    layers = []
    for index, (layer, nodes) in enumerate(groups):
        reads = dict.fromkeys(
            read.name
            for node in nodes
            for read in node.all_input_nodes
            if owners.get(read.name, -1) != index
        )
        writes = [
            node.name
            for node in nodes
            if node is output or any(owners.get(u.name, index) != index for u in node.users)
        ]
        layers.append(GraphLayer(layer, tuple(nodes), tuple(reads), tuple(writes)))
    # fx may rename a placeholder; values are keyed by node names.
    by_argument = {argument: node for node, argument in names.items()}
    return ModelGraph(
        tuple(by_argument[argument] for argument in inputs),
        {node.name: node.args[0] for node in placeholders if node.args},
        tuple(layers),
        output.name,
    )


def _main_output(output: Any) -> Any:
    """Return the value that is trained: of a dict the entry "out" or "logits", else the first."""
    if isinstance(output, dict) and output:
        return output.get("out", output.get("logits", next(iter(output.values()))))
    if isinstance(output, tuple | list) and output:
        return output[0]
    return output


def _group_nodes(
    graph: fx.Graph, model: str, module: nn.Module | None
) -> list[tuple[str, list[fx.Node]]]:
    """Return names and nodes of the layers, in the order of the calls.

    A sub-module with tensors that is called several times joins all layers between the calls: its
    tensors cannot be on two sides of a cut.
    """
    groups: list[tuple[str, list[fx.Node]]] = []
    pending: list[fx.Node] = []  # before the first call of a sub-module
    first_calls: dict[str, int] = {}
    used_names: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "call_module":
            target = str(node.target)
            first = first_calls.get(target)
            if first is not None and first < len(groups) and _has_tensors(module, target):
                used_names[target] += 1
                node.meta["call"] = f"{target}@{used_names[target]}"
                joined = [n for _, nodes in groups[first:] for n in nodes]
                groups[first:] = [(groups[first][0], [*joined, node])]
                continue
            first_calls.setdefault(target, len(groups))
            used_names[target] += 1
            repeated = used_names[target] > 1
            name = f"{target}@{used_names[target]}" if repeated else target
            node.meta["call"] = name
            groups.append((name, [*pending, node]))
            pending = []
        elif groups:
            groups[-1][1].append(node)
        else:
            pending.append(node)
    if not groups:
        raise ConfigError(
            "model.no-layers",
            f"the forward of model '{model}' calls no sub-module: move its parts into sub-modules, "
            "or wrap a single layer in nn.Sequential",
        )
    return groups


def _has_tensors(module: nn.Module | None, target: str) -> bool:
    if module is None:
        return False
    sub_module = module.get_submodule(target)
    return any(True for _ in (*sub_module.parameters(), *sub_module.buffers()))


def _forward_arguments(module: nn.Module, name: str, inputs: int) -> list[inspect.Parameter]:
    """Return the arguments of a module's forward; refuse one that cannot take the inputs."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional[inputs:] if p.default is p.empty]
    if len(positional) < inputs or required:
        raise ConfigError(
            "model.forward-arguments",
            f"the forward of model '{name}' takes "
            f"({', '.join(p.name for p in positional)}), but a sample has {inputs} "
            f"input{'s' if inputs > 1 else ''}: give as many arguments without a default",
        )
    return positional


def _trace(
    module: nn.Module, name: str, others: Iterable[inspect.Parameter], open_names: Collection[str]
) -> fx.Graph:
    """Trace a forward; refuse one that cannot be traced, with the line that prevents it."""
    constants = {argument.name: argument.default for argument in others}
    try:
        return _Tracer(open_names).trace(module, constants or None)
    except Exception as error:
        line = _user_line(error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "model.untraceable",
            f"the forward of model '{name}' cannot be traced: {line}: {reason}. Move the branch or "
            f"loop into a sub-module of its own, which is then one layer",
        ) from error


def _user_line(error: Exception) -> str:
    """Return file, line and text of the innermost frame outside torch."""
    frames = traceback.extract_tb(error.__traceback__)
    folder = str(torch.__path__[0])
    outside = [f for f in frames if not f.filename.startswith((folder, __file__, "<"))]
    if not outside:
        return "in torch"
    frame = outside[-1]
    text = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return f"{frame.filename}:{frame.lineno}: `{text}`"


def describe_node(node: fx.Node) -> str:
    """Return a call as text, to compare two graphs."""
    return f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}"


def _text(graph: fx.Graph) -> list[str]:
    return list(map(describe_node, graph.nodes))
