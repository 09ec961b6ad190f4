"""DASO: its schedule and merges against independent simulations, and its laws over whole runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dtrain.syncs.daso.base import PlateauDetector
from dtrain.syncs.daso.selective import SelectiveDaso
from torch import Tensor, nn, optim

from dtrain.block.block import Block
from dtrain.comm.backends.threads import run_ranks as ranks
from dtrain.comm.communicator import Comm
from dtrain.errors import DtrainError
from dtrain.syncs.base import Sync, UpdateClock
from dtrain.syncs.daso import DASO
from dtrain.train import train
from tests import tiny
from tests.outcome import close, model
from tests.ranks.killed import killed
from tests.ranks.test_local_sgd import replicas

FOUR = ("a", "a", "b", "b")
LENGTH = 12
HEAT: dict[str, Any] = {"heat_compatible": True, "warmup_epochs": 1, "cooldown_epochs": 1}
BARE: dict[str, Any] = {"warmup_epochs": 0, "cooldown_epochs": 0}
Pull = Callable[[int, int, Tensor], Tensor]


def pulled(rank: int, update: int, x: Tensor) -> Tensor:
    """Return a gradient that depends on who, when and where."""
    return 0.3 * x + torch.tensor([1.0 + rank, (-1.0) ** update], dtype=torch.float64)


def walk(
    sync: Sync, comm: Comm, epochs: int, pull: Pull = pulled, losses: tuple[float, ...] = ()
) -> list[Tensor]:
    """Take `LENGTH` SGD steps per epoch around a sync; return the weights after each update."""
    layer = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    block = Block(0, {"fc1": layer}, None, partial(optim.SGD, lr=0.1, momentum=0.5))
    sync.setup(block, comm)
    clock = UpdateClock(0, 0, LENGTH, epochs * LENGTH, 0.1, 0.1, False, (1,) * comm.size)
    seen = []
    for update in range(clock.total_updates):
        now = replace(clock, update=update, epoch=update // LENGTH)
        layer.weight.grad = pull(comm.rank, update, layer.weight.detach())
        sync.reduce_gradients(block, 1 / comm.size, now)
        block.update()
        sync.after_update(now)
        seen.append(layer.weight.detach().clone())
        if now.ends_epoch:
            sync.finish_pending()
            sync.end_epoch(losses[now.epoch] if losses else 1.0 / (1 + now.epoch))
    return seen


class Reference:
    """heat's `DASO.step` for all ranks at once, batch by batch, as its source goes: `g` per node.

    Weights, momenta, lists of pending sums and switches of torch's DDP, one per rank.
    """

    def __init__(self, nodes: int, g: int, most: int) -> None:
        self.nodes, self.g, self.most, self.world = nodes, g, most, nodes * g
        self.x = [torch.ones(1, 2, dtype=torch.float64) for _ in range(self.world)]
        self.v = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(self.world)]
        self.pending: list[list[tuple[Tensor, float]]] = [[] for _ in range(self.world)]
        self.s = self.l = self.b = self.mod = self.batch = self.epoch = 0
        self.before: int | None = None
        self.on = True
        self.sent: list[int] = []
        self.merged: list[tuple[int, float]] = []

    def train(self, update: int, last: int, pull: Pull) -> None:
        gradients = [pull(rank, update, self.x[rank]) for rank in range(self.world)]
        for node in range(self.nodes):
            own = range(node * self.g, (node + 1) * self.g)
            if self.on:
                mean = sum((gradients[r] for r in own), torch.zeros(1, 2).double()) / self.g
                for r in own:
                    gradients[r] = mean
            for r in own:
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
def test_the_reference_has_the_published_staleness(
    skips: tuple[int, int, int], sends: Any, merges: list[tuple[int, float]]
) -> None:
    """The table of the reference: batches of sending and merging, and the B that was recorded."""
    reference = Reference(2, 2, 8)
    reference.s, reference.l, reference.b = skips
    for update in range(LENGTH):
        reference.train(update, LENGTH - 1, pulled)
    assert reference.sent == list(sends)
    assert reference.merged == merges


@pytest.mark.parametrize("most", [8, 16])
def test_heat_compatible_is_heat_batch_by_batch(most: int) -> None:
    """Weights of all ranks after every batch of a run that goes through all its skips."""
    epochs, losses = 22, (1.0,) * 22
    skips = {
        8: [(0, 0, 0)] + [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(8, 2, 2)] * 3,
        16: [(0, 0, 0)] + [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3 + [(1, 1, 1)] * 3 + [(16, 4, 4)] * 3,
    }[most]
    skips += {8: [(4, 1, 1)] * 3 + [(2, 1, 1)] * 3, 16: [(8, 2, 3)] * 3 + [(4, 1, 2)] * 3}[most]
    skips += {8: [(1, 1, 1)] * 2, 16: [(2, 1, 1)] * 2}[most] + [(0, 0, 0)]
    told: dict[int, list[Tensor]] = {}

    def work(comm: Comm) -> None:
        sync = DASO(max_global_skips=most, **HEAT)
        told[comm.rank] = walk(sync, comm, epochs, losses=losses)

    ranks(4, work, hosts=FOUR)
    reference = Reference(2, 2, most)
    for update in range(epochs * LENGTH):
        # The loss at the end of the warm-up is the best; each third one that equals it fires.
        reference.s, reference.l, reference.b = skips[update // LENGTH]
        reference.train(update, LENGTH - 1, pulled)
        for rank in range(4):
            torch.testing.assert_close(
                told[rank][update], reference.x[rank], rtol=1e-12, atol=1e-12
            )
    assert {len(pending) for pending in reference.pending} == {0}


def test_the_plateau_fires_on_the_third_epoch_that_does_not_improve() -> None:
    plateau = PlateauDetector(0.05)
    heard = [2.0, 1.95, 1.91, 1.89, 1.89, 1.89, 1.89, 1.89, 1.7, 1.7, 1.7, 1.7]
    fired = [plateau.observe(loss) for loss in heard]
    assert [n for n, each in enumerate(fired) if each] == [6, 11]
    negative = PlateauDetector(0.05)
    assert not any(negative.observe(loss) for loss in (-1.0, -1.06, -1.12))
    assert [negative.observe(loss) for loss in (-1.13, -1.14, -1.15)] == [False, False, True]


# ---- the default's own schedule and merges


def simulated(
    nodes: int, g: int, epochs: int, skips: list[tuple[int, int]], pull: Pull
) -> list[list[Tensor]]:
    """Return the weights of all ranks after each update of the default: S and B of each epoch."""
    world, n = nodes * g, float(nodes)
    x = [torch.ones(1, 2, dtype=torch.float64) for _ in range(world)]
    v = [torch.zeros(1, 2, dtype=torch.float64) for _ in range(world)]
    flying: tuple[int, int, Tensor, int] | None = None
    number, seen = 0, []
    for update in range(epochs * LENGTH):
        (s, b), batch = skips[update // LENGTH], update % LENGTH
        gradients = [pull(rank, update, x[rank]) for rank in range(world)]
        size = g if s else world
        for start in range(0, world, size):
            mean = torch.stack(gradients[start : start + size]).mean(0)
            for r in range(start, start + size):
                v[r] = 0.5 * v[r] + mean
                x[r] = x[r] - 0.1 * v[r]
        if s and flying is not None and update == flying[0]:
            _, k, total, bridge = flying
            merged = [(k * x[node * g + bridge] + total) / (k + n) for node in range(nodes)]
            x, flying = [merged[r // g].clone() for r in range(world)], None
        if s and batch == LENGTH - 1:
            assert flying is None
            x = [torch.stack(x).mean(0)] * world
            v = [torch.stack(v).mean(0)] * world
        elif s and batch % s == 0 and batch + b < LENGTH - 1:
            total = sum((x[node * g + number] for node in range(nodes)), torch.zeros(1, 2).double())
            flying, number = (update + b, 2 * b, total, number), (number + 1) % g
        seen.append(list(x))
    return seen


@pytest.mark.parametrize(("nodes", "g"), [(2, 2), (3, 1), (2, 1), (2, 3)])
def test_the_default_merges_with_the_delay_that_it_had(nodes: int, g: int) -> None:
    """Warm-up, (8, 2), (4, 1), (2, 1), (1, 1) and again (8, 2), cool-down; any ranks per node."""
    epochs = 16
    skips = [(0, 0), *[(8, 2)] * 3, *[(4, 1)] * 3, *[(2, 1)] * 3, *[(1, 1)] * 3, *[(8, 2)] * 2]
    skips.append((0, 0))
    told: dict[int, list[Tensor]] = {}

    def work(comm: Comm) -> None:
        sync = DASO(warmup_epochs=1, cooldown_epochs=1)
        told[comm.rank] = walk(sync, comm, epochs, losses=(1.0,) * epochs)

    ranks(nodes * g, work, hosts=[f"n{r // g}" for r in range(nodes * g)])
    for update, wanted in enumerate(simulated(nodes, g, epochs, skips, pulled)):
        for rank, each in enumerate(wanted):
            torch.testing.assert_close(told[rank][update], each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heat", [False, True])
def test_equal_replicas_are_a_fixed_point(heat: bool) -> None:
    """Whatever is sent and merged, nothing moves that was the same everywhere."""
    told: dict[int, list[Tensor]] = {}

    def work(comm: Comm) -> None:
        sync = DASO(warmup_epochs=0, cooldown_epochs=0, heat_compatible=heat)
        still = walk(sync, comm, 3, lambda rank, update, x: torch.zeros_like(x), (1.0,) * 3)
        told[comm.rank] = still

    ranks(4, work, hosts=FOUR)
    for seen in told.values():
        for each in seen:
            torch.testing.assert_close(each, torch.ones(1, 2).double(), rtol=1e-14, atol=0)


def test_a_merge_keeps_k_over_k_plus_p_of_what_moved_meanwhile() -> None:
    """Deviations d_i at the merge become k / (k + P) d_i beside the same stale mean for all."""
    told: dict[int, list[Tensor]] = {}

    def pull(rank: int, update: int, x: Tensor) -> Tensor:
        return torch.full_like(x, float(rank)) if update in (1, 2) else torch.zeros_like(x)

    def work(comm: Comm) -> None:
        told[comm.rank] = walk(DASO(**BARE), comm, 1, pull)

    ranks(3, work, hosts="abc")
    k, p = 4, 3
    for rank in range(3):
        before, after = told[rank][1], told[rank][2]
        moved = before - 0.1 * (0.5 * rank + rank) - 1  # SGD with momentum 0.5, second step
        torch.testing.assert_close(after - 1, k / (k + p) * moved)


# ---- whole runs


def run(epochs: int = 6, **told: Any) -> Any:
    """Return a tiny run under DASO, whose ranks are all replicas."""
    sync = {"name": "daso"} | {
        key.replace("_", "-"): told.pop(key) for key in [*told] if key in SET
    }
    return tiny.run(epochs=epochs, mesh__stages=1, sync=sync, **told)


SET = set(DASO.__dataclass_fields__)
CYCLING: dict[str, Any] = {"warmup_epochs": 1, "cooldown_epochs": 1, "max_global_skips": 2}


def trained(run: Any, out: Path, hosts: Any = FOUR) -> dict[str, Any]:
    """Train on one rank per host named and return the summary."""
    return ranks(len(hosts), lambda comm: train(run, comm, out), hosts=list(hosts))[0]


def test_an_endless_warm_up_is_every_step_bit_for_bit(tmp_path: Path) -> None:
    """With Adam, on unequal nodes."""
    hosts = ("a", "a", "b")
    one = trained(tiny.run(mesh__stages=1), tmp_path / "every-step", hosts)
    other = trained(run(2, warmup_epochs=2), tmp_path / "daso", hosts)
    assert other["digest"] == one["digest"]
    assert other["bytes_inter_node"] == one["bytes_inter_node"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_node_is_every_step_bit_for_bit(count: int, tmp_path: Path) -> None:
    one = trained(tiny.run(mesh__stages=1), tmp_path / "every-step", "a" * count)
    other = trained(run(2, **BARE), tmp_path / "daso", "a" * count)
    assert other["digest"] == one["digest"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_blocking_weights_are_synchronous_training_with_sgd_alone(
    momentum: float, tmp_path: Path
) -> None:
    """heat-compatible with S = 0, where replicas have equal parts; with Adam it is another method.

    No warm-up: then heat's code never leaves its first S, which is 0.
    """
    sgd = {"optimizer": {"name": "sgd", "lr": 0.05, "momentum": momentum}}
    for name, told in (("sgd", sgd), ("adam", {})):
        trained(tiny.run(mesh__stages=1, **told), tmp_path / name, "ab")
        still = {"heat_compatible": True, **BARE}
        trained(run(2, **still, **told), tmp_path / f"{name}-daso", "ab")
    close(tmp_path / "sgd", tmp_path / "sgd-daso")
    with pytest.raises(AssertionError):
        close(tmp_path / "adam", tmp_path / "adam-daso")


def test_one_node_is_no_identity_of_heat(tmp_path: Path) -> None:
    """It merges with its own past: x <- (k x + x_stale) / (k + 1)."""
    told: dict[int, list[Tensor]] = {}

    def work(comm: Comm) -> None:
        told[comm.rank] = walk(DASO(**HEAT | {"cooldown_epochs": 0}), comm, 2)

    ranks(1, work)
    x, v = told[0][LENGTH - 1], None
    ones = torch.ones(1, 2).double()
    v = torch.zeros(1, 2).double()
    y = ones
    for update in range(LENGTH):
        v = 0.5 * v + pulled(0, update, y)
        y = y - 0.1 * v
    torch.testing.assert_close(x, y)
    v = 0.5 * v + pulled(0, LENGTH, y)
    sent = y - 0.1 * v
    v = 0.5 * v + pulled(0, LENGTH + 1, sent)
    now = sent - 0.1 * v
    torch.testing.assert_close(told[0][LENGTH], sent)
    torch.testing.assert_close(told[0][LENGTH + 1], (2 * now + sent) / 3)


@pytest.mark.parametrize("heat", [False, True])
def test_replicas_are_equal_at_every_epochs_end(heat: bool, tmp_path: Path) -> None:
    """Weights always; the default's optimizer state too, so that its cool-down keeps them equal."""
    trained(run(3, **CYCLING, heat_compatible=heat), tmp_path)
    held = replicas(tmp_path, 4)
    for name, each in held[0].items():
        if "/" not in name or (not heat and not name.startswith("sync/")):
            assert all(torch.equal(each, other[name]) for other in held), name


@pytest.mark.parametrize(("heat", "local"), [(False, 1), (False, 2), (True, 1)])
def test_segments_and_resuming_change_nothing(heat: bool, local: int, tmp_path: Path) -> None:
    """Killed with a parcel under way, and in the cool-down; epochs have five updates.

    The whole run drains at epochs' ends, the other one after three updates as well.
    """
    told = {**CYCLING, "heat_compatible": heat, "local_every": local, "epochs": 3}
    told |= {"batch_size": 10, "evaluate__every": 3}
    whole = trained(run(**told), tmp_path / "whole")
    often = run(**told, checkpoint__every=3)
    for until in (9, 14):
        killed(often, tmp_path / "parts", until, FOUR)
    again = trained(often, tmp_path / "parts")
    assert (again["digest"], again["attempts"]) == (whole["digest"], 3)


def test_bytes_are_the_formula(tmp_path: Path) -> None:
    """Two nodes of two; three epochs of four updates, of which one cycles with S = 2, B = 1.

    Its update 0 sends a parcel; that of update 2 would come at the epoch's end, so it stays. In the
    last update the second node has no sample, and so no mean.
    """
    summary = trained(run(3, **CYCLING), tmp_path)
    parameters = list(model(tmp_path).values())
    n = 8 * sum(t.numel() for t in parameters)
    moments, steps = 2 * n, 4 * len(parameters)  # Adam: two moments, and a float32 of steps each
    blocking = 2 * 4  # updates of the warm-up and the cool-down
    meeting = n + moments
    inter = 2 * n * blocking + 2 * n * 1 + 2 * meeting
    near = 2 * n  # 2 (g - 1) n in a node
    intra = 2 * near * blocking + 7 * near + 2 * n * 1 + 2 * 2 * meeting
    told = summary["bytes_inter_node"] - inter, summary["bytes_intra_node"] - intra
    assert told == (steps, 2 * steps)  # from rank 0 to the other node, and in both


def test_downcast_halves_what_crosses_in_blocking_phases(tmp_path: Path) -> None:
    """And changes little: gradients lose nothing that counts."""
    whole = trained(run(2, warmup_epochs=2), tmp_path / "whole")
    half = trained(run(2, warmup_epochs=2, downcast="bfloat16"), tmp_path / "half")
    assert half["bytes_inter_node"] * 4 == whole["bytes_inter_node"]  # of float64
    ours, theirs = model(tmp_path / "half"), model(tmp_path / "whole")
    for name, each in ours.items():
        torch.testing.assert_close(each, theirs[name], rtol=0.2, atol=0.05)
        assert not torch.equal(each, theirs[name])
    held = replicas(tmp_path / "half", 4)
    assert all(torch.equal(held[0][name], other[name]) for name in ours for other in held)


def test_heat_refuses_unequal_nodes_by_name(tmp_path: Path) -> None:
    hosts = ("a", "a", "b")
    with pytest.raises(DtrainError, match="as many replicas on every node, and they have 2, 1"):
        trained(run(heat_compatible=True), tmp_path / "heat", hosts)
    assert trained(run(**CYCLING), tmp_path / "default", hosts)["status"] == "finished"


def test_more_epochs_than_the_phases_were_made_for_are_refused(tmp_path: Path) -> None:
    trained(run(2), tmp_path)
    with pytest.raises(DtrainError, match="the phases of 'daso' followed the length"):
        trained(run(3), tmp_path)


def test_left_out_phases_are_a_tenth_of_the_run() -> None:
    clock = UpdateClock(0, 0, 5, 5, 0.1, 0.1, False, (1, 1))
    told: dict[int, list[int]] = {}

    def work(comm: Comm) -> None:
        sync = DASO()
        layer = nn.Linear(1, 1)
        sync.setup(Block(0, {"fc1": layer}, None, partial(optim.SGD, lr=0.1)), comm)
        assert isinstance(sync.variant, SelectiveDaso)
        for epochs in (1, 3, 8, 20, 90):
            clocks = [replace(clock, epoch=e, total_updates=5 * epochs) for e in range(epochs)]
            told[epochs] = [c.epoch for c in clocks if not sync.variant.is_blocking(c)]

    ranks(2, work, hosts="ab")
    assert told[1] == []
    assert told[3] == [1]
    assert told[8] == [1, 2, 3, 4, 5, 6]
    assert told[20] == list(range(2, 18))
    assert told[90] == list(range(4, 86))
