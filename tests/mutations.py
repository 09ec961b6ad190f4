"""Break each promise of `docs/reliability.md` on purpose: ``python -m tests.mutations [TEXT ...]``.

A mutation changes one place of a copy of the repository. The test that the promise names has to
fail there. TEXT chooses the promises that contain it. Exit code 1: a test did not fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "reliability.md"

LIMIT_S = 300.0

TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@dataclass(frozen=True)
class Mutation:
    """A change that breaks a promise.

    Parameters
    ----------
    path : str
        The file that is changed.
    old, new : str
        Text that occurs once in the file, and what takes its place.
    test : str
        The test that has to fail.
    """

    path: str
    old: str
    new: str
    test: str

    @property
    def fits(self) -> bool:
        """Whether the text occurs exactly once."""
        return (ROOT / self.path).read_text(encoding="utf-8").count(self.old) == 1


def promises() -> dict[str, list[str]]:
    """Return the tests of each promise of the page."""
    rows = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if tests := TEST.findall(line):
            rows[line.split("|")[1].strip()] = [f"{path}::{name}" for path, name in tests]
    return rows


def run_tests(folder: Path, test: str) -> subprocess.CompletedProcess[str]:
    """Run a test in a copy of the repository; programs that it starts import the copy, too."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environ = os.environ | {"DTRAIN_DATA": str(data_folder()), "PYTHONPATH": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_S
    )


def data_folder() -> Path:
    """Return the data of the tests, since a copy has none beside it."""
    return Path(os.environ.get("DTRAIN_DATA", ROOT.parent / "shared" / "data"))


def copy_repository(folder: Path) -> None:
    """Copy all files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def try_mutation(mutation: Mutation) -> str:
    """Return "fails" if the test fails in the changed copy, else what happened."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        path = folder / mutation.path
        path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new))
        try:
            ended = run_tests(folder, mutation.test)
        except subprocess.TimeoutExpired:
            return f"fails (not ended after {LIMIT_S:g} s)"
    return "fails" if ended.returncode == 1 else f"PASSES ({ended.returncode})\n{ended.stdout}"


def main() -> int:
    """Try the mutations of the chosen promises, and print a row for each."""
    chosen = [
        mutation
        for promise, tests in promises().items()
        for mutation in MUTATIONS
        if mutation.test in tests and all(text in promise for text in sys.argv[1:])
    ]
    outcomes = []
    for mutation in chosen:
        outcomes.append(try_mutation(mutation))
        change = f"{mutation.path}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}"
        print(f"{outcomes[-1]}: {mutation.test}\n    {change}", flush=True)
    return int(not all(outcome.startswith("fails") for outcome in outcomes))


EARLY_END = "tests/ranks/test_early_end.py::"
DAMAGE = "tests/ranks/test_damage.py::"
OWNERSHIP = "tests/rule/test_ownership.py::"
WATCHDOG = "tests/ranks/test_watchdog.py::"
SUBMIT = "tests/rule/test_submit.py::"
SAFETY = "tests/ranks/test_safety.py::"
SKIPS = "tests/ranks/test_skipped_updates.py::"
ASYNC_SAVE = "tests/ranks/test_async_save.py::"
CRASH_POINTS = "tests/ranks/test_crash_points.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "dtrain/slurm/job.sh.jinja",
        'scontrol requeue "$job_id" && exit 0',
        'exit "$code"',
        "tests/system/test_slurm_jobs.py::test_a_job_survives",
    ),
    Mutation(
        "dtrain/checkpoint/shard.py",
        "tensors[key].detach().contiguous().view(-1).view(torch.uint8)",
        "tensors[key].detach().mul(2).contiguous().view(-1).view(torch.uint8)",
        ASYNC_SAVE + "test_they_have_the_bits_of_synchronous_ones",
    ),
    Mutation(
        "dtrain/checkpoint/async_save.py",
        "            self._pending.wait()\n",
        "",
        ASYNC_SAVE + "test_a_stopped_run_waits_for_the_pending_one_and_saves",
    ),
    Mutation(
        "dtrain/checkpoint/local_level.py",
        'return sources if sources.keys() == set(first["shards"]) else {}',
        "return sources",
        ASYNC_SAVE + "test_the_newest_checkpoint_that_all_nodes_hold_is_resumed",
    ),
    Mutation(
        "dtrain/comm/call_order.py",
        "if calls[rank] != calls[0]:",
        "if False:",
        SAFETY + "test_a_replica_that_averages_other_tensors_is_named",
    ),
    Mutation(
        "dtrain/comm/transport.py",
        "return self.backend.irecv(data, source, tag)",
        "return self.backend.irecv(data, source, 0)",
        "tests/ranks/test_comm_contract.py::test_threads_in_other_orders",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "            block.load_optimizer_state(_optimizer_state(manifest, block, own_root))\n",
        "",
        EARLY_END + "test_a_run_stopped_at_any_update_and_resumed_is_the_undisturbed_one",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "tensors[key].copy_(tensor)",
        "pass",
        "tests/ranks/test_layouts.py::test_a_run_resumes_on_another_layout_as_if_it_had_stayed",
    ),
    Mutation(
        "dtrain/comm/early_end.py",
        "return update < self._decision[0]",
        "return True",
        EARLY_END + "test_all_ranks_decide_for_one_update_that_none_has_passed",
    ),
    Mutation(
        "dtrain/session/run_clock.py",
        "return max(lead_s, LEAST_LEAD_S)",
        "return 0.0",
        "tests/rule/test_run_clock.py::"
        "test_a_run_stops_while_a_stretch_a_save_and_an_evaluation_fit",
    ),
    Mutation(
        "dtrain/schedules/segments.py",
        "                offset,\n                start,",
        "                0,\n                start,",
        EARLY_END + "test_the_rest_of_a_segment_may_be_trained_on_other_ranks",
    ),
    Mutation(
        "dtrain/checkpoint/manifest_file.py",
        "content[HASH_KEY] == content_hash(content)",
        "True",
        DAMAGE + "test_every_flipped_bit_of_a_manifest_is_named",
    ),
    Mutation(
        "dtrain/checkpoint/manifest.py",
        "is_intact = hash_file(path) == self.hashes[name]",
        "is_intact = True",
        DAMAGE + "test_a_resumed_run_takes_the_checkpoint_before_a_damaged_one",
    ),
    Mutation(
        "dtrain/checkpoint/shard.py",
        "if not isinstance(group.get(name, getlink=True), h5py.HardLink):",
        "if False:",
        DAMAGE + "test_a_shard_whose_hash_fits_reads_no_other_file",
    ),
    Mutation(
        "dtrain/checkpoint/manifest.py",
        "filter(CHECKPOINT_NAME.fullmatch, names)",
        "filter(CHECKPOINT_NAME.match, names)",
        DAMAGE + "test_copies_of_checkpoints_are_neither_taken_nor_deleted",
    ),
    Mutation(
        "dtrain/checkpoint/same_run.py",
        "flatten_table(translate_old_keys(saved_table))",
        "flatten_table(saved_table)",
        "tests/ranks/test_evaluate.py::"
        "test_a_run_folder_of_an_earlier_version_is_evaluated_and_resumed",
    ),
    Mutation(
        "dtrain/checkpoint/ownership.py",
        "files.calls.link(draft, path)",
        "files.calls.rename(draft, path)",
        OWNERSHIP + "test_one_of_many_processes_locks_a_folder",
    ),
    Mutation(
        "dtrain/checkpoint/ownership.py",
        'return since is None or since != owner.get("since")',
        "return False",
        OWNERSHIP + "test_a_folder_whose_owner_is_gone_is_taken_over",
    ),
    Mutation(
        "dtrain/checkpoint/ownership.py",
        "    if current != owner:",
        "    if False:",
        OWNERSHIP + "test_a_run_that_lost_its_folder_writes_nothing_more",
    ),
    Mutation(
        "dtrain/session/failure.py",
        '        add_location(error, f"[{comm.flight.name}]")\n',
        "",
        "tests/system/test_faults.py::"
        "test_user_code_that_raises_ends_the_job_with_its_traceback_first",
    ),
    Mutation(
        "dtrain/session/hang_watch.py",
        "timeouts.by_section() if is_rank_of(comm) else {}",
        "{}",
        "tests/system/test_faults.py::test_a_run_that_hangs_names_the_cause_and_resumes",
    ),
    Mutation(
        "dtrain/watchdog/observer.py",
        "return position.still_s + (now - seen_s) > position.limit_s",
        "return False",
        WATCHDOG + "test_a_hang_ends_with_one_report_of_its_cause",
    ),
    Mutation(
        "dtrain/watchdog/limits.py",
        "        if event_s != self._event_s:",
        "        if self._event_s == 0.0:",
        WATCHDOG + "test_a_rank_that_makes_progress_or_has_no_limit_ends_nothing",
    ),
    Mutation(
        "dtrain/watchdog/limits.py",
        "if was_stopped or self._sampled_s is None:",
        "if self._sampled_s is None:",
        WATCHDOG + "test_limits_grow_with_the_pauses_of_this_run_and_own_stops_do_not_count",
    ),
    Mutation(
        "dtrain/comm/launcher.py",
        '"rank.exited",',
        '"rank.unknown",',
        "tests/system/test_launch.py::test_an_end_that_no_rank_reports_is_named",
    ),
    Mutation(
        "dtrain/comm/early_signals.py",
        "    _remembered.append(number)\n",
        "    pass\n",
        "tests/system/test_stop.py::test_a_second_ctrl_c_or_a_signal_left_out_ends_a_run_at_once",
    ),
    Mutation(
        "dtrain/schedules/simulator.py",
        'raise PlanError("plan.deadlock", self._deadlock_text())',
        "return",
        "tests/plan/test_verify.py::test_a_deadlock_is_spelt_out",
    ),
    Mutation(
        "dtrain/slurm/setup.sh.jinja",
        "if [[ $idle -ge {{ budget }} ]]; then",
        "if false; then",
        SUBMIT + "test_a_job_that_has_saved_is_requeued_while_it_makes_progress",
    ),
    Mutation(
        "dtrain/slurm/job.sh.jinja",
        "esac\n",
        "\n",
        SUBMIT + "test_every_script_is_legal_bash",
    ),
    Mutation(
        "dtrain/session/same_program.py",
        "if len(set(comm.allgather_object(own_hash))) == 1:",
        "if True:",
        "tests/ranks/test_same_program.py::test_a_stale_run_file_on_one_rank_is_named",
    ),
    Mutation(
        "dtrain/syncs/replica_check.py",
        "return blake2b(flat.numpy().data, digest_size=CHECKSUM_BYTES).hexdigest()",
        'return ""',
        SAFETY + "test_a_replica_that_differs_is_named_at_once",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "    files.fsync(part)\n",
        "",
        CRASH_POINTS + "test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "files.calls.exchange(part, final)",
        "raise OSError",
        CRASH_POINTS + "test_every_crash_leaves_a_whole_checkpoint_and_a_folder_that_resumes",
    ),
    Mutation(
        "dtrain/session/folder_lock.py",
        "            remove_partial(folder)\n",
        "            pass\n",
        CRASH_POINTS + "test_crashed_runs_end_as_the_undisturbed_one_and_leave_nothing_behind",
    ),
    Mutation(
        "dtrain/checkpoint/store.py",
        "except OSError as error:",
        "except FileNotFoundError as error:",
        CRASH_POINTS
        + "test_every_failing_call_of_a_save_is_reported_and_leaves_a_whole_checkpoint",
    ),
    Mutation(
        "dtrain/checkpoint/run_folder.py",
        "except OSError as error:",
        "except FileNotFoundError as error:",
        CRASH_POINTS + "test_a_run_whose_records_cannot_be_written_ends_with_an_error_of_its_own",
    ),
    Mutation(
        "dtrain/tracking/metrics_file.py",
        "file.truncate(position)",
        "pass",
        "tests/rule/test_tracking.py::test_a_torn_line_of_metrics_is_removed",
    ),
    Mutation(
        "dtrain/comm/launcher.py",
        "prctl(PR_SET_PDEATHSIG, signal.SIGTERM)",
        "pass",
        "tests/system/test_kill.py::"
        "test_a_killed_run_loses_at_most_one_interval_and_ends_as_the_undisturbed_one",
    ),
    Mutation(
        "dtrain/engine/update.py",
        "check_replicas_quickly(self.blocks[index], sync.replicas, update)",
        "pass",
        SAFETY + "test_a_check_every_few_updates_names_block_and_ranks",
    ),
    Mutation(
        "dtrain/engine/skipped_updates.py",
        "return flag if comm.size == 1 else any(comm.allgather_object(flag))",
        "return flag",
        SKIPS + "test_replicas_skip_together_under_every_sync",
    ),
    Mutation(
        "dtrain/engine/skipped_updates.py",
        "buffers[name].data.copy_(copy)",
        "pass",
        SKIPS + "test_a_shared_update_is_skipped_by_all_blocks",
    ),
    Mutation(
        "dtrain/engine/engine.py",
        'check_finite(self._dataset, "train", rows, math.inf)',
        "pass",
        SKIPS + "test_a_loss_that_the_data_spoil_is_blamed_on_them",
    ),
    Mutation(
        "dtrain/comm/agree.py",
        "    comm.raise_together(error)\n",
        "    if error is not None:\n        raise error\n",
        "tests/ranks/test_refusals.py::test_all_ranks_refuse_together",
    ),
    Mutation(
        "dtrain/checkpoint/resume.py",
        "names -= {*RECORDS}",
        "names -= set()",
        "tests/ranks/test_first_start.py::test_the_same_command_starts_anew",
    ),
    Mutation(
        "dtrain/checkpoint/safe_files.py",
        "if not path.is_relative_to(root):",
        "if False:",
        "tests/ranks/test_hostile_folders.py::test_changed_files_end_in_no_traceback_and_no_hang",
    ),
    Mutation(
        "dtrain/models/pretrained.py",
        "weights_only=True",
        "weights_only=False",
        "tests/plan/test_architecture.py::test_every_module_keeps_the_rules",
    ),
    Mutation(
        "dtrain/checkpoint/files.py",
        "flags | os.O_CLOEXEC, 0o666)",
        "flags | os.O_CLOEXEC, 0o600)",
        "tests/ranks/test_hostile_folders.py::test_written_files_follow_the_umask",
    ),
)
"""At least one for each promise."""


if __name__ == "__main__":
    sys.exit(main())
