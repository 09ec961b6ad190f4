"""heat's DASO: the witness batch by batch against a simulation that follows heat's source.

The parts that it shares with `dtrain.syncs.daso` (sends, merges, inter-node groups) are so held to
another library's order of operations, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.comm.backends.threads import run_ranks
from dtrain.comm.communicator import Comm
from dtrain.syncs.every_step import EveryStep
from tests.ranks.sync_runs import FOUR
from tests.ranks.test_daso import (
    EPOCH,
    GradientFunction,
    gradient_of,
    no_gradient,
    train_vector,
)
from tests.witness.heat import HeatDASO

BRIEF_PHASES: dict[str, Any] = {"warmup_epochs": 1, "cooldown_epochs": 1}


class Simulation:
    """heat's `DASO.step` for all ranks at once, as its source goes, with `g` ranks on a node.

    Weights, momenta, lists of pending sums and switches of torch's DDP, one per rank.
    """

    def __init__(self, nodes: int, g: int) -> None:
        self.nodes = nodes
        self.g = g
        self.world = nodes * g
        self.x = [torch.ones(1, 2, dtype=torch.float64) for _ in range(self.world)]
        self.v = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(self.world)]
        self.pending: list[list[tuple[Tensor, float]]] = [[] for _ in range(self.world)]
        self.s = self.l = self.b = self.mod = self.batch = self.epoch = 0
        self.before: int | None = None
        self.on = True
        self.sent: list[int] = []
        self.merged: list[tuple[int, float]] = []

    def train(self, update: int, last: int, gradient: GradientFunction) -> None:
        gradients = [gradient(rank, update, self.x[rank]) for rank in range(self.world)]
        for node in range(self.nodes):
            ranks = range(node * self.g, (node + 1) * self.g)
            if self.on:
                mean = sum((gradients[r] for r in ranks), torch.zeros(1, 2).double()) / self.g
                for r in ranks:
                    gradients[r] = mean
            for r in ranks:
                self.v[r] = 0.5 * self.v[r] + gradients[r]
                self.x[r] = self.x[r] - 0.1 * self.v[r]
        self.step(last)

    def group(self, number: int) -> list[int]:
        return [node * self.g + number for node in range(self.nodes)]

    def step(self, last: int) -> None:
        batch, following = self.batch, self.batch + 1
        gmod = batch % self.s if self.s > 0 else 0
        lmod = batch % self.l if self.l > 0 else 0
        btw = self.b if self.b + batch <= last else last - batch
        if batch == last or gmod == 0:
            return self.all(btw, last)
        if following % self.s == 0:
            self.on, self.batch = True, following
            return None
        if gmod < btw:
            self.batch = following
            if following == last:
                self.on = True
            return None
        if gmod == btw:
            self.receive()
            self.spread(self.before)
            if self.l > 1:
                self.on = False
        if self.l == 1 and following != last:
            self.batch, self.on = following, True
            return None
        if lmod == 0:
            self.on = False
        elif following % self.l == 0:
            self.on = True
        if following == last:
            self.on = True
        self.batch = following
        return None

    def all(self, btw: int, last: int) -> None:
        group = self.group(self.mod)
        total = sum((self.x[r] for r in group), torch.zeros(1, 2).double())
        self.sent.append(self.batch)
        for r in group:
            self.pending[r].append((total.clone(), float(btw)))
        if self.b != 0:
            self.receive()
            self.spread(self.before)
        if self.batch == last or self.b == 0:
            for r in group:
                self.x[r] = self.pending[r].pop(0)[0] / self.nodes
            self.spread(self.mod)
            self.before = None
            if self.batch == last:
                self.mod, self.epoch, self.batch = 0, self.epoch + 1, 0
                return
        else:
            self.before = self.mod
        self.batch += 1
        self.mod = self.mod + 1 if self.mod <= self.g - 2 else 0

    def receive(self) -> None:
        if self.before is None or not self.pending[self.group(self.before)[0]]:
            return
        for r in self.group(self.before):
            total, between = self.pending[r].pop(0)
            k = between * 2.0 if between > 0.0 else 1.0
            self.x[r] = self.x[r] * (k / (self.nodes + k)) + total / (self.nodes + k)
        self.merged.append((self.batch, between))

    def spread(self, number: int | None) -> None:
        if number is None:
            return
        for r in range(self.world):
            self.x[r] = self.x[r // self.g * self.g + number].clone()


@pytest.mark.parametrize(
    ("skips", "sends", "merges"),
    [
        ((0, 0, 0), range(12), []),
        ((4, 1, 1), [0, 4, 8, 11], [(1, 1), (5, 1), (9, 1)]),
        ((2, 1, 1), [0, 2, 4, 6, 8, 10, 11], [(2, 1), (4, 1), (6, 1), (8, 1), (10, 1), (11, 1)]),
        ((1, 1, 1), range(12), [(n, 1) for n in range(1, 12)]),
        ((8, 2, 2), [0, 8, 11], [(2, 2), (11, 2)]),
    ],
)
def test_the_simulation_has_the_published_staleness(
    skips: tuple[int, int, int], sends: Any, merges: list[tuple[int, float]]
) -> None:
    """Batches of sending and merging, and the B that was recorded, for (S, L, B)."""
    simulation = Simulation(2, 2)
    simulation.s, simulation.l, simulation.b = skips
    for update in range(EPOCH):
        simulation.train(update, EPOCH - 1, gradient_of)
    assert simulation.sent == list(sends)
    assert simulation.merged == merges


@pytest.mark.parametrize("max_skips", [8, 16])
def test_the_witness_is_heat_batch_by_batch(max_skips: int) -> None:
    """Weights of all ranks after every batch of a run that goes through all its skips."""
    epochs, losses = 22, (1.0,) * 22
    skips = {
        8: [(0, 0, 0)] + [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(8, 2, 2)] * 3,
        16: [(0, 0, 0)] + [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(16, 4, 4)] * 3,
    }[max_skips]
    skips += {8: [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3, 16: [(8, 2, 3)] * 3 + [(4, 1, 2)] * 3}[
        max_skips
    ]
    skips += {8: [(1, 1, 1)] * 2, 16: [(2, 1, 1)] * 2}[max_skips] + [(0, 0, 0)]

    def work(comm: Comm) -> list[Tensor]:
        sync = HeatDASO(max_global_skips=max_skips, **BRIEF_PHASES)
        return train_vector(sync, comm, epochs, losses=losses)

    histories = run_ranks(4, work, hosts=list(FOUR))
    simulation = Simulation(2, 2)
    for update in range(epochs * EPOCH):
        # The loss at the end of the warm-up is the best; each third one that equals it fires.
        simulation.s, simulation.l, simulation.b = skips[update // EPOCH]
        simulation.train(update, EPOCH - 1, gradient_of)
        for history, weights in zip(histories, simulation.x, strict=True):
            torch.testing.assert_close(history[update], weights, rtol=1e-12, atol=1e-12)
    assert {len(pending) for pending in simulation.pending} == {0}


def test_equal_replicas_are_a_fixed_point() -> None:
    def work(comm: Comm) -> list[Tensor]:
        sync = HeatDASO(**BRIEF_PHASES)
        return train_vector(sync, comm, 4, no_gradient, (1.0,) * 4)

    for history in run_ranks(4, work, hosts=list(FOUR)):
        for weights in history:
            torch.testing.assert_close(weights, torch.ones(1, 2).double(), rtol=1e-14, atol=0)


def test_blocking_weights_are_synchronous_training_with_sgd() -> None:
    """Without a warm-up heat never leaves its first S, which is 0."""

    def work(comm: Comm) -> tuple[list[Tensor], list[Tensor]]:
        heat = train_vector(HeatDASO(warmup_epochs=0, cooldown_epochs=0), comm, 2)
        return heat, train_vector(EveryStep(), comm, 2)

    for heat, every_step in run_ranks(2, work, hosts=list("ab")):
        for ours, theirs in zip(heat, every_step, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_node_merges_with_its_own_past() -> None:
    """x <- (k x + x_stale) / (k + 1), with momentum 0.5."""

    def work(comm: Comm) -> list[Tensor]:
        return train_vector(HeatDASO(warmup_epochs=1, cooldown_epochs=0), comm, 2)

    [history] = run_ranks(1, work)
    x, v = torch.ones(1, 2).double(), torch.zeros(1, 2).double()
    for update in range(EPOCH):
        v = 0.5 * v + gradient_of(0, update, x)
        x = x - 0.1 * v
    torch.testing.assert_close(history[EPOCH - 1], x)
    v = 0.5 * v + gradient_of(0, EPOCH, x)
    sent = x - 0.1 * v
    v = 0.5 * v + gradient_of(0, EPOCH + 1, sent)
    x = sent - 0.1 * v
    torch.testing.assert_close(history[EPOCH], sent)
    torch.testing.assert_close(history[EPOCH + 1], (2 * x + sent) / 3)
