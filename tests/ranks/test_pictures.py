"""The laws of networks with local heads, over whole runs of `train()` on small pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.models import load_model
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.local_head import LocalHead
from dtrain.rng import seeded
from dtrain.train import train
from tests import pictures
from tests.outcome import model as saved

D = torch.float64
DGL = LocalHead(head="dgl", norm="batch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the runs do: convolutions on several add up in another order."""
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
    told = {"model": nets[name], "objective": objective, "micro_batches": 2}
    summaries = [
        ranks(
            n,
            lambda comm, n=n: train(pictures.run(**told, mesh__stages=n), comm, tmp_path / str(n)),
        )[0]
        for n in (1, 2, 3)
    ]
    assert len({summary["digest"] for summary in summaries}) == 1
    assert all(
        each["accuracy_per_block"] == summaries[0]["accuracy_per_block"] for each in summaries
    )
    assert None not in summaries[0]["accuracy_per_block"]


def test_streaming_is_sequential_local_learning(tmp_path: Path) -> None:
    """Law 2, against an independent loop with detach, batch statistics in layers and heads."""
    run = pictures.run(
        model__norm="batch", objective__norm="batch", optimizer={"name": "sgd", "lr": 0.1},
        partition={"cuts": ["unit2-1", "unit3-1"]}, mesh__stages=3,
    )  # fmt: skip
    ranks(3, lambda comm: train(run, comm, tmp_path))
    source = load_data(run.dataset.name, {}, run.folder).train
    net = load_model("resnet", run.model.fields, run.folder, source.shape, 3)
    layers = net.build(range(len(net.names)), run.settings.seed, D)
    parts = [["stem", "unit1-1"], ["unit2-1"], ["unit3-1", "head"]]
    shapes, heads = [(4, 8, 8), (8, 4, 4)], nn.ModuleDict()
    for block, shape in enumerate(shapes):
        with seeded(run.settings.seed, f"heads.{block}"):
            made = DGL.build_head(BlockSpec(block, 3, (), shape, D, 3))
        heads[str(block)] = made.to(D)  # type: ignore[union-attr]
    nets = [nn.Sequential(*(layers[name] for name in names)) for names in parts]
    steps = [
        SGD([*nets[b].parameters(), *(heads[str(b)].parameters() if b < 2 else ())], lr=0.1)
        for b in range(3)
    ]
    sequence = epoch_order(22, run.settings.seed, 0, "full")
    for start in (0, 8, 16):
        indices = sequence[start : start + 8]
        x, y = source.inputs(indices).to(D), source.targets(indices)
        for block in range(3):
            x = nets[block](x.detach())
            steps[block].zero_grad()
            cross_entropy(heads[str(block)](x) if block < 2 else x, y).backward()
            steps[block].step()
    wanted = {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
    for name, layer in layers.items():
        wanted |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    found = saved(tmp_path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
