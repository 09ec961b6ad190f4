"""Run files: what is refused, with which words, and that the resolved text says the same run."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from dtrain.block.lr_schedule import ConstantLR, CosineLR
from dtrain.config.parse import parse_run, read_run
from dtrain.errors import DtrainError
from dtrain.schema import dump_toml, toml_text
from tests import tiny

WRONG = [
    ("batchsize", 3, ["'batchsize'", "did you mean 'batch-size'", "micro-batches"]),
    ("batch_size", 0, ["batch-size = 0", "at least 1"]),
    ("batch_size", "many", ['batch-size = "many"', "whole number"]),
    ("batch_size", True, ["batch-size = true", "whole number"]),
    ("micro_batches", 0, ["micro-batches = 0", "at least 1"]),
    ("updates", 5, ["epochs or updates", "both"]),
    ("epochs", None, ["epochs or updates", "neither"]),
    ("dtype", "float16", ['"float16"', '"float32" or "float64"']),
    ("device", "gpu", ['"gpu"', '"auto" or "cpu"']),
    ("threads", 0, ["threads = 0"]),
    ("model", "mlp", ['[model] and name = "mlp"']),
    ("model", {}, ["[model] needs name"]),
    ("data__shuffle", "some", ['"full" or "chunks"']),
    ("mesh__stages", 0, ["[mesh] stages = 0"]),
    ("mesh__placement", "node", ['"stages-in-node" or "replicas-in-node"']),
    ("partition__balance", "flop", ['"flops" or "parameters" or "layers"']),
    ("partition__cuts", [1, 2.5], ["[partition] cuts[1] = 2.5", "a whole number or a text"]),
    ("partition__cuts", [1], ["leave out blocks and weights"]),
    ("objective__name", "mono_forward", ["did you mean 'mono-forward'", "backprop"]),
    ("objective__depth", 3, ["'depth'", "[objective]"]),
    ("schedule__name", "1fb1", ["did you mean '1f1b'", "fill-drain"]),
    ("sync__name", "always", ["sync 'always'", "every-step, int8, local-sgd, never"]),
    ("sync__every", 3, ["'every'", "[sync]"]),
    ("optimizer__name", "adamax2", ["did you mean 'adamax'"]),
    ("optimizer__momentum", 0.9, ["'momentum'", "'adam'", "betas"]),
    ("optimizer__betas", [0.9], ["'adam'", "betas"]),
    ("optimizer__momentum", 0.9, ["'momentum'", "clip, clip-over"]),
    ("optimizer__clip", -1.0, ["[optimizer] clip = -1.0", "above 0"]),
    ("optimizer__clip", float("nan"), ["[optimizer] clip = nan", "above 0"]),
    ("optimizer__clip", float("inf"), ["[optimizer] clip = inf", "above 0"]),
    ("optimizer__clip", "1", ['[optimizer] clip = "1"', "a number"]),
    ("optimizer__clip_over", "model", ["clip-over", "without a clip"]),
    ("optimizer", {"name": "sgd", "clip": 1, "clip-over": "all"}, ['"block" or "model"']),
    ("optimizer", {"name": "sgd", "clip_over": "block"}, ["as clip-over"]),
    ("lr__name", "cosin", ["did you mean 'cosine'", "constant", "step"]),
    ("lr__final", 0.1, ["'final'", "[lr]"]),
    ("lr__warmup_updates", -1, ["[lr] warmup-updates = -1", "at least 0"]),
    ("lr", {"name": "cosine", "final": 1.5}, ["[lr] final = 1.5", "0 to 1"]),
    ("lr", {"name": "step"}, ["every-epochs or epochs", "neither"]),
    ("lr", {"name": "step", "every-epochs": 2, "epochs": [3]}, ["every-epochs or epochs", "both"]),
    ("lr", {"name": "step", "epochs": [0]}, ["[lr] epochs = 0", "at least 1"]),
    ("lr", {"name": "step", "every-epochs": -1}, ["[lr] every-epochs = -1"]),
    ("lr", {"name": "step", "every-epochs": 1, "gamma": -0.1}, ["[lr] gamma = -0.1"]),
    ("lr", "cosine", ['[lr] and name = "cosine"']),
    ("sync", {"name": "local-sgd", "every": 0}, ["[sync] every = 0", "at least 1"]),
    ("sync", {"name": "local-sgd", "warmup-updates": -1}, ["[sync] warmup-updates = -1"]),
    ("sync", {"name": "int8", "inner": {"name": "x"}}, ["unknown sync.inner 'x'", "diloco"]),
    ("sync", {"name": "int8", "inner": {"evry": 1}}, ["unknown key [sync.inner] 'evry'"]),
    ("sync", {"name": "warmup", "inner": "daso"}, ["[sync] inner", "a table"]),
    ("seed", 2**64, ["seed", "2**63"]),
    ("checkpoint__keep", 0, ["[checkpoint] keep = 0"]),
    ("evaluate__every", 0, ["[evaluate] every = 0"]),
    ("log__every_s", "often", ["[log] every-s", "a number"]),
]


@pytest.mark.parametrize(("key", "value", "words"), WRONG)
def test_what_is_wrong_is_named(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(DtrainError) as refusal:
        tiny.run(**{key: value})
    assert refusal.value.code == 2
    for word in words:
        assert word in refusal.value.message


def test_the_resolved_text_is_the_same_run() -> None:
    run = tiny.run(partition__cuts=[1, "head"], partition__blocks=None)
    again = parse_run(tomllib.loads(dump_toml(run.to_table())), run.path)
    assert again == run
    assert dump_toml(again.to_table()) == dump_toml(run.to_table())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__clip": 1},
        {"optimizer": {"name": "sgd", "lr": 0.1, "clip": 0.5, "clip-over": "model"}},
        {"lr": {"name": "step", "epochs": [1, 3], "gamma": 0.5, "warmup-updates": 2}},
        {"lr": {"name": "cosine", "final": 0.1}},
        {"sync": {"name": "local-sgd", "every": 3}},
    ],
)
def test_rates_and_clips_are_written_back(changes: dict[str, Any]) -> None:
    run = tiny.run(**changes)
    assert run != tiny.run()
    again = parse_run(tomllib.loads(dump_toml(run.to_table())), run.path)
    assert again == run
    assert dump_toml(again.to_table()) == dump_toml(run.to_table())


def test_a_clip_is_ours_and_no_field_of_the_optimizer() -> None:
    run = tiny.run(optimizer__clip=2, optimizer__clip_over="model")
    assert (run.optimizer_options.clip, run.optimizer_options.clip_over) == (2.0, "model")
    assert run.optimizer.fields == tiny.run().optimizer.fields
    assert run.to_table()["optimizer"]["clip"] == 2.0
    off = tiny.run(optimizer__clip=0)
    assert off == tiny.run()
    assert "clip" not in off.to_table()["optimizer"]


def test_rates_are_constant_unless_asked_for() -> None:
    assert tiny.run().make_lr_schedule() == ConstantLR()
    assert tiny.run(lr__name="cosine", lr__final=0.5).make_lr_schedule() == CosineLR(final=0.5)


def test_defaults_depend_on_the_objective() -> None:
    assert tiny.run(objective__name="backprop").schedule.name == "1f1b"
    assert tiny.run().schedule.name == "stream"
    assert tiny.run().sync.name == "every-step"


def test_overrides_are_toml_or_text(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(dump_toml(tiny.run().to_table()))
    run = read_run(path, ["optimizer.lr=0.5", "sync.name=never", "seed=9"])
    assert (run.optimizer.fields["lr"], run.sync.name, run.settings.seed) == (0.5, "never", 9)
    assert run.overrides == ("optimizer.lr=0.5", "sync.name=never", "seed=9")
    assert run.folder == tmp_path
    for wrong in ("seed", "=3", "seed.x=1"):
        with pytest.raises(DtrainError, match="--set"):
            read_run(path, [wrong])


@pytest.mark.parametrize(
    ("content", "words"), [(b"seed = \n", "not valid TOML"), (b"\xff", "not valid TOML")]
)
def test_a_file_that_is_no_toml_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(DtrainError, match=words):
        read_run(path)
    with pytest.raises(DtrainError, match="cannot read"):
        read_run(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "value", [True, 3, 1e-3, 1e300, 'a "quoted" \\ text\nof two lines', [1, "b", [2.5]], {"a": 1}]
)
def test_values_are_written_as_toml_reads_them(value: Any) -> None:
    assert tomllib.loads(f"v = {toml_text(value)}")["v"] == value
