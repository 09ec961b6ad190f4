"""CaFo in whole runs: closed forms, and heads that learn, on any ranks and after a restart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from dtrain.train import train
from tests import pictures, tiny
from tests.outcome import close, model

FORMS = list(itertools.product(["least-squares", "ce", "sparsemax"], ["random", "trained"]))
every_form = pytest.mark.parametrize(("head", "blocks"), FORMS)


def asked(head: str, blocks: str, **told: Any) -> Any:
    return tiny.run(objective={"name": "cafo", "head": head, "blocks": blocks}, **told)


def trained(run: Any, out: Path, count: int = 1) -> dict[str, Any]:
    """Train on `count` threads and return the summary."""

    def work(comm: Comm) -> dict[str, Any]:
        return train(run, comm, out)

    return ranks(count, work, seed=count)[0]


def random(run: Any) -> dict[str, Tensor]:
    """Return the layers' parameters as the seed draws them, the model's head apart."""
    layout = make_plan(run, 1).layout
    blocks = [
        make_block(run, layout, b, torch.device("cpu")) for b in range(len(layout.block_layouts))
    ]
    own = {name: each for block in blocks for name, each in block.parameters.items()}
    return {name: each.detach() for name, each in own.items() if not name.startswith("head")}


@every_form
def test_any_number_of_ranks_trains_the_same_bits(head: str, blocks: str, tmp_path: Path) -> None:
    found = [trained(asked(head, blocks, mesh__stages=n), tmp_path / str(n), n) for n in (1, 2, 3)]
    assert len({each["digest"] for each in found}) == 1
    assert len({each["test_accuracy"] for each in found}) == 1
    assert found[0]["test_accuracy"] == found[0]["test_accuracy_vote"]


@every_form
def test_replicas_and_micro_batches_train_the_same_model(
    head: str, blocks: str, tmp_path: Path
) -> None:
    """To 1e-9: the condition of a sum is the square of that of the features."""
    trained(asked(head, blocks, mesh__stages=2, micro_batches=1), tmp_path / "one", 2)
    trained(asked(head, blocks, mesh__stages=2), tmp_path / "two", 4)
    close(tmp_path / "one", tmp_path / "two", 1e-9)


@every_form
def test_random_blocks_stay_and_trained_ones_move(head: str, blocks: str, tmp_path: Path) -> None:
    """Whatever the optimizer does to weights that it is given: here, it lets them decay."""
    decaying = {"name": "adamw", "lr": 0.01, "weight-decay": 0.1}
    run = asked(head, blocks, optimizer=decaying)
    trained(run, tmp_path)
    held, first = model(tmp_path), random(run)
    same = {torch.equal(held[name], each) for name, each in first.items()}
    assert same == {blocks == "random"}


@pytest.mark.parametrize("blocks", ["random", "trained"])
def test_a_restart_inside_an_epoch_goes_on_with_its_sums(blocks: str, tmp_path: Path) -> None:
    """Four updates are an epoch; two are in the checkpoint that the second start finds."""
    told = {"segment": 1, "epochs": None}
    trained(asked("least-squares", blocks, updates=7, **told), tmp_path / "whole")
    for updates in (2, 7):
        trained(asked("least-squares", blocks, updates=updates, **told), tmp_path / "parts")
    one, two = model(tmp_path / "whole"), model(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(each, two[name]) for name, each in one.items())
    rows = {"random": 50 + 48, "trained": 48}[blocks]
    assert one["heads.0.gram"][-1, -1] == rows


@every_form
def test_heads_learn(head: str, blocks: str, tmp_path: Path) -> None:
    """The centres are easy."""
    found = trained(asked(head, blocks, epochs=25, optimizer__lr=0.03), tmp_path)
    assert found["test_accuracy"] > 0.6


@pytest.mark.parametrize("blocks", ["random", "trained"])
def test_networks_for_images_are_solved(blocks: str, tmp_path: Path) -> None:
    objective = {"name": "cafo", "blocks": blocks, "features": 40}
    found = [
        trained(pictures.run(objective=objective, mesh__stages=n), tmp_path / str(n), n)
        for n in (1, 3)
    ]
    assert found[0]["digest"] == found[1]["digest"]
