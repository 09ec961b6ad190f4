"""Options of a run, over whole runs: learning rates, clips, augmentation, norms, recomputation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from dtrain.config.run import RunConfig
from dtrain.data import load_data
from dtrain.data.sampler import epoch_order
from dtrain.errors import ConfigError
from dtrain.models import load_model
from dtrain.objectives import OBJECTIVES
from dtrain.schedules import SCHEDULES
from tests import pictures, tiny
from tests.harness import FULL, assert_close_model, train_in_threads
from tests.outcome import break_off, model
from tests.refusals import refuses

Rates = Callable[[optim.Optimizer], optim.lr_scheduler.LRScheduler]
Parts = list[list[str]]

NAMES = ["fc1", "fc2", "fc3", "fc4", "head"]
THREE: Parts = [["fc1"], ["fc2"], ["fc3", "fc4", "head"]]
UPDATES, PER_EPOCH, RATE = 8, 4, 0.2
SGD = {"name": "sgd", "lr": RATE, "momentum": 0.9}
LIMIT = 0.2
"""A norm that some gradients exceed and some do not, those of a block and those of the model."""

GROUPS: dict[str, Any] = {"name": "cnn", "widths": [[4], [4, 6]], "norm": "group", "groups": 2}


def cosine(optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler:
    """Return torch's own ramp of 3 updates and the cosine behind it."""
    ramp = optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 1.0, total_iters=2)
    wave = optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES - 3)
    return optim.lr_scheduler.SequentialLR(optimizer, [ramp, wave], milestones=[3])


def step(optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler:
    """Return the step schedule of torch, called after each update."""
    return optim.lr_scheduler.StepLR(optimizer, PER_EPOCH, gamma=0.25)


RATES: dict[str, tuple[dict[str, Any], Rates | None]] = {
    "constant": ({"name": "constant"}, None),
    "cosine": ({"name": "cosine", "warmup-updates": 3}, cosine),
    "step": ({"name": "step", "every-epochs": 1, "gamma": 0.25}, step),
}


def plain(
    parts: Parts, over: Iterable[Sequence[str]] = (), rates: Rates | None = None
) -> nn.Module:
    """Train the tiny net by backpropagation in a loop of torch's own, whole batches at once.

    Parameters
    ----------
    parts
        Layers that share an optimizer.
    over
        Layers whose gradients are clipped together, to `LIMIT`.
    """
    run = tiny.run()
    samples = load_data(run.dataset.name, {}, run.folder).train
    stack = load_model("mlp", run.model.fields, run.folder, samples.shape, samples.classes)
    net = nn.Sequential()
    for name, layer in stack.build(range(5), run.settings.seed, torch.float64).items():
        net.add_module(name, layer)

    def parameters(names: Sequence[str]) -> list[nn.Parameter]:
        return [p for name in names for p in net.get_submodule(name).parameters()]

    optimizers = [optim.SGD(parameters(part), lr=RATE, momentum=0.9) for part in parts]
    schedulers = [rates(optimizer) for optimizer in optimizers] if rates else []
    norms: list[float] = []
    for epoch in range(2):
        sequence = epoch_order(samples.size, run.settings.seed, epoch, "full")
        for start in range(0, samples.size, 16):
            batch = sequence[start : start + 16]
            net.zero_grad()
            cross_entropy(net(samples.inputs(batch).double()), samples.targets(batch)).backward()
            for names in over:
                norms.append(float(nn.utils.clip_grad_norm_(parameters(names), LIMIT)))
            for stepper in (*optimizers, *schedulers):
                stepper.step()
    assert not norms or min(norms) < LIMIT < max(norms)
    return net


def assert_is_plain_loop(out: Path, net: nn.Module) -> None:
    """Assert that a run ended in the parameters of `net`, up to rounding."""
    tensors = model(out)
    assert tensors.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-12, atol=1e-13)


def assert_laws(
    out: Path, make: Callable[..., RunConfig] = tiny.run, **changes: Any
) -> dict[str, Any]:
    """Assert laws 1 and 3 for one run; return the summary of one rank, whose folder is ``out/1``.

    Three stages give the same bits; two stages of three replicas, whose parts no batch here divides
    by, in four micro-batches, give the same up to rounding.
    """
    changes = {"micro_batches": 3, "epochs": 2, **changes}
    one = train_in_threads(make(**changes, mesh__stages=1), out / "1")
    three = train_in_threads(make(**changes, mesh__stages=3), out / "3", 3)
    for key in ("digest", "test_loss"):
        assert one[key] == three[key], key
    other = make(**{**changes, "micro_batches": 4}, mesh__stages=2)
    train_in_threads(other, out / "replicas", 2, 3)
    assert_close_model(out / "1", out / "replicas")
    return one


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "forward-gradient", "perturb": "parameters", "perturbations": 2},
        {"name": "ulr", "antithetic": True, "distribution": "signs"},
    ],
)
def test_perturbations_belong_to_the_update(objective: dict[str, Any], tmp_path: Path) -> None:
    """Laws 1 and 3 with noise in weights and with pairs; `test_product` has the defaults."""
    assert_laws(tmp_path, objective=objective, epochs=1)


OPTIONS: dict[str, dict[str, Any]] = {
    "cosine": {"lr": RATES["cosine"][0]},
    "step, clip of blocks": {
        "lr": RATES["step"][0],
        "optimizer": {**SGD, "clip": LIMIT, "clip-over": "block"},
    },
    "clip of the model": {
        "objective__name": "backprop",
        "optimizer": {**SGD, "clip": LIMIT, "clip-over": "model"},
    },
}


@pytest.mark.parametrize("option", [*OPTIONS, "augmented"])
def test_options_survive_a_restart(option: str, tmp_path: Path) -> None:
    """Law 5, cut in the middle of an epoch."""
    make = pictures.run if option == "augmented" else tiny.run
    changes = OPTIONS.get(option, {"data__augment": "crop-flip", "model": GROUPS})
    changes = {**changes, "epochs": 2, "checkpoint__every": 2, "mesh__stages": 2}
    whole = train_in_threads(make(**changes), tmp_path / "whole", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    break_off(tmp_path / "parts", 2)
    parts = train_in_threads(make(**changes), tmp_path / "parts", 2)
    assert (parts["digest"], parts["attempts"]) == (whole["digest"], 2)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("over", ["none", "block", "model"])
def test_rates_and_clips_are_those_of_a_plain_loop(name: str, over: str, tmp_path: Path) -> None:
    """Backpropagation in three blocks, with one optimizer, clip and schedule each."""
    clip = {} if over == "none" else {"clip": LIMIT, "clip-over": over}
    changes = {"objective__name": "backprop", "optimizer": {**SGD, **clip}, "lr": RATES[name][0]}
    assert_laws(tmp_path, **changes)
    groups = {"none": [], "block": THREE, "model": [NAMES]}[over]
    assert_is_plain_loop(tmp_path / "1", plain(THREE, groups, RATES[name][1]))


@pytest.mark.parametrize("schedule", ["1f1b", "fill-drain"])
def test_a_clip_over_the_model_knows_no_blocks(schedule: str, tmp_path: Path) -> None:
    """Three blocks or one: the same model."""
    clip = {**SGD, "clip": LIMIT, "clip-over": "model"}
    changes = {"objective__name": "backprop", "schedule__name": schedule, "optimizer": clip}
    train_in_threads(tiny.run(**changes, mesh__stages=3), tmp_path / "three", 3)
    train_in_threads(tiny.run(**changes, partition__blocks=1), tmp_path / "one")
    assert_close_model(tmp_path / "three", tmp_path / "one")


@pytest.mark.parametrize("objective", ["mono-forward", "local-head"])
@pytest.mark.parametrize("over", ["block", "model"])
def test_clips_of_local_objectives_keep_the_laws(objective: str, over: str, tmp_path: Path) -> None:
    """Heads are clipped with their blocks; over the model the blocks are no longer isolated."""
    schedule = "stream" if over == "block" else "1f1b"
    changes = {"objective__name": objective, "schedule__name": schedule}
    clipped = assert_laws(tmp_path, **changes, optimizer={**SGD, "clip": LIMIT, "clip-over": over})
    free = train_in_threads(tiny.run(**changes, optimizer=SGD), tmp_path / "free")
    assert clipped["digest"] != free["digest"]
    if over == "block":
        other = {**changes, "schedule__name": "1f1b", "optimizer": {**SGD, "clip": LIMIT}}
        assert (
            train_in_threads(tiny.run(**other), tmp_path / "other")["digest"] == clipped["digest"]
        )


def test_a_clip_over_the_model_needs_all_gradients_at_once(tmp_path: Path) -> None:
    run = tiny.run(schedule__name="stream", optimizer={**SGD, "clip": 1.0, "clip-over": "model"})
    with refuses(ConfigError, "optimizer.clip-over-schedule"):
        train_in_threads(run, tmp_path)


@pytest.mark.parametrize("limit", [1e-9, 1e9])
def test_clips_that_always_or_never_hold(limit: float, tmp_path: Path) -> None:
    """A huge one is none, bit for bit; a tiny one lets every update move by that norm alone."""
    changes: dict[str, Any] = {"objective__name": "backprop", "epochs": None, "updates": 1}
    optimizer = {"name": "sgd", "lr": 1.0}
    free = train_in_threads(tiny.run(**changes, optimizer=optimizer), tmp_path / "free")
    run = tiny.run(**changes, optimizer={**optimizer, "clip": limit, "clip-over": "model"})
    clipped = train_in_threads(run, tmp_path / "clipped")
    if limit > 1:
        assert clipped["digest"] == free["digest"]
        return
    still = tiny.run(**changes, optimizer={**optimizer, "lr": 0.0})
    train_in_threads(still, tmp_path / "still")
    start, end = model(tmp_path / "still"), model(tmp_path / "clipped")
    moved = sum(float((end[name] - start[name]).square().sum()) for name in start) ** 0.5
    # The norm before is about one, to which the rule of torch adds 1e-6; digits end at 1e-16.
    assert moved == pytest.approx(limit, rel=1e-5)


def test_a_rate_is_asked_by_the_runs_clock(tmp_path: Path) -> None:
    """A cosine over 8 updates, broken off anywhere, drained anywhere: the same bits."""
    changes = {"lr": RATES["cosine"][0], "checkpoint__every": 3}
    expected = train_in_threads(tiny.run(**changes), tmp_path / "whole")["digest"]
    for segment in (1, 3):
        out = tmp_path / f"{segment}"
        assert train_in_threads(tiny.run(**changes, segment=segment), out)["digest"] == expected
    with refuses(ConfigError, "resume.length-changed"):
        train_in_threads(tiny.run(**changes, epochs=3), tmp_path / "whole")


IMAGE_PATTERNS = (*tiny.PATTERNS, "cafo", "infopro", "lls")
"""One objective for each pattern of routes and each kind of head on feature maps."""


@pytest.mark.parametrize("objective", [*tiny.NEIGHBOURS, "infopro"])
def test_augmented_images_keep_the_laws(objective: str, tmp_path: Path) -> None:
    """Drawn per sample and epoch, whoever reads them, and read ahead by a thread."""
    chosen = {"name": objective} | ({"norm": "none"} if objective == "infopro" else {})
    changes = {"objective": chosen, "model": GROUPS, "data__augment": "crop-flip"}
    changes |= {"make": pictures.run, "partition__blocks": 3}
    augmented = assert_laws(tmp_path, **changes)
    run = pictures.run(objective=changes["objective"], model=GROUPS, epochs=2, micro_batches=3)
    assert train_in_threads(run, tmp_path / "plain")["digest"] != augmented["digest"]


@pytest.mark.parametrize(
    ("objective", "norm"),
    [
        *((name, "batch") for name in (OBJECTIVES if FULL else IMAGE_PATTERNS)),
        *((name, "group") for name in tiny.NEIGHBOURS),
    ],
)
def test_networks_for_images_keep_the_laws(objective: str, norm: str, tmp_path: Path) -> None:
    """Batch statistics couple samples: over stages the same bits, all else is no promise."""
    kind = SCHEDULES[OBJECTIVES[objective]().default_schedule]
    micros = 1 if kind.delays_count_micro_batches else 3  # some update after each
    changes: dict[str, Any] = {
        "objective": {"name": objective},
        "epochs": 1,
        "micro_batches": micros,
    }
    changes["model"] = {"name": "resnet", "depth": 8, "width": 4, "norm": norm}
    changes["model"] |= {"groups": 2} if norm == "group" else {}
    if norm == "group":
        assert_laws(tmp_path, make=pictures.run, **changes)
        return
    runs = (pictures.run(**changes, mesh__stages=n) for n in (1, 3))
    digests = {
        train_in_threads(run, tmp_path / f"{n}", n)["digest"]
        for n, run in zip((1, 3), runs, strict=True)
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("objective", "schedule"), [("backprop", "1f1b"), ("local-head", "stream")]
)
def test_recomputation_beside_all_other_options(
    objective: str, schedule: str, tmp_path: Path
) -> None:
    """Clip, ramp, augmentation, batch statistics: computed again, the same bits in less memory."""
    changes: dict[str, Any] = {"objective": {"name": objective}, "schedule__name": schedule}
    changes |= {"optimizer": {**SGD, "clip": LIMIT}, "lr": RATES["cosine"][0], "epochs": 2}
    changes |= {"data__augment": "crop-flip", "model": {"name": "resnet", "depth": 8, "width": 4}}
    changes |= {"micro_batches": 3}
    summaries = {}
    for chosen in (False, True, [1]):
        for stages in (1, 3):
            run = pictures.run(**changes, partition__recompute=chosen, mesh__stages=stages)
            summaries[str(chosen), stages] = train_in_threads(
                run, tmp_path / f"{chosen}-{stages}", stages
            )
    assert len({summary["digest"] for summary in summaries.values()}) == 1
    if (
        schedule == "1f1b"
    ):  # the first stage has three micro-batches alive, in a stream there is one
        assert (
            summaries["True", 3]["peak_memory_bytes"][0]
            < summaries["False", 3]["peak_memory_bytes"][0]
        )


@pytest.mark.parametrize("schedule", [n for n, kind in SCHEDULES.items() if not kind.asynchronous])
@pytest.mark.parametrize("micros", [2, 5, 16])
def test_accumulated_gradients_are_those_of_the_batch(
    schedule: str, micros: int, tmp_path: Path
) -> None:
    """One rank, parts of one sample at the least: a plain loop over whole batches."""
    objective = "mono-forward" if schedule.startswith("stream") else "backprop"
    changes = {"objective__name": objective, "schedule__name": schedule, "optimizer": SGD}
    train_in_threads(tiny.run(**changes, micro_batches=micros), tmp_path / "parts")
    if objective == "backprop":
        assert_is_plain_loop(tmp_path / "parts", plain(THREE))
        return
    train_in_threads(tiny.run(**changes, micro_batches=1), tmp_path / "whole")
    assert_close_model(tmp_path / "whole", tmp_path / "parts")
