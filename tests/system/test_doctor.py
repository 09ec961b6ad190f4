"""Laws of `dtrain doctor` on ranks of this host, and on a Slurm cluster with shaped links."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cluster as hosts
from tests.cluster import Cluster
from tests.conftest import ROOT
from tests.need import lack
from tests.process import start

DOCTOR = (sys.executable, "-P", "-m", "dtrain", "doctor")
PAYLOAD = 0.955
"""Part of a link's bits that TCP's payload has."""


def test_two_own_ranks_measure_their_link(clean: dict[str, str], tmp_path: Path) -> None:
    """An earlier run in the run folder gives the time of a step."""
    summary = {"step_s": {"median": 0.15}, "wait_s": {"median": 0.05}}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    command = [*DOCTOR, "--full", "--json", "--out", str(tmp_path), "--model-bytes", "1e6"]
    ended = start(command, limit_s=120, env=clean)
    report = json.loads(ended.out)
    assert ended.code == int(not report["ok"]), ended.err
    areas = {area["name"]: area for area in report["areas"]}
    assert list(areas) == ["MPI", "node", "run folder", "network"]
    (link,) = areas["network"]["facts"]["links"]
    assert (link["first"], link["second"]) == (0, 1)
    assert link["bytes_per_s"] > 1e6
    assert report["advice"]["sync"] == "every-step"
    assert report["advice"]["step_s"]["every-step"] == pytest.approx(0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
    assert areas["MPI"]["facts"]["abi"] != ""
    assert areas["MPI"]["facts"]["gpu_aware"] in ("none", "unknown", "CUDA", "ROCm")


@pytest.mark.parametrize(
    ("rate", "bits_per_s", "sync"),
    [("1gbit", 1e9, "daso"), ("300mbit", 3e8, "local-sgd"), ("100mbit", 1e8, "local-sgd")],
)
def test_figures_of_a_shaped_link(
    rate: str, bits_per_s: float, sync: str, cluster: Cluster, tmp_path: Path
) -> None:
    shaped = hosts.up(4, rate)
    model = ("--model-bytes", "37.8e6", "--step-seconds", "0.07")
    command = ["srun", "--mpi=pmix", "-N2", "-n2", *DOCTOR, "--json", "--out", str(tmp_path)]
    ended = start([*command, *model], limit_s=120, env=shaped.env, cwd=ROOT)
    report = json.loads(ended.out)
    (link,) = report["areas"][3]["facts"]["links"]
    assert link["bytes_per_s"] * 8 == pytest.approx(PAYLOAD * bits_per_s, rel=0.2)
    assert report["advice"]["sync"] == sync


def test_srun_without_a_process_manager_is_named(cluster: Cluster) -> None:
    command = ["srun", "--mpi=none", "-N2", "-n2", *DOCTOR, "--json"]
    ended = start(command, limit_s=120, env=cluster.env, cwd=ROOT)
    assert ended.code == 1
    (area,) = json.loads(ended.out)["areas"]
    assert [finding["key"] for finding in area["findings"]] == ["launch.srun-without-pmi"]


def test_a_shell_of_srun_pty_survives(cluster: Cluster) -> None:
    """Both commands see that they are no ranks, and the shell goes on."""
    if shutil.which("script") is None:
        lack("cluster", "no `script`, which makes a terminal")
    shell = "srun --pty -N1 -n2 --mpi=pmix bash"
    words = " ".join(DOCTOR[:-1])
    typed = f"{words} doctor\n{words} train jobs/demo.toml\necho code-$?\nexit\n"
    done = subprocess.run(
        ["script", "-qec", shell, "/dev/null"],
        input=typed,
        capture_output=True,
        text=True,
        timeout=180,
        env=cluster.env,
        cwd=ROOT,
    )
    assert done.stdout.count("[launch.pty-shell]") == 2, done.stdout
    assert "code-2" in done.stdout
