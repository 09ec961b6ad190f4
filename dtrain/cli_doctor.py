"""The command `dtrain doctor`.

Invariant: it works without an MPI library. Exit code 1: there is a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from dtrain.doctor.advice import Advice
    from dtrain.doctor.finding import Area

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


FULL_RANKS = 2
"""Ranks of `--full` where no launcher started any."""


def add_command(commands: Commands) -> None:
    """Add the command to those of `dtrain`."""
    parser = commands.add_parser(
        "doctor",
        help="find what is wrong with MPI, node, run folder and network",
        description="Check MPI and its launcher, the node, the file system of the run folder and "
        "the network, and say what to do. Start it as you start `dtrain train`: alone, or under "
        "srun or mpirun. Exit code 1: there is a problem.",
    )
    add = parser.add_argument
    add("run", type=Path, nargs="?", metavar="RUN.toml", help="the run that a sync is chosen for")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    add(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="run folder (default: .); an earlier run in it gives the time of a step",
    )
    add("--full", action="store_true", help=f"measure the network too, on {FULL_RANKS} ranks")
    add("--ranks", type=int, metavar="N", help="the same on N ranks of this host")
    add("--model-bytes", type=float, metavar="N", help="bytes of parameters to choose a sync for")
    add("--step-seconds", type=float, metavar="S", help="time of a step without communication")
    add("--json", action="store_true", help="print plain values")
    add("--report-file", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    """Examine this process or its ranks; print the report."""
    from dtrain.comm import launcher_detection
    from dtrain.doctor import examine

    by_shell = launcher_detection.is_started_by_shell()
    if examine.is_one_of_several_ranks(os.environ, by_shell):
        return _examine_as_rank(options)
    ranks = options.ranks or (FULL_RANKS if options.full else None)
    areas = examine.examine_process(os.environ, options.out, by_shell, ranks)
    if ranks is not None and areas[0].facts["outcome"] == "started":
        areas.append(examine.examine_own_ranks(ranks, options.out, os.environ))
    return _print_report(options, areas)


def _examine_as_rank(options: argparse.Namespace) -> int:
    """Examine all ranks, as one of them; rank 0 prints."""
    from dtrain.comm.launcher_detection import detect_launcher
    from dtrain.doctor import examine
    from dtrain.doctor.finding import Area, has_problem
    from dtrain.errors import ConfigError

    found = detect_launcher(os.environ)
    texts = ("", "") if found is None or found.rank else examine.end_texts(found)
    with examine.time_limit(examine.RANKS_LIMIT_S, *texts):
        os.environ.setdefault(examine.DISPLAY_VARIABLE, "mpi_init")
        display = [""]
        try:
            with examine.captured_output() as display:
                import dtrain

                comm = dtrain.init()
        except ConfigError as error:
            findings = examine.start_findings(error, os.environ)
            return _print_report(options, [Area("MPI", "", findings)])
        except SystemExit:  # rank 0 of the launcher reports
            return 1
        areas = examine.examine_ranks(comm, display[0], os.environ, options.out)
        if comm.rank == 0:
            _print_report(options, areas)
        return int(any(comm.allgather_object(has_problem(areas))))


def _print_report(options: argparse.Namespace, areas: list[Area]) -> int:
    """Print the report, or write it; return the exit code."""
    from dtrain.doctor.advice import advice_table
    from dtrain.doctor.finding import has_problem, report_table, report_text

    advice, lines = _advice(options, areas)
    table = report_table(areas, None if advice is None else advice_table(advice))
    if options.report_file is not None:
        options.report_file.write_text(json.dumps(table), encoding="utf-8")
    elif options.json:
        print(json.dumps(table, indent=2))
    else:
        print(report_text(areas, lines))
    sys.stdout.flush()
    return int(has_problem(areas))


def _advice(options: argparse.Namespace, areas: list[Area]) -> tuple[Advice | None, list[str]]:
    """Return the sync for the measured network, and its words; None: nothing to choose for."""
    from dtrain.doctor.advice import HANDLING_S_PER_BYTE, advice_lines, advise
    from dtrain.doctor.network import rate_text

    network = next((area for area in areas if area.name == "network" and area.facts), None)
    if network is None or options.report_file is not None:
        return None, []
    model_bytes = options.model_bytes
    if model_bytes is None and options.run is not None:
        model_bytes = _parameter_bytes(options.run, options.set)
    if model_bytes is None:
        return None, []
    nodes, rate = int(network.facts["nodes"]), _usual_rate(network)
    step_s, origin = _step_seconds(options)
    handling = HANDLING_S_PER_BYTE if _cores_handle_messages(areas, network) else 0.0
    advice = advise(model_bytes, nodes, rate, step_s, handling)
    return advice, [*advice_lines(advice, model_bytes, nodes, rate_text(rate)), *origin]


def _cores_handle_messages(areas: list[Area], network: Area) -> bool:
    """Return whether the cores that compute also send: by TCP, on nodes without GPUs."""
    ranks: list[dict[str, Any]] = next(
        (area.facts["ranks"] for area in areas if area.name == "node"), []
    )
    has_gpus = any(rank["gpus"] for rank in ranks)
    return not has_gpus and network.facts["transports"].get("between nodes") == "tcp"


def _step_seconds(options: argparse.Namespace) -> tuple[float | None, list[str]]:
    """Return the seconds of a step without communication, and a line if an earlier run in the
    run folder gave them."""
    if options.step_seconds is not None:
        return float(options.step_seconds), []
    try:
        summary = json.loads((options.out / "summary.json").read_text(encoding="utf-8"))
        step_s = summary["step_s"]["median"] - summary["wait_s"]["median"]
    except (OSError, ValueError, LookupError, TypeError):
        return None, []
    if not step_s > 0:
        return None, []
    text = f"{step_s * 1e3:.3g} ms, measured without waits by the run in {options.out}"
    return step_s, [f"           a step takes {text}"]


def _usual_rate(network: Area) -> float:
    """Return the lowest rate between nodes, which a ring waits for; else that inside the node."""
    links: list[dict[str, Any]] = network.facts["links"]
    between = [link for link in links if link["is_between_nodes"]]
    return float(min(link["bytes_per_s"] for link in between or links))


def _parameter_bytes(run_file: Path, overrides: list[str]) -> float:
    """Return the bytes of the trained parameters of a run, by its plan."""
    import dtrain

    run = dtrain.Run.read(run_file, overrides)
    table = dtrain.plan(run, run.config.stages or 1).table
    return float(sum(row["parameters_bytes"] for row in table["memory"]))
