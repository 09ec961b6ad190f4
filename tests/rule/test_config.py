"""Run files: the mistakes that are refused, and that the resolved text is the same run."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dtrain.block.lr_schedule import ConstantLR, CosineLR
from dtrain.config.out_folder import fill_keys
from dtrain.config.parse import parse_run, read_run
from dtrain.config.renamed_keys import translate_old_keys
from dtrain.config.sections import (
    Checkpoint,
    DataSection,
    Ema,
    Evaluate,
    Log,
    Mesh,
    Numerics,
    OptimizerSection,
    Partition,
    RunSection,
    Stop,
)
from dtrain.errors import ConfigError
from dtrain.schedules import SCHEDULES
from dtrain.schema import SYNONYMS, dump_toml, kebab, toml_text
from dtrain.syncs import SYNCS
from tests import tiny
from tests.conftest import ROOT
from tests.ranks.test_course import halving
from tests.refusals import refuses

SYNONYM_TABLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"schedule": {"name": "gpipe"}}, {"schedule": {"name": "fill-drain"}}),
    ({"sync": {"name": "all-reduce"}}, {"sync": {"name": "every-step"}}),
    ({"sync": {"name": "none"}}, {"sync": {"name": "never"}}),
    (
        {"sync": {"name": "warmup", "inner": {"name": "int8", "inner": {"name": "all-reduce"}}}},
        {"sync": {"name": "warmup", "inner": {"name": "int8", "inner": {"name": "every-step"}}}},
    ),
    (
        {"schedule": {"name": "pipelined", "prediction": "lwp-v"}},
        {"schedule": {"name": "pipelined", "prediction": "velocity"}},
    ),
    (
        {"schedule": {"name": "pipelined", "prediction": "lwp-w"}},
        {"schedule": {"name": "pipelined", "prediction": "difference"}},
    ),
]


@pytest.mark.parametrize(("synonyms", "canonical"), SYNONYM_TABLES)
def test_synonyms_are_the_same_run_under_its_canonical_names(
    synonyms: dict[str, Any], canonical: dict[str, Any]
) -> None:
    base = {
        "micro_batches": 1,
        "objective": {"name": "backprop"},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    }
    run, expected = tiny.run(**base, **synonyms), tiny.run(**base, **canonical)
    assert run == expected
    assert run.to_table() == expected.to_table()


def test_an_unknown_name_is_answered_with_names_and_synonyms() -> None:
    with refuses(ConfigError, "sync.unknown") as caught:
        tiny.run(sync__name="allreduce")
    assert {"all-reduce", "every-step", "none", "never"} <= set(
        re.findall(r"[\w-]+", str(caught.value))
    )
    assert set(SYNONYMS.values()) <= {*SCHEDULES, *SYNCS, "velocity", "difference"}


OLD_KEYS: list[tuple[dict[str, Any], str | None]] = [
    ({"partition__wire": "int8"}, "activation-compression"),
    ({"sync": {"name": "powersgd", "worth": 3.0}}, "min-compression-rate"),
    (
        {"sync": {"name": "warmup", "inner": {"name": "powersgd", "worth": 3.0}}},
        "min-compression-rate",
    ),
    ({"sync": {"name": "daso", "heat-compatible": True}}, None),
]


@pytest.mark.parametrize(("changes", "new_key"), OLD_KEYS)
def test_an_old_key_is_refused_and_the_new_one_named(
    changes: dict[str, Any], new_key: str | None
) -> None:
    with refuses(ConfigError, "run-file.renamed-key") as caught:
        tiny.run(**changes)
    assert new_key is None or new_key in str(caught.value)


def test_old_keys_of_a_record_are_translated() -> None:
    """A run folder of an earlier version resumes; a switch that was off is gone."""
    old = {
        "partition": {"wire": "int8", "blocks": 3},
        "sync": {"name": "warmup", "inner": {"name": "powersgd", "worth": 3.0}},
    }
    assert translate_old_keys(old) == {
        "partition": {"activation-compression": "int8", "blocks": 3},
        "sync": {"name": "warmup", "inner": {"name": "powersgd", "min-compression-rate": 3.0}},
    }
    off, on = ({"sync": {"name": "daso", "heat-compatible": value}} for value in (False, True))
    assert translate_old_keys(off) == {"sync": {"name": "daso"}}
    assert translate_old_keys(on) == on


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
        {"lr": {"name": "plateau", "metric": "accuracy", "min-factor": 0.1}},
        {"lr": {"name": "tests.ranks.test_course:halving", "warmup-updates": 3}},
        {"data__validation": 0.2},
        {"evaluate": {"every-updates": 50}},
        {"checkpoint__best": "accuracy"},
        {"stop": {"metric": "loss", "patience": 2}, "ema": {"decay": 0.5, "start": 3}},
    ],
)
def test_learning_rates_and_clips_are_written_back(changes: dict[str, Any]) -> None:
    run = tiny.run(**changes)
    assert run != tiny.run()
    again = parse_run(tomllib.loads(dump_toml(run.to_table())), run.path)
    assert again == run
    assert dump_toml(again.to_table()) == dump_toml(run.to_table())


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("runs/{name}-{seed}", "runs/tiny-3"),
        ("{optimizer.lr}/{batch-size}-{model.widths}", "0.01/16-13-11-7-6"),
        ("{{x}}", "{x}"),
    ],
)
def test_keys_are_filled_into_the_folder(template: str, expected: str) -> None:
    assert fill_keys(Path(template), tiny.run()) == Path(expected)


@pytest.mark.parametrize(
    ("template", "key"),
    [("{sead}", "out.unknown-key"), ("{}", "out.unknown-key"), ("{seed", "out.malformed")],
)
def test_a_folder_of_unknown_keys_is_refused(template: str, key: str) -> None:
    with refuses(ConfigError, key):
        fill_keys(Path(template), tiny.run())


def test_a_function_of_rates_may_be_given_in_python() -> None:
    run = tiny.run()
    named = dataclasses.replace(run, lr_schedule=halving)
    assert named.to_table()["lr"]["name"] == "tests.ranks.test_course:halving"
    assert named.lr_schedule.instance.lr_factor(9, 4, 10) == 0.5


def test_clip_is_a_key_of_dtrain_and_no_field_of_the_optimizer() -> None:
    run = tiny.run(optimizer__clip=2, optimizer__clip_over="model")
    assert (run.optimizer_options.clip, run.optimizer_options.clip_over) == (2.0, "model")
    assert run.optimizer.fields == tiny.run().optimizer.fields
    assert run.to_table()["optimizer"]["clip"] == 2.0
    off = tiny.run(optimizer__clip=0)
    assert off == tiny.run()
    assert "clip" not in off.to_table()["optimizer"]


def test_the_learning_rate_is_constant_by_default() -> None:
    assert tiny.run().lr_schedule.instance == ConstantLR()
    assert tiny.run(lr__name="cosine", lr__final=0.5).lr_schedule.instance == CosineLR(final=0.5)


def test_the_guide_lists_every_key_with_its_default() -> None:
    sections = {
        "": RunSection,
        "[data] ": DataSection,
        "[mesh] ": Mesh,
        "[partition] ": Partition,
        "[optimizer] ": OptimizerSection,
        "[checkpoint] ": Checkpoint,
        "[evaluate] ": Evaluate,
        "[log] ": Log,
        "[stop] ": Stop,
        "[ema] ": Ema,
        "[numerics] ": Numerics,
    }
    defaults = {
        f"{section}{kebab(field.name)}": "" if field.default is None else toml_text(field.default)
        for section, kind in sections.items()
        for field in fields(kind)
    }
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## All keys")[2]
    rows = [line.split("|")[1:3] for line in guide.splitlines() if line.startswith("| `")]
    listed = {
        key: default.strip(" `") for keys, default in rows for key in re.findall("`(.+?)`", keys)
    }
    assert listed == defaults


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
        with pytest.raises(ConfigError) as caught:
            read_run(path, [wrong])
        assert caught.value.key.startswith("override.")


@pytest.mark.parametrize("content", [b"seed = \n", b"\xff", b"seed = " + b"[" * 50_000])
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with refuses(ConfigError, "toml.invalid"):
        read_run(path)
    with refuses(ConfigError, "toml.unreadable"):
        read_run(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "value", [True, 3, 1e-3, 1e300, 'a "quoted" \\ text\nof two lines', [1, "b", [2.5]], {"a": 1}]
)
def test_values_are_written_as_toml_reads_them(value: Any) -> None:
    assert tomllib.loads(f"v = {toml_text(value)}")["v"] == value
