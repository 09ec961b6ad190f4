"""Graph networks: `gcn` and `sage`, whose samples are the nodes of one graph.

Every layer takes the embeddings (rows, d) of some nodes and their numbers (rows,)::

    h~[i] = dropout(x[i])  for the nodes i of the rows
            history[i]     for the others, or 0               Z_i = sum over j of w_ij h~[j]

    gcn     y = f(W Z + b)              w of the symmetric normalisation, loops included
    sage    y = f(W Z + V x + b)        w of the mean

A batch of all nodes is the graph, and `history` is not read. With `history`, each layer keeps the
embeddings that it last got of every node, so that micro-batches of an update may be parts of the
graph that follow each other through the stages (GNNPipe, Chen et al. 2023, arXiv 2308.10087;
GNNAutoScale, Fey et al. 2021). Their gradient does not reach other micro-batches.

Invariant: outputs of all nodes do not depend on `history`. With constant weights and without
dropout the outputs of parts are those of the whole graph once each layer has seen the outputs of
the layer before: after as many passes as there are layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from dtrain.errors import ConfigError, unknown_name
from dtrain.models.aggregation import aggregate
from dtrain.models.mlp import ACTIVATIONS
from dtrain.node_graph import NodeGraph, Normalisation

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphNetwork:
    """Graph layers `conv1` ... `convN`, the last of which returns the class scores.

    Parameters
    ----------
    widths : tuple of int
        Outputs of all layers but the last, which has one per class.
    activation : str
        A key of `ACTIVATIONS`; after all layers but the last.
    dropout : float
        Part of the inputs of every layer that is set to 0 in training.
    residual : bool
        Add its input to the output of a layer of equal widths.
    history : bool
        Keep the last embeddings of every node in every layer, so that a micro-batch may have a part
        of the nodes.

    Raises
    ------
    ConfigError
        A value is out of range, or an unknown activation.
    """

    normalisation: ClassVar[Normalisation]
    has_self_weights: ClassVar[bool]

    widths: tuple[int, ...] = (16,)
    activation: str = "relu"
    dropout: float = 0.0
    residual: bool = False
    history: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(width, int) and width >= 1 for width in self.widths):
            raise ConfigError(
                "model.graph-widths",
                f"[model] widths = {list(self.widths)} must be whole numbers >= 1",
            )
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                "model.dropout-out-of-range",
                f"[model] dropout = {self.dropout} must be at least 0 and less than 1",
            )

    def module(self, shape: tuple[int, ...], classes: int, graph: NodeGraph) -> nn.Module:
        """Return the network for nodes with features of `shape`, (d,)."""
        if len(shape) != 1:
            raise ConfigError(
                "model.graph-features",
                f"the features of a node have shape {shape}: a graph network takes (d,)",
            )
        net, widths = GraphChain(), (*shape, *self.widths, classes)
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            is_last = number == len(widths) - 1
            net.add_module(
                f"conv{number}",
                GraphLayer(
                    graph,
                    self.normalisation,
                    inputs,
                    outputs,
                    activation=None if is_last else ACTIVATIONS[self.activation],
                    dropout=self.dropout,
                    has_self_weights=self.has_self_weights,
                    residual=self.residual and inputs == outputs,
                    history=self.history,
                ),
            )
        return net


@final
@dataclass(frozen=True)
class Gcn(GraphNetwork):
    """Graph convolutions (Kipf and Welling 2017, arXiv 1609.02907)."""

    normalisation: ClassVar[Normalisation] = "symmetric"
    has_self_weights: ClassVar[bool] = False


@final
@dataclass(frozen=True)
class Sage(GraphNetwork):
    """GraphSAGE with the mean (Hamilton, Ying and Leskovec 2017, arXiv 1706.02216)."""

    normalisation: ClassVar[Normalisation] = "mean"
    has_self_weights: ClassVar[bool] = True


@final
class GraphChain(nn.Module):
    """Graph layers in order, each of which also gets the numbers of the nodes."""

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return the outputs (rows, classes) of nodes with features (rows, d)."""
        for layer in self.children():
            x = layer(x, nodes)
        return x


@final
class GraphLayer(nn.Module):
    """One layer: dropout, sum over the neighbours, linear, activation.

    Parameters
    ----------
    graph : NodeGraph
        The constant graph.
    normalisation : "symmetric" or "mean"
        The weights of the neighbours.
    inputs, outputs : int
        Width of the embeddings.
    activation : callable, optional
        None: the layer is linear.
    dropout : float
        As in `GraphNetwork`.
    has_self_weights : bool
        Whether a node's own embedding has a matrix of its own.
    residual, history : bool
        As in `GraphNetwork`.
    """

    uses_rng = False  # its dropout does
    history: Tensor | None

    def __init__(
        self,
        graph: NodeGraph,
        normalisation: Normalisation,
        inputs: int,
        outputs: int,
        *,
        activation: Activation | None = None,
        dropout: float = 0.0,
        has_self_weights: bool = False,
        residual: bool = False,
        history: bool = False,
    ) -> None:
        super().__init__()
        self.graph, self.normalisation = graph, normalisation
        self.activation, self.residual = activation, residual
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.self_linear = nn.Linear(inputs, outputs, bias=False) if has_self_weights else None
        self.register_buffer("history", torch.zeros(graph.rows, inputs) if history else None)

    def forward(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return the outputs (rows, outputs) of nodes with embeddings (rows, inputs)."""
        dropped = self.dropout(x)
        sums = aggregate(self.graph, self.normalisation, self._all_nodes(dropped, nodes), nodes)
        y: Tensor = self.linear(sums)
        if self.self_linear is not None:
            y = y + self.self_linear(dropped)
        if self.activation is not None:
            y = self.activation(y)
        if self.training and self.history is not None:
            with torch.no_grad():
                self.history.index_copy_(0, nodes, x.detach().to(self.history.dtype))
        return y + x if self.residual else y

    def _all_nodes(self, x: Tensor, nodes: Tensor) -> Tensor:
        """Return the embeddings of all nodes and virtual nodes: those of the rows, and the last
        ones, or 0, of the others."""
        if self.history is None:
            return x.new_zeros(self.graph.rows, x.shape[1]).index_copy(0, nodes, x)
        return self.history.to(x.dtype).index_copy(0, nodes, x)
