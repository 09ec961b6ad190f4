"""Refusals of runs whose samples are the nodes of a graph.

Invariant: a run that is accepted evaluates on the whole graph, and trains on it, or on parts of it
in layers that keep the embeddings of the other nodes.
"""

from __future__ import annotations

from dtrain.config.run import RunConfig
from dtrain.data.dataset import DatasetSplits
from dtrain.errors import ConfigError
from dtrain.models import MODELS
from dtrain.models.graph_nets import GraphNetwork
from dtrain.user_code import value_text


def check_graph(run: RunConfig, splits: DatasetSplits, replicas: int) -> None:
    """Refuse a run that would train or evaluate on a part of its graph.

    Raises
    ------
    ConfigError
        A split lacks nodes; nodes are drawn; several replicas; or parts of a graph in layers that
        keep nothing.
    """
    graph = splits.train.graph
    if graph is None:
        return
    if any(split.size != graph.nodes for split in splits.by_name().values()):
        raise ConfigError(
            "graph.nodes-missing",
            f"the graph has {graph.nodes} nodes, and a split has fewer samples: leave out [data] "
            "validation, and give every split all nodes, with ignored labels outside of it",
        )
    if run.data.sampler != "uniform":
        raise ConfigError(
            "graph.sampler",
            f'[data] sampler = "{value_text(run.data.sampler)}" draws nodes, but the graph needs '
            "each of them once: leave it out",
        )
    if replicas > 1:
        raise ConfigError(
            "graph.replicas",
            f"{replicas} replicas would have {replicas} parts of one graph: set [mesh] stages to "
            "the number of ranks",
        )
    settings = run.settings
    is_divided = settings.batch_size < graph.nodes or settings.micro_batches > 1
    kind = MODELS.get(run.model.name)
    if kind is None or not issubclass(kind, GraphNetwork) or not is_divided:
        return
    if not run.model.fields.get("history", False):
        raise ConfigError(
            "graph.parts-without-history",
            f"batch-size = {settings.batch_size} and micro-batches = {settings.micro_batches} "
            f"divide the graph, and nodes have neighbours in other parts: set batch-size = "
            f"{graph.nodes} and micro-batches = 1, or [model] history = true",
        )
