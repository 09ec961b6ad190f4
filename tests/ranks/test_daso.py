"""DASO: its sends and merges against an independent simulation, and its laws over whole runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.syncs.base import Sync
from dtrain.syncs.daso import DASO
from dtrain.syncs.daso.plateau import PlateauDetector
from dtrain.testing.sync_updates import clock_at, update_block
from tests.outcome import model
from tests.ranks.killed import killed
from tests.ranks.sync_runs import FOUR, replica_tensors, sync_run, train_on

EPOCH = 12
"""Updates of an epoch of `train_vector`."""

CYCLING_ALWAYS: dict[str, Any] = {"warmup_epochs": 0, "cooldown_epochs": 0}
CYCLING: dict[str, Any] = {"warmup-epochs": 1, "cooldown-epochs": 1, "max-global-skips": 2}

GradientFunction = Callable[[int, int, Tensor], Tensor]
"""The gradient of a rank in an update at the weights (1, 2)."""


def gradient_of(rank: int, update: int, x: Tensor) -> Tensor:
    """Return a gradient that depends on rank, update and weights."""
    return 0.3 * x + torch.tensor([1.0 + rank, (-1.0) ** update], dtype=torch.float64)


def no_gradient(rank: int, update: int, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def train_vector(
    sync: Sync,
    comm: Comm,
    epochs: int,
    gradient: GradientFunction = gradient_of,
    losses: Sequence[float] = (),
) -> list[Tensor]:
    """Train two weights from (1, 1) by SGD with momentum; return them after each update."""
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    block = Block(0, {"fc1": layer}, None, partial(optim.SGD, lr=0.1, momentum=0.5))
    sync.setup(block, comm)
    history = []
    for update in range(epochs * EPOCH):
        epoch = update // EPOCH
        length = {"updates_per_epoch": EPOCH, "total_updates": epochs * EPOCH}
        clock = clock_at(update, (1,) * comm.size, epoch=epoch, **length)
        layer.weight.grad = gradient(comm.rank, update, layer.weight.detach())
        update_block(sync, block, clock)
        history.append(layer.weight.detach().clone())
        if clock.ends_epoch:
            sync.finish_pending()
            sync.end_epoch(losses[epoch] if losses else 1.0 / (1 + epoch))
    return history


def simulated_vector(
    nodes: int, node_size: int, epochs: int, skips: list[tuple[int, int]]
) -> list[list[Tensor]]:
    """Return the weights of all ranks after each update; `skips` has (S, B) of each epoch."""
    world = nodes * node_size
    x = [torch.ones(1, 2, dtype=torch.float64) for _ in range(world)]
    v = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(world)]
    in_flight: tuple[int, int, Tensor, int] | None = None
    sender, history = 0, []
    for update in range(epochs * EPOCH):
        (s, b), batch = skips[update // EPOCH], update % EPOCH
        gradients = [gradient_of(rank, update, x[rank]) for rank in range(world)]
        size = node_size if s else world
        for start in range(0, world, size):
            mean = torch.stack(gradients[start : start + size]).mean(0)
            for r in range(start, start + size):
                v[r] = 0.5 * v[r] + mean
                x[r] = x[r] - 0.1 * v[r]
        if s and in_flight is not None and update == in_flight[0]:
            _, k, total, member = in_flight
            merged = [
                (k * x[node * node_size + member] + total) / (k + nodes) for node in range(nodes)
            ]
            x, in_flight = [merged[r // node_size].clone() for r in range(world)], None
        if s and batch == EPOCH - 1:
            assert in_flight is None
            x = [torch.stack(x).mean(0)] * world
            v = [torch.stack(v).mean(0)] * world
        elif s and batch % s == 0 and batch + b < EPOCH - 1:
            total = torch.stack([x[node * node_size + sender] for node in range(nodes)]).sum(0)
            in_flight = update + b, 2 * b, total, sender
            sender = (sender + 1) % node_size
        history.append(list(x))
    return history


@pytest.mark.parametrize(("nodes", "node_size"), [(2, 2), (3, 1), (2, 1), (2, 3)])
def test_a_mean_is_merged_with_the_delay_that_it_had(nodes: int, node_size: int) -> None:
    """Warm-up, (8, 2), (4, 1), (2, 1), (1, 1) and again (8, 2), cool-down."""
    epochs = 16
    cycle = [*[(8, 2)] * 3, *[(4, 1)] * 3, *[(2, 1)] * 3, *[(1, 1)] * 3, *[(8, 2)] * 2]
    skips = [(0, 0), *cycle, (0, 0)]

    def work(comm: Comm) -> list[Tensor]:
        sync = DASO(warmup_epochs=1, cooldown_epochs=1)
        return train_vector(sync, comm, epochs, losses=(1.0,) * epochs)

    world = nodes * node_size
    histories = run_ranks(world, work, hosts=[f"n{rank // node_size}" for rank in range(world)])
    for update, expected in enumerate(simulated_vector(nodes, node_size, epochs, skips)):
        for rank, weights in enumerate(expected):
            torch.testing.assert_close(histories[rank][update], weights, rtol=1e-12, atol=1e-12)


def test_equal_replicas_are_a_fixed_point() -> None:
    """Sends and merges move nothing that is the same everywhere."""

    def work(comm: Comm) -> list[Tensor]:
        return train_vector(DASO(**CYCLING_ALWAYS), comm, 3, no_gradient, (1.0,) * 3)

    for history in run_ranks(4, work, hosts=list(FOUR)):
        for weights in history:
            torch.testing.assert_close(weights, torch.ones(1, 2).double(), rtol=1e-14, atol=0)


def test_a_merge_keeps_k_over_k_plus_p_of_what_moved_meanwhile() -> None:
    """Deviations d_i at the merge become k / (k + P) d_i, beside the same stale mean for all."""

    def gradient(rank: int, update: int, x: Tensor) -> Tensor:
        return torch.full_like(x, float(rank)) if update in (1, 2) else torch.zeros_like(x)

    def work(comm: Comm) -> list[Tensor]:
        return train_vector(DASO(**CYCLING_ALWAYS), comm, 1, gradient)

    k, p = 4, 3
    for rank, history in enumerate(run_ranks(3, work, hosts=list("abc"))):
        before, after = history[1], history[2]
        deviation = before - 0.1 * (0.5 * rank + rank) - 1  # the second step with momentum 0.5
        torch.testing.assert_close(after - 1, k / (k + p) * deviation)


def test_the_plateau_fires_on_the_third_epoch_that_does_not_improve() -> None:
    plateau = PlateauDetector(0.05)
    losses = [2.0, 1.95, 1.91, 1.89, 1.89, 1.89, 1.89, 1.89, 1.7, 1.7, 1.7, 1.7]
    fired = [plateau.observe(loss) for loss in losses]
    assert [epoch for epoch, fires in enumerate(fired) if fires] == [6, 11]
    negative = PlateauDetector(0.05)
    assert not any(negative.observe(loss) for loss in (-1.0, -1.06, -1.12))
    assert [negative.observe(loss) for loss in (-1.13, -1.14, -1.15)] == [False, False, True]


def test_left_out_phases_are_a_tenth_of_the_run() -> None:
    def is_blocking(epoch: int, epochs: int) -> bool:
        clock = clock_at(0, (1, 1), epoch=epoch, updates_per_epoch=5, total_updates=5 * epochs)
        return DASO().is_blocking(clock)

    cycling = {
        epochs: [epoch for epoch in range(epochs) if not is_blocking(epoch, epochs)]
        for epochs in (1, 3, 8, 20, 90)
    }
    assert cycling[1] == []
    assert cycling[3] == [1]
    assert cycling[8] == [1, 2, 3, 4, 5, 6]
    assert cycling[20] == list(range(2, 18))
    assert cycling[90] == list(range(4, 86))


# ---- whole runs


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_one_node_is_every_step_bit_for_bit(replicas: int, tmp_path: Path) -> None:
    plain = train_on(sync_run("every-step"), tmp_path / "every-step", "a" * replicas)
    cycling = {"warmup-epochs": 0, "cooldown-epochs": 0}
    daso = train_on(sync_run("daso", sync=cycling), tmp_path / "daso", "a" * replicas)
    assert daso["digest"] == plain["digest"]


def test_replicas_are_equal_at_every_epochs_end(tmp_path: Path) -> None:
    """Optimizer state included, so that the cool-down keeps them equal; nodes may be unequal."""
    for hosts in (FOUR, "aab"):
        train_on(sync_run("daso", sync=CYCLING, epochs=3), tmp_path / hosts, hosts)
        first, *others = replica_tensors(tmp_path / hosts, len(hosts))
        for name, tensor in first.items():
            if not name.startswith("sync/"):
                assert all(torch.equal(tensor, other[name]) for other in others), name


def test_segments_and_resuming_change_nothing(tmp_path: Path) -> None:
    """Killed with a mean in flight, and in the cool-down; epochs have five updates.

    The whole run drains at the ends of epochs, the other one after three updates as well.
    """
    changes = {"sync": CYCLING, "epochs": 3, "batch_size": 10, "evaluate__every": 3}
    whole = train_on(sync_run("daso", **changes), tmp_path / "whole", FOUR)
    run = sync_run("daso", **changes, checkpoint__every=3)
    for until in (9, 14):
        killed(run, tmp_path / "parts", until, FOUR)
    resumed = train_on(run, tmp_path / "parts", FOUR)
    assert (resumed["digest"], resumed["attempts"]) == (whole["digest"], 3)


def test_bytes_are_the_formula(tmp_path: Path) -> None:
    """Two nodes of two; three epochs of four updates, of which one cycles with S = 2, B = 1.

    Its update 0 sends; a mean of update 2 could not be merged before the epoch ends. In the last
    update of an epoch the second node has no samples, and so no mean of gradients.
    """
    summary = train_on(sync_run("daso", sync=CYCLING, epochs=3), tmp_path, FOUR)
    parameters = list(model(tmp_path).values())
    n = 8 * sum(tensor.numel() for tensor in parameters)
    moments, steps = 2 * n, 4 * len(parameters)  # of Adam; steps are counted in float32
    blocking = 2 * 4  # updates of the warm-up and the cool-down
    synchronised = n + moments
    inter = 2 * n * blocking + 2 * n * 1 + 2 * synchronised
    node_means = 2 * n  # 2 (g - 1) n in a node
    intra = 2 * node_means * blocking + 7 * node_means + 2 * n * 1 + 2 * 2 * synchronised
    rest = summary["bytes_inter_node"] - inter, summary["bytes_intra_node"] - intra
    assert rest == (steps, 2 * steps)  # broadcast from rank 0 to the other node, and in both


def test_downcast_halves_the_bytes_between_nodes_in_blocking_phases(tmp_path: Path) -> None:
    """It changes the weights, but little."""
    blocking = {"warmup-epochs": 2}
    whole = train_on(sync_run("daso", sync=blocking), tmp_path / "whole", FOUR)
    narrow = sync_run("daso", sync=blocking | {"downcast": "bfloat16"})
    half = train_on(narrow, tmp_path / "half", FOUR)
    assert half["bytes_inter_node"] * 4 == whole["bytes_inter_node"]  # of float64
    ours, theirs = model(tmp_path / "half"), model(tmp_path / "whole")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.2, atol=0.05)
        assert not torch.equal(tensor, theirs[name])
    first, *others = replica_tensors(tmp_path / "half", 4)
    assert all(torch.equal(first[name], other[name]) for name in ours for other in others)
