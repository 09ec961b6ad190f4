"""CaFo in whole runs: closed forms and trained heads, on any number of ranks, after a restart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from tests import pictures, tiny
from tests.harness import train_in_threads
from tests.outcome import close, model

VARIANTS = list(itertools.product(["least-squares", "ce", "sparsemax"], ["random", "trained"]))
every_variant = pytest.mark.parametrize(("head", "blocks"), VARIANTS)


def make_run(head: str, blocks: str, **changes: Any) -> Any:
    return tiny.run(objective={"name": "cafo", "head": head, "blocks": blocks}, **changes)


def initial_parameters(run: Any) -> dict[str, Tensor]:
    """Return the initial parameters of the layers, without the model's head."""
    layout = make_plan(run, 1).layout
    blocks = [
        make_block(run, layout, b, torch.device("cpu")) for b in range(len(layout.block_layouts))
    ]
    parameters = {name: p for block in blocks for name, p in block.parameters.items()}
    return {name: p.detach() for name, p in parameters.items() if not name.startswith("head")}


@every_variant
def test_any_number_of_ranks_trains_the_same_bits(head: str, blocks: str, tmp_path: Path) -> None:
    summaries = [
        train_in_threads(make_run(head, blocks, mesh__stages=n), tmp_path / str(n), n)
        for n in (1, 3)
    ]
    assert len({summary["digest"] for summary in summaries}) == 1
    assert len({summary["test_accuracy"] for summary in summaries}) == 1
    assert summaries[0]["test_accuracy"] == summaries[0]["test_accuracy_vote"]


@every_variant
def test_replicas_and_micro_batches_train_the_same_model(
    head: str, blocks: str, tmp_path: Path
) -> None:
    """To 1e-9: the condition of a sum is the square of that of the features."""
    train_in_threads(make_run(head, blocks, mesh__stages=2, micro_batches=1), tmp_path / "one", 2)
    train_in_threads(make_run(head, blocks, mesh__stages=2), tmp_path / "two", 2, 2)
    close(tmp_path / "one", tmp_path / "two", 1e-9)


@every_variant
def test_random_blocks_keep_their_weights_and_trained_ones_do_not(
    head: str, blocks: str, tmp_path: Path
) -> None:
    """Even with an optimizer that decays all weights that it gets."""
    decaying = {"name": "adamw", "lr": 0.01, "weight-decay": 0.1}
    run = make_run(head, blocks, optimizer=decaying)
    train_in_threads(run, tmp_path)
    final, initial = model(tmp_path), initial_parameters(run)
    same = {torch.equal(final[name], tensor) for name, tensor in initial.items()}
    assert same == {blocks == "random"}


@pytest.mark.parametrize("blocks", ["random", "trained"])
def test_a_restart_within_an_epoch_continues_its_sums(blocks: str, tmp_path: Path) -> None:
    """Four updates are an epoch; the second start resumes after two."""
    changes = {"segment": 1, "epochs": None}
    train_in_threads(make_run("least-squares", blocks, updates=7, **changes), tmp_path / "whole")
    for updates in (2, 7):
        train_in_threads(
            make_run("least-squares", blocks, updates=updates, **changes), tmp_path / "parts"
        )
    whole, parts = model(tmp_path / "whole"), model(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    rows = {"random": 50 + 48, "trained": 48}[blocks]
    assert whole["heads.0.gram"][-1, -1] == rows


@every_variant
def test_heads_learn(head: str, blocks: str, tmp_path: Path) -> None:
    """The classes are easy to separate."""
    summary = train_in_threads(make_run(head, blocks, epochs=6, optimizer__lr=0.1), tmp_path)
    assert summary["test_accuracy"] > 0.6


@pytest.mark.parametrize("blocks", ["random", "trained"])
def test_networks_for_images_are_solved(blocks: str, tmp_path: Path) -> None:
    objective = {"name": "cafo", "blocks": blocks, "features": 40}
    summaries = [
        train_in_threads(pictures.run(objective=objective, mesh__stages=n), tmp_path / str(n), n)
        for n in (1, 3)
    ]
    assert summaries[0]["digest"] == summaries[1]["digest"]
