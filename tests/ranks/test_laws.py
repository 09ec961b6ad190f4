"""The laws of training, over whole runs of `train()` with ranks as threads of this process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dtrain.checkpoint.manifest import latest_checkpoint
from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError, NumericalError
from dtrain.models import load_model
from dtrain.objectives import OBJECTIVES
from dtrain.objectives.block_spec import BlockSpec
from dtrain.objectives.mono_forward import MonoForward
from dtrain.planning.block_factory import make_block
from dtrain.planning.plan import make_plan
from dtrain.rng import seeded
from dtrain.schedules import SCHEDULES
from dtrain.syncs import SYNCS
from tests import tiny
from tests.harness import assert_close_model, train_in_threads
from tests.outcome import break_off, model
from tests.refusals import refuses

LATE = {name for name, kind in OBJECTIVES.items() if any(r.lag for r in kind().routes(3, "train"))}
SUMMED = {name for name, kind in OBJECTIVES.items() if kind().accumulated_buffers}
STALE = {n for n, kind in OBJECTIVES.items() if SCHEDULES[kind().default_schedule].asynchronous}
"""Their feedback is delayed: the end of a segment drains it, so segments are part of training."""


def objective_run(objective: str, **changes: Any) -> RunConfig:
    """Return the tiny run of an objective, in one micro-batch where its schedule needs that."""
    if objective in STALE:
        changes["micro_batches"] = 1
    return tiny.run(objective__name=objective, **changes)


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_any_number_of_ranks_trains_the_same_bits(objective: str, tmp_path: Path) -> None:
    """Law 1 over stages: 1, 2 (uneven) and 3 ranks, three micro-batches, a short last batch.

    In float32 and the default schedule; `test_product` has all objectives and schedules, in
    float64.
    """
    summaries = [
        train_in_threads(
            objective_run(objective, dtype="float32", mesh__stages=n), tmp_path / str(n), n, seed=n
        )
        for n in (1, 2, 3)
    ]
    assert len({summary["digest"] for summary in summaries}) == 1
    assert [summary["stages"] for summary in summaries] == [1, 2, 3]
    keys = ("test_accuracy", "test_loss", "test_accuracy_vote", "train_loss", "accuracy_per_block")
    assert all(summaries[0][key] == summary[key] for key in keys for summary in summaries)


@pytest.mark.parametrize("objective", tiny.PATTERNS)
def test_layers_that_draw_train_the_same_bits(objective: str, tmp_path: Path) -> None:
    """Law 1 with dropout, in a user's own Sequential, on 1 and 4 ranks."""
    changes: dict[str, Any] = {
        "model": {"name": "tests.tiny:dropping"},
        "partition__blocks": 4,
        "epochs": 1,
    }
    digests = {
        train_in_threads(objective_run(objective, **changes, mesh__stages=n), tmp_path / str(n), n)[
            "digest"
        ]
        for n in (1, 4)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("objective", [*tiny.PATTERNS, "cafo"])
def test_replicas_train_the_same_model(objective: str, tmp_path: Path) -> None:
    """Law 1 over replicas, from the same run file, the last batch too small for all of them."""
    run = objective_run(objective, mesh__stages=2, epochs=1)
    train_in_threads(run, tmp_path / "one", 2)
    train_in_threads(run, tmp_path / "many", 2, 3)
    assert_close_model(tmp_path / "one", tmp_path / "many", 1e-9 if objective == "cafo" else 1e-12)


def test_streaming_is_sequential_local_learning(tmp_path: Path) -> None:
    """Law 2, against an independent loop: block after block, one optimizer each."""
    run = tiny.run(micro_batches=1, mesh__stages=3)
    train_in_threads(run, tmp_path, 3)
    samples = load_data(run.dataset.name, {}, run.folder)
    net = load_model("mlp", run.model.fields, run.folder, samples.train.shape, 3)
    layers = net.build(range(5), run.settings.seed, torch.float64)
    parts = [["fc1"], ["fc2"], ["fc3", "fc4", "head"]]
    widths, heads, steps = [13, 11], [], []
    for block, names in enumerate(parts):
        parameters = [p for name in names for p in layers[name].parameters()]
        if block < 2:
            with seeded(run.settings.seed, f"heads.{block}"):
                task = BlockSpec(block, 3, (), (widths[block],), torch.float64, 3)
                head = MonoForward().build_head(task)
            assert head is not None
            heads.append(head.to(torch.float64))
            parameters += heads[-1].parameters()
        steps.append(torch.optim.Adam(parameters, lr=0.01, fused=True))
    for epoch in range(2):
        sequence = epoch_order(50, run.settings.seed, epoch, "full")
        for start in range(0, 50, 16):
            batch = sequence[start : start + 16]
            x, y = samples.train.inputs(batch), samples.train.targets(batch)
            for block, names in enumerate(parts):
                x = x.detach()
                for name in names:
                    x = layers[name](x)
                scores = heads[block](x) if block < 2 else x
                steps[block].zero_grad()
                cross_entropy(scores, y).backward()
                steps[block].step()
    trained_model = model(tmp_path)
    expected = {f"{n}.{p}": t for n, layer in layers.items() for p, t in layer.named_parameters()}
    expected |= {f"heads.{b}.{p}": t for b, h in enumerate(heads) for p, t in h.named_parameters()}
    assert trained_model.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(trained_model[name], tensor), name


@pytest.mark.parametrize("seed", range(4))
def test_timing_changes_nothing(seed: int, tmp_path: Path) -> None:
    """Ranks take turns in another order; the result is that of one rank."""
    run = tiny.run(objective__name="backprop", epochs=1, mesh__stages=2)
    one = train_in_threads(tiny.run(objective__name="backprop", epochs=1), tmp_path / "one")
    assert train_in_threads(run, tmp_path / "two", 2, seed=seed)["digest"] == one["digest"]


@pytest.mark.parametrize(
    ("objective", "sync"),
    [
        (name, syncs[(2 * number) % len(syncs)])
        for number, name in enumerate([*tiny.PATTERNS, "cafo", "dni"])
        for syncs in [tiny.suited(OBJECTIVES[name]().default_schedule)]
    ],
)
def test_resumed_is_uninterrupted(objective: str, sync: str, tmp_path: Path) -> None:
    """Law 5: cut in the middle of an epoch, at its end, and where no checkpoint was due, by bits.

    Segments are of 3 updates and 1, so that both of their ends are met. Inside a segment what comes
    late would be drained by a stop, and sums be closed, so such go on from segment ends alone.
    Where phases follow the length of the run, that stays as it is.
    """
    changes: dict[str, Any] = {"sync__name": sync, "mesh__stages": 2}
    changes |= {"epochs": None, "checkpoint__every": 3}
    whole = train_in_threads(
        objective_run(objective, **changes, updates=9), tmp_path / "whole", 2, 2
    )
    horizon, ends = SYNCS[sync]().traits().depends_on_run_length, objective in LATE | STALE | SUMMED
    for updates in (4, 7, 9) if horizon or ends else (4, 6, 9):
        run = objective_run(objective, **changes, updates=9 if horizon else updates)
        parts = train_in_threads(run, tmp_path / "parts", 2, 2)
        if updates < 9:
            break_off(tmp_path / "parts", updates)
    counted = ("digest", "train_loss", "test_loss", "test_accuracy", "samples", "updates")
    counted += ("bytes_intra_node", "bytes_inter_node")
    for key in counted:
        assert whole[key] == parts[key], key
    assert (whole["attempts"], parts["attempts"]) == (1, 3)


@pytest.mark.parametrize("objective", ["mono-forward", "cafo", "f3", "dfa"])
def test_a_run_asked_for_more_epochs_is_one_that_was_longer(objective: str, tmp_path: Path) -> None:
    """Law 5 with nothing but `epochs`."""
    whole = train_in_threads(
        objective_run(objective, epochs=3, mesh__stages=2), tmp_path / "whole", 2, 2
    )
    train_in_threads(objective_run(objective, epochs=1, mesh__stages=2), tmp_path / "parts", 2, 2)
    parts = train_in_threads(
        objective_run(objective, epochs=3, mesh__stages=2), tmp_path / "parts", 2, 2
    )
    for key in ("digest", "train_loss", "test_loss", "samples", "bytes_intra_node"):
        assert whole[key] == parts[key], key


def test_a_run_goes_on_with_other_numbers_of_stages_and_replicas(tmp_path: Path) -> None:
    """Law 5, second half, where replicas do not train apart: names are global."""
    first = train_in_threads(tiny.run(epochs=1, mesh__stages=3), tmp_path / "out", 3)
    assert train_in_threads(tiny.run(epochs=1), tmp_path / "out")["digest"] == first["digest"]
    moved = train_in_threads(tiny.run(epochs=3), tmp_path / "out")
    assert moved["digest"] == train_in_threads(tiny.run(epochs=3), tmp_path / "one")["digest"]
    train_in_threads(tiny.run(epochs=4, mesh__stages=2), tmp_path / "out", 2, 2)
    train_in_threads(tiny.run(epochs=4), tmp_path / "one")
    assert_close_model(tmp_path / "out", tmp_path / "one")


def test_a_finished_run_stays_what_it_is(tmp_path: Path) -> None:
    first = train_in_threads(tiny.run(), tmp_path)
    again = train_in_threads(tiny.run(), tmp_path)
    assert (again["updates"], again["attempts"]) == (first["updates"], 2)
    assert again["digest"] == first["digest"]
    assert again["test_accuracy"] == first["test_accuracy"]


ALONE = ("oialr",)
"""What trains another model with one replica, too: a law of its own stands in its own file."""

OUTER: dict[str, dict[str, Any]] = {
    "diloco": {"every": 3, "outer-lr": 1.0, "outer-momentum": 0.0},
}
"""Syncs that step by themselves, and fields with which that is the movement of the replicas."""


def test_one_replica_is_the_identity_of_every_sync(tmp_path: Path) -> None:
    """Law 6 for the syncs that average, to the bit; up to rounding for those that add it up."""
    digests = {}
    averaging = [
        name
        for name in SYNCS
        if not SYNCS[name]().traits().replaces_optimizer and name not in ALONE
    ]
    for name in averaging:
        run = tiny.run(sync={"name": name, **OUTER.get(name, {})})
        digests[name] = train_in_threads(run, tmp_path / name)["digest"]
    assert len({digests[name] for name in averaging if name not in OUTER}) == 1
    for name in OUTER:
        assert_close_model(tmp_path / name, tmp_path / "every-step")


def test_replicas_that_never_agree_are_averaged_for_the_view(tmp_path: Path) -> None:
    run = tiny.run(sync__name="never", mesh__stages=1)
    summary = train_in_threads(run, tmp_path, 1, 2)
    manifest = latest_checkpoint(tmp_path / "checkpoints")
    assert manifest is not None
    one, two = manifest.load_prefix("replica/0/"), manifest.load_prefix("replica/1/")
    assert not torch.equal(one["fc1.weight"], two["fc1.weight"])
    for name, mean in model(tmp_path).items():
        torch.testing.assert_close(mean, (one[name] + two[name]) / 2, rtol=1e-14, atol=0)
    assert summary["bytes_intra_node"] == summary["bytes_inter_node"] == 0


ROWS = 100  # 50 samples, twice
SENT = {
    # Numbers in all, over samples, updates (four an epoch) or epochs; boundaries of 13 and 11.
    "backprop": 2 * 24 * ROWS,
    "deep-supervision": 2 * 24 * ROWS,
    "dual-propagation": 2 * 24 * ROWS,
    "pfa": 2 * 24 * ROWS,
    "dfa": (24 + 2 * 3) * ROWS,  # the error, to two blocks
    "pepita": (2 * 24 + 3) * ROWS,  # two passes, the error to the first block
    "forward-forward": 3 * 24 * ROWS,  # positives, negatives, neutral
    # Three virtual nodes in every micro-batch: ten per epoch and replica.
    "forward-gnn": 24 * (ROWS + 3 * 2 * 2 * 10),
    "layer-collaboration": (3 * 24 + 2 * 2 + 2 * 2) * ROWS,  # sums so far, the total
    "diffusion-blocks": 0,
    "noprop": 0,
    # Two updates late: two of four updates an epoch are received, in both replicas.
    "man": 24 * ROWS + 2 * 2 * 2 * (13 * 11 + 11 + 11 * 7 + 7),  # first layers of blocks 1 and 2
    "ccl": 24 * ROWS + 2 * 2 * 2 * 3 * 11,  # codes of block 1; the next ones are one-hot
    # The fourth update has one micro-batch in each replica: it receives one of three rows.
    "dni": 24 * ROWS + 2 * 24 * (16 + 2 * 3),
}
SPREAD = {
    # Once an epoch: answers to the two other stages; fresh ones and marks added over replicas.
    "f3": 2 * (2 * 2 * 50 * 3 + 2 * 50 * (3 + 1)),
    "cafo": 2 * 2 * sum((width + 1) * (width + 1 + 3) for width in (13, 11, 6)),
    "forward-forward": 2 * 2 * (13 + 11 + 6),
    "ccl": 2 * 2 * (3 * 11 + 3 * 3),  # the latest codes, as other buffers that replicas average
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_counted_bytes_are_the_formula(objective: str, tmp_path: Path) -> None:
    """Activations once, what else flows, and 2 (n - 1) / n times the gradients per replica."""
    run = objective_run(objective, mesh__stages=3, partition={"cuts": [1, 2]})
    summary = train_in_threads(run, tmp_path, 3, 2)
    layout = make_plan(run, 6).layout
    blocks = [make_block(run, layout, b, torch.device("cpu")) for b in range(3)]
    elements = sum(p.numel() for block in blocks for p in block.trainable_parameters)
    means = 8 * elements * 2 * (2 - 1)  # updates, 2 (n - 1) / n per rank, in two ranks
    numbers = SENT.get(objective, 24 * ROWS) + SPREAD.get(objective, 0) + means
    assert summary["bytes_intra_node"] == 8 * numbers
    assert summary["bytes_inter_node"] == 0


def test_the_summary_keeps_the_contract(tmp_path: Path) -> None:
    summary = train_in_threads(tiny.run(mesh__stages=2), tmp_path, 2, 2)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    plain = "status ranks replicas stages blocks epochs updates samples wall_s samples_per_s"
    plain += " train_loss test_loss test_accuracy test_accuracy_vote bytes_intra_node"
    assert set((plain + " bytes_inter_node digest").split()) < set(summary)
    lengths = {"utilisation": 2, "peak_live_micros": 2, "staleness": 2, "accuracy_per_block": 3}
    lengths |= {"peak_memory_bytes": 4, "rss_bytes": 4}
    assert {key: len(summary[key]) for key in lengths} == lengths
    assert (summary["status"], summary["samples"], summary["updates"]) == ("finished", 100, 8)
    kinds = [
        json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds == ["run"] + ["train", "eval", "checkpoint"] * 2
    assert not (tmp_path / "owner.json").exists()


def test_a_checkpoint_of_other_settings_is_refused_by_key(tmp_path: Path) -> None:
    train_in_threads(tiny.run(), tmp_path)
    with refuses(ConfigError, "resume.settings-changed") as caught:
        train_in_threads(tiny.run(optimizer__lr=0.02), tmp_path)
    assert all(fact in caught.value.message for fact in ("optimizer.lr", "0.01", "0.02"))
    assert not (tmp_path / "owner.json").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_place(tmp_path: Path) -> None:
    run = tiny.run(optimizer__name="sgd", optimizer__lr=1e200, mesh__stages=2)
    with refuses(NumericalError, "training.loss-not-finite") as caught:
        train_in_threads(run, tmp_path, 2)
    place = r"replica 0 stage \d \| update \d+ \| action B\d"
    assert re.search(place, caught.value.message)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert caught.value.message in summary["error"]
    assert summary["error_key"] == caught.value.key
