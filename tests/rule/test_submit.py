"""Job scripts: made by a pure function, legal bash, and refused before anything is queued."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.checkpoint.resume import find_checkpoint
from dtrain.cli import main
from dtrain.errors import ConfigError
from dtrain.schema import dump_toml
from dtrain.slurm.job_script import SlurmJob, render_script
from dtrain.slurm.site import read_site, site_names
from dtrain.slurm.submit import SubmitOptions, parse_array, parse_minutes, submit
from tests.conftest import ROOT
from tests.refusals import refuses

RUN: dict[str, Any] = {
    "epochs": 1,
    "batch-size": 60,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "widths": [16, 16]},
    "mesh": {"stages": 2},
    "objective": {"name": "backprop"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
SITES = (
    *("frontier", "generic", "haicore", "horeka", "jureca", "juwels-booster", "leonardo"),
    *("lumi", "perlmutter", "workstation"),
)


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run file of two stages in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.toml"
    path.write_text(dump_toml(RUN))
    return path


def job(**changes: Any) -> SlurmJob:
    """Return a job on three nodes."""
    facts = {
        "name": "net",
        "dtrain": "/opt/a b/dtrain",
        "run_file": Path("/home/me/it's.toml"),
        "out": Path("/scratch/runs/net"),
        "settings": ("seed=1", "data.name=my set"),
        "nodes": 3,
        "ranks_per_node": 4,
        "cpus_per_rank": 12,
        "minutes": 150,
    }
    return SlurmJob(**(facts | changes))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "array": {"array_key": "seed", "array_values": ("0", "1 2"), "out": Path("/s/net-{value}")},
    "options": {"account": "acc", "partition": "mine", "after": "afterany:7"},
    "container": {"container": "/images/dtrain.sif"},
    "broadcast": {"environment_archive": "/home/me/env.tar"},
}


def test_the_sites_are_those_of_the_documentation() -> None:
    assert tuple(site_names()) == SITES


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_script_is_legal_bash(variant: str, tmp_path: Path) -> None:
    """All sites of a variant are one input of bash, each in braces that it has to close."""
    scripts = []
    for site in SITES:
        text = render_script(job(**VARIANTS[variant]), read_site(site))
        assert "{{" not in text
        assert not re.search("[ \t]+$", text, re.MULTILINE)
        scripts.append("{\n" + text + "}\n")
    path = tmp_path / "jobs.sh"
    path.write_text("".join(scripts))
    assert text == render_script(job(**VARIANTS[variant]), read_site(SITES[-1]))
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=Path(sys.executable).parent
)


EVERY_VARIANT = [(site, variant) for site in ("lumi", "workstation") for variant in VARIANTS]


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    paths = []
    for site, variant in [*((site, "plain") for site in SITES), *EVERY_VARIANT]:
        paths.append(tmp_path / f"{site}-{variant}.sh")
        paths[-1].write_text(render_script(job(**VARIANTS[variant]), read_site(site)))
    paths += (ROOT / "jobs").glob("*.sh")
    words = [str(SHELLCHECK), "--shell=bash", *map(str, paths)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def directives(text: str) -> dict[str, str]:
    """Return the options of `#SBATCH` lines."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))


def test_a_script_asks_for_the_ranks_of_the_plan() -> None:
    site = read_site("juwels-booster")
    found = directives(render_script(job(account="acc"), site))
    wanted = {"nodes": "3", "ntasks": "12", "ntasks-per-node": "4", "cpus-per-task": "12"}
    wanted |= {"time": "02:30:00", "account": "acc", "requeue": "", "open-mode": "append"}
    wanted |= {"signal": f"USR1@{site.signal_lead_s}", "partition": "booster", "gres": "gpu:4"}
    assert found.items() >= wanted.items()
    text = render_script(job(account="acc", container="/i.sif"), site)
    for words in ("--kill-on-bad-exit=1", "--mpi=pspmix", "--ntasks=12", "--cpu-bind=cores"):
        assert re.search(f"^srun .*(\n .*)*{words}", text, re.MULTILINE)
    assert "(apptainer exec --nv /i.sif" in text
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" in text
    short = directives(render_script(job(minutes=2), site))
    assert short["signal"] == "USR1@40"


def run_script(text: str, folder: Path, code: int, **environment: str) -> tuple[int, str]:
    """Run a script with programs that stand for Slurm; return its exit code and what they did."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in {
        "srun": f'echo srun "$@" >> {folder}/log; exit {code}',
        "scontrol": f'echo scontrol "$@" >> {folder}/log',
        "module": "exit 0",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (folder / "job.sh").write_text(text)
    (folder / "log").write_text("")
    env = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "3"}
    result = subprocess.run(["bash", str(folder / "job.sh")], env=env | environment, check=False)
    return result.returncode, (folder / "log").read_text()


def test_a_job_that_has_saved_is_requeued_while_it_makes_progress(tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = render_script(job(out=out), read_site("generic"))
    for code in (0, 1, 2, 5, 127, 130):
        ended, log = run_script(text, tmp_path, code)
        assert (ended, "scontrol" in log) == (code, False)
    ends = [
        (75, "stopped"),
        (6, "failed"),
        (7, "failed"),
        (137, "running"),
        (14, "running"),
        (143, "failed"),
    ]
    for updates, (code, status) in enumerate(ends, start=10):
        (out / "summary.json").write_text(
            f'{{\n  "status": "{status}",\n  "updates": {updates}\n}}'
        )
        ended, log = run_script(text, tmp_path, code)
        is_failed = code == 143
        assert ended == (code if is_failed else 0)
        assert log.endswith("scontrol requeue 77\n") != is_failed
    (out / "summary.json").write_text('{\n  "updates": 20\n}')
    assert run_script(text, tmp_path, 75)[0] == 0
    results = [run_script(text, tmp_path, 75) for _ in range(3)]
    assert [code for code, _ in results] == [0, 0, 75]
    assert "scontrol" not in results[-1][1]


def test_the_tasks_of_an_array_have_their_own_folder_and_value(tmp_path: Path) -> None:
    text = render_script(
        job(out=tmp_path / "net-{value}", array_key="seed", array_values=("4", "a b")),
        read_site("generic"),
    )
    ids = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    (tmp_path / "net-a b").mkdir()
    (tmp_path / "net-a b" / "summary.json").write_text('{\n  "updates": 3\n}')
    code, log = run_script(text, tmp_path, 75, **ids)
    assert code == 0
    assert f"--out {tmp_path}/net-a b --set seed=1 --set data.name=my set --set seed=a b" in log
    assert log.endswith("scontrol requeue 70_1\n")


def test_a_machine_without_a_scheduler_starts_a_run_again_itself(tmp_path: Path) -> None:
    """One task of an array after the other; each stops once and is then done."""
    program = tmp_path / "dtrain"
    program.write_text(
        f'#!/bin/bash\necho "$*" >> {tmp_path}/log\n'
        f'[[ -e $6/stopped ]] && exit 0\ntouch "$6/stopped"\nexit 75\n'
    )
    program.chmod(0o755)
    array = {"array_key": "seed", "array_values": ("4", "a b"), "out": tmp_path / "net-{value}"}
    site = read_site("workstation")
    (tmp_path / "job.sh").write_text(render_script(job(dtrain=str(program), **array), site))
    result = subprocess.run(["bash", str(tmp_path / "job.sh")], check=False)
    assert result.returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    words = (
        "train /home/me/it's.toml --ranks 12 --out {}/net-{} --set seed=1 --set data.name=my set"
    )
    tasks = [f"{words.format(tmp_path, value)} --set seed={value}" for value in ("4", "a b")]
    assert lines == [tasks[0], tasks[0], tasks[1], tasks[1]]


def test_a_dry_run_prints_the_script_and_writes_nothing(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(run_file), "--nodes", "2", "--dry-run"]) == 0
    found = directives(capsys.readouterr().out)
    assert (found["ntasks"], found["ntasks-per-node"]) == ("2", "1")
    assert [path.name for path in run_file.parent.iterdir()] == ["net.toml"]


def test_a_submitted_script_lies_in_the_run_folder(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = run_file.parent / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho '123;cluster'\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    done = submit(run_file, SubmitOptions())
    out = run_file.parent / "runs" / "net"
    assert (done.job_id, done.script) == ("123", out / "job.sh")
    assert find_checkpoint(out, "auto") is None  # the folder is free for a first start
    assert find_checkpoint(out, "never") is None
    assert main(["submit", str(run_file), "--array", "seed=0..2", "--set", "epochs=2"]) == 0
    printed = capsys.readouterr().out
    for seed in range(3):
        folder = run_file.parent / "runs" / f"net-seed={seed}"
        assert folder.is_dir()
        assert str(folder) in printed
    monkeypatch.setenv("PATH", "/nowhere")
    with refuses(ConfigError, "submit.no-slurm"):
        submit(run_file, SubmitOptions())
    (programs / "sbatch").write_text("#!/bin/sh\necho 'Invalid account' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    with refuses(ConfigError, "submit.refused"):
        submit(run_file, SubmitOptions())


SITE = {"description": "mine", "tested": "here", "cores-per-node": 8}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown key": ({}, {"settings": ["optimiser.lr=1"]}, "run-file.unknown-key"),
    "unknown array key": ({}, {"array": "sed=0..3"}, "run-file.unknown-key"),
    "a value of an array": ({}, {"array": "mesh.stages=1,x"}, "run-file.wrong-type"),
    "no array": ({}, {"array": "seed"}, "submit.array"),
    "mesh": ({}, {"ranks_per_node": 3}, "mesh.ranks-indivisible"),
    "time": ({"max-hours": 1.0}, {"time": "1:00:01"}, "submit.time"),
    "no time": ({}, {"time": "soon"}, "submit.time-invalid"),
    "account": ({"account-required": True}, {}, "submit.account"),
    "gpus": ({"gpus-per-node": 1}, {"ranks_per_node": 2}, "submit.gpus"),
    "memory": ({"memory-per-node-gb": 0.5}, {}, "submit.memory"),
    "gpu memory": ({"gpus-per-node": 2, "gpu-memory-gb": 1e-6}, {}, "submit.gpu-memory"),
    "checkpoint interval": (
        *({}, {"settings": ["checkpoint.every-minutes=60"], "time": "60"}),
        "submit.checkpoint-interval",
    ),
    "scheduler": ({"scheduler": "pbs"}, {}, "scheduler.unknown"),
    "no scheduler": ({"scheduler": "none"}, {"nodes": 2}, "submit.no-scheduler"),
    "site key": ({"gpu": 1}, {}, "run-file.unknown-key"),
    "no cores": ({"cores-per-node": 0}, {}, "site.cores"),
}


@pytest.mark.parametrize(("site", "options", "key"), REFUSED.values(), ids=REFUSED.keys())
def test_a_job_that_cannot_run_is_refused_before_it_queues(
    site: dict[str, Any], options: dict[str, Any], key: str, run_file: Path
) -> None:
    path = run_file.parent / "site.toml"
    path.write_text(dump_toml(SITE | site))
    with refuses(ConfigError, key):
        submit(run_file, SubmitOptions(str(path), **options))
    assert not (run_file.parent / "runs").exists()


def test_an_unknown_site_is_refused(run_file: Path) -> None:
    with refuses(ConfigError, "site.unknown"):
        submit(run_file, SubmitOptions("juwels"))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [(None, 60), ("30", 30), ("0:30", 1), ("2:00:00", 120), ("1-12", 2160), ("1-0:30", 1470)],
)
def test_times_are_read_as_slurm_writes_them(text: str | None, minutes: int) -> None:
    assert parse_minutes(text) == minutes


def test_values_of_an_array() -> None:
    assert parse_array("seed=0..3") == ("seed", ["0", "1", "2", "3"])
    assert parse_array("optimizer.lr=0.1, 0.01") == ("optimizer.lr", ["0.1", "0.01"])
