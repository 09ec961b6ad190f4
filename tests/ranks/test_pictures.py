"""Laws of networks for images with local heads, in whole runs of `train()`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from dtrain.comm.backends.threads import run_ranks
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.models import load_model
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.local_head import LocalHead
from dtrain.rng import seeded
from dtrain.training import train
from tests import pictures
from tests.outcome import model

D = torch.float64
DGL = LocalHead(head="dgl", norm="batch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the runs do: convolutions on several threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_any_number_of_ranks_trains_the_same_bits(name: str, norm: str, tmp_path: Path) -> None:
    """Law 1 over stages, norms in layers and heads, two micro-batches, an uneven last batch."""
    nets: dict[str, Any] = {
        "resnet": pictures.RESNET | {"norm": norm},
        "cnn": {"name": "cnn", "widths": [[4], [6], [8]], "norm": norm, "groups": 2},
    }
    objective = {"name": "local-head", "head": "dgl", "norm": norm, "groups": 2}
    changes = {"model": nets[name], "objective": objective, "micro_batches": 2}
    summaries = []
    for n in (1, 2, 3):
        run, out = pictures.run(**changes, mesh__stages=n), tmp_path / str(n)
        summaries.append(run_ranks(n, lambda comm, run=run, out=out: train(run, comm, out))[0])
    assert len({summary["digest"] for summary in summaries}) == 1
    accuracies = [summary["accuracy_per_block"] for summary in summaries]
    assert accuracies == [accuracies[0]] * 3
    assert None not in accuracies[0]


def test_streaming_is_sequential_local_learning(tmp_path: Path) -> None:
    """Law 2, against an independent loop with detach, batch statistics in layers and heads."""
    run = pictures.run(
        model__norm="batch", objective__norm="batch", optimizer={"name": "sgd", "lr": 0.1},
        partition={"cuts": ["unit2-1", "unit3-1"]}, mesh__stages=3,
    )  # fmt: skip
    run_ranks(3, lambda comm: train(run, comm, tmp_path))
    dataset = load_data(run.dataset.name, {}, run.folder).train
    net = load_model("resnet", run.model.fields, run.folder, dataset.shape, 3)
    layers = net.build(range(len(net.names)), run.settings.seed, D)
    layer_names = [["stem", "unit1-1"], ["unit2-1"], ["unit3-1", "head"]]
    shapes, heads = [(4, 8, 8), (8, 4, 4)], nn.ModuleDict()
    for block, shape in enumerate(shapes):
        with seeded(run.settings.seed, f"heads.{block}"):
            head = DGL.build_head(BlockSpec(block, 3, (), shape, D, 3))
        heads[str(block)] = head.to(D)  # type: ignore[union-attr]
    blocks = [nn.Sequential(*(layers[name] for name in names)) for names in layer_names]
    optimizers = [
        SGD([*blocks[b].parameters(), *(heads[str(b)].parameters() if b < 2 else ())], lr=0.1)
        for b in range(3)
    ]
    order = epoch_order(22, run.settings.seed, 0, "full")
    for start in (0, 8, 16):
        indices = order[start : start + 8]
        x, y = dataset.inputs(indices).to(D), dataset.targets(indices)
        for block in range(3):
            x = blocks[block](x.detach())
            optimizers[block].zero_grad()
            cross_entropy(heads[str(block)](x) if block < 2 else x, y).backward()
            optimizers[block].step()
    expected = {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    for name, layer in layers.items():
        expected |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    trained = model(tmp_path)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained[name], tensor), name
