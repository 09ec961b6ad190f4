"""Sweeps: the runs that a table `[sweep]` describes, their names, and the mistakes in it."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.cli import main
from dtrain.config.parse import read_run
from dtrain.config.sweep import MAX_NAME, read_sweep, sweep_runs
from dtrain.errors import ConfigError
from dtrain.schema import dump_toml
from dtrain.slurm.job_script import SlurmJob, render_script
from dtrain.slurm.site import read_site
from dtrain.slurm.submit import SubmitOptions, submit
from dtrain.slurm.sweep import array_of_sweep
from tests.refusals import refuses

RUN: dict[str, Any] = {
    "epochs": 1,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [8, 8]},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def write(folder: Path, sweep: str) -> Path:
    """Write a run file with the lines of a sweep."""
    path = folder / "net.toml"
    path.write_text(f"{dump_toml(RUN)}\n[sweep]\n{sweep}\n")
    return path


def test_a_sweep_is_the_product_of_its_lines_and_an_override_sets_a_key(tmp_path: Path) -> None:
    lines = 'optimizer.lr = [0.5, 1e-5]\nseed = "-1..1"\n"batch-size, model.widths" = '
    path = write(tmp_path, f"{lines}[[60, [4, 4]], [72, [6]]]")
    runs = read_sweep(path)
    assert len(runs) == 2 * 3 * 2
    assert runs[1].name == "optimizer.lr=0.5,seed=-1,batch-size=72,model.widths=6"
    configs = [read_run(path, run.settings) for run in runs[-2:]]
    assert [run.settings.seed for run in configs] == [1, 1]
    assert [run.optimizer.fields["lr"] for run in configs] == [1e-5, 1e-5]
    assert [run.model.fields["widths"] for run in configs] == [[4, 4], [6]]
    assert "sweep" not in tomllib.loads(configs[0].to_text())

    fixed = ["seed=1", "batch-size=72", "model.widths=[6]"]
    half = read_sweep(path, fixed)
    assert [run.name for run in half] == [run.name for run in (runs[5], runs[11])]
    alone = [*fixed, "optimizer.lr=0.00001"]
    assert [run.name for run in read_sweep(path, alone)] == [runs[11].name]
    assert read_sweep(path, alone, tmp_path / "out") == ()  # the folder of that run
    assert read_run(path, alone).to_text() == configs[1].to_text()
    assert [*dtrain.Run.read_sweep(path, alone)] == [runs[11].name]
    with refuses(ConfigError, "sweep.several-runs"):
        dtrain.Run.read(path, fixed)


def test_the_forms_of_toml_and_the_command_line_are_one(tmp_path: Path) -> None:
    dotted = read_sweep(write(tmp_path, "optimizer.lr = [0.1]"))
    assert dotted == read_sweep(write(tmp_path, '"optimizer.lr" = [0.1]'))
    assert dotted == read_sweep(write(tmp_path, "[sweep.optimizer]\nlr = [0.1]"))
    path = write(tmp_path, "")
    assert read_sweep(path) == ()
    assert dotted == read_sweep(path, ["sweep.optimizer.lr=[0.1]"])


def test_names_are_names_of_folders(tmp_path: Path) -> None:
    values = ["../a b/c.h5", {"name": "local-sgd", "every": 4}, [True, "x" * 300]]
    names = [run.name for run in sweep_runs({"k": values}, ())]
    assert names[:2] == ["k=..-a-b-c.h5", "k=local-sgd-4"]
    assert len(names[2]) == MAX_NAME
    for name in names:
        (tmp_path / name).mkdir()


WRONG = {
    "seed = 3": "sweep.no-list",
    "seed = []": "sweep.no-list",
    'seed = "3..1"': "sweep.no-list",
    '"seed,batch-size" = [[1, 2], [3]]': "sweep.linked-values",
    '"seed,epochs" = [[1, 2]]\nseed = [1]': "sweep.key-twice",
    "seed = [1, 2, 1]": "sweep.same-name",
    'seed = "0..10000"': "sweep.too-many",
    "sed = [1]": "run-file.unknown-key",
    'optimizer.lr = [0.1]\nmesh.stages = [1, "x"]': "run-file.wrong-type",
}
"""Lines of a sweep, and the key of their error."""


@pytest.mark.parametrize(("lines", "key"), WRONG.items())
def test_a_sweep_that_is_wrong_is_refused_before_anything_is_queued(
    lines: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, lines)
    with refuses(ConfigError, key):
        submit(path, SubmitOptions())
    assert main(["train", str(path), "--ranks", "1"]) == ConfigError.code
    assert [file.name for file in tmp_path.iterdir()] == ["net.toml"]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"array": "epochs=1..2"}, "submit.array-and-sweep"),
        ({"settings": ["batch-size=3"]}, "sweep.linked-key-set"),
        ({"settings": ["sweep=3"]}, "sweep.no-table"),
        ({"out": Path("runs/{seed}")}, "sweep.out"),
        ({"settings": ["mesh.stages=2"]}, "mesh.ranks-indivisible"),
    ],
)
def test_options_that_do_not_fit_a_sweep_are_refused(
    options: dict[str, Any], key: str, tmp_path: Path
) -> None:
    path = write(tmp_path, '"seed,batch-size" = [[0, 60]]')
    with refuses(ConfigError, key):
        submit(path, SubmitOptions(ranks_per_node=1, **options))


def test_each_task_of_an_array_is_one_run_of_the_sweep(tmp_path: Path) -> None:
    """The script, with programs that stand for srun and dtrain."""
    path = write(tmp_path, "seed = [0, 1]\nmodel.widths = [[4], [4, 6]]")
    runs = read_sweep(path)
    for name in ("srun", "dtrain"):
        program = tmp_path / name
        program.write_text(f'#!/bin/bash\nprintf "%s|" {name} "$@" >> {tmp_path}/log\n')
        program.chmod(0o755)
    facts: dict[str, Any] = dict.fromkeys(("nodes", "ranks_per_node", "cpus_per_rank"), 1)
    job = SlurmJob("net", f"{tmp_path}/dtrain", path, Path(), ("epochs=2",), minutes=9, **facts)
    job = array_of_sweep(job, runs, read_run(path, runs[0].settings), tmp_path / "{name} 1")
    script = render_script(job, read_site("generic"))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    env |= {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "3"}
    subprocess.run(["bash", "-c", script], env=env, check=True)
    sweep = tmp_path / "net 1"
    words = (tmp_path / "log").read_text()
    assert f"|--out|{sweep}/seed=1,model.widths=4-6|--set|epochs=2|--set|seed=1|" in words
    assert "|--set|model.widths=[4, 6]|" in words
    assert words.endswith(f"dtrain|compare|{sweep}|--csv|{sweep}/sweep.csv|")
